"""The report on all decorated functions, for a terminal, a notebook or a program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ._compile.sharing import Group
from ._failures import CompileFailure, summary
from ._function import CompiledFunction, live_functions
from ._schedule.episode import NextRetry
from ._stats import CompileState, CompileStats, total
from ._switches import active
from .events import abbreviated, title

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType
    from rich.table import Table

_EMPTY = "compile_retry: no decorated functions"
_OFF = "compile_retry is switched off: decorated functions are stock torch.compile"
_HEADINGS = (
    "function",
    "state",
    # Beside the state, because "in 9 calls" next to a number, or to seconds, would look like a part of it.
    "next attempt",
    "calls",
    "compiled",
    "mixed",
    "eager",
    "attempts",
    "failed",
    "recovered",
    "compiling",
)
_TEXT_COLUMNS = frozenset({"function", "state", "next attempt"})  # the others are numbers
# Dropped in a narrow terminal, because rich would squeeze all columns.
_WIDE_COLUMNS = frozenset({"recovered", "compiling"})
_WIDE = 110

_RICH_STYLES = {
    CompileState.PENDING: "dim",
    CompileState.COMPILED: "green",
    CompileState.FALLBACK: "yellow",
    CompileState.GAVE_UP: "bold red",
}
# Readable on light and dark pages. The state is also written in words.
_HTML_COLOURS = {
    CompileState.PENDING: "#888888",
    CompileState.COMPILED: "#009e73",
    CompileState.FALLBACK: "#e69f00",
    CompileState.GAVE_UP: "#d55e00",
}


@dataclass(frozen=True)
class RanksReport:
    """The group of ranks that agree on a function's attempts.

    Attributes:
        group: Its name.
        rank: The rank of this process.
        ranks: All ranks of the group.
    """

    group: str
    rank: int
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.group}: {abbreviated([*map(str, self.ranks)])}"


@dataclass(frozen=True)
class FunctionReport:
    """The report on one function.

    Attributes:
        name: Its name.
        fqn: The fully qualified name of its module, such as ``layers.3``; empty if it is not known.
        group: The number of its row, from 0. Functions that share their compiled code have one row.
        state: Its state, which is that of all functions in the row.
        stats: Its own counters.
        last_failure: The last failed attempt of the functions in the row.
        next_retry: The due moment of their next attempt.
        bypassed: The reasons, in words, for which the library had no effect on a call of them.
        ranks: The group of ranks that agree on their attempts, and the place of this process in it; None if there is
            none, or if it is not known yet.
    """

    name: str
    fqn: str
    group: int
    state: CompileState
    stats: CompileStats
    last_failure: CompileFailure | None
    next_retry: NextRetry | None
    bypassed: tuple[str, ...] = ()
    ranks: RanksReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary of JSON-serializable values."""
        failure, next_retry = self.last_failure, self.next_retry
        return {
            "name": self.name,
            "fqn": self.fqn,
            "group": self.group,
            "state": self.state.value,
            "stats": self.stats.as_dict(),
            "last_failure": None if failure is None else {**asdict(failure), "frame": list(failure.frame)},
            "next_retry": None if next_retry is None else asdict(next_retry),
            "bypassed": list(self.bypassed),
            "ranks": None if self.ranks is None else asdict(self.ranks),
        }


@dataclass(frozen=True)
class GroupReport:
    """The report on functions that share their compiled code, or on one that shares with no other.

    Attributes:
        functions: The reports on each of them, in the order of decoration.
    """

    functions: tuple[FunctionReport, ...]

    @property
    def name(self) -> str:
        """Their name, number and modules, as in log lines: ``Block x20 (layers.0 ... layers.19)``.

        With a group of ranks, the group and the rank of this process follow: ``step [rank 3 of world: 0 ... 7]``.
        """
        fqns = tuple(dict.fromkeys(function.fqn for function in self.functions if function.fqn))
        name, ranks = title(self.functions[0].name, len(self.functions), fqns), self.functions[0].ranks
        return name if ranks is None else f"{name} [{ranks}]"

    @property
    def state(self) -> CompileState:
        """Their state."""
        return self.functions[0].state

    @property
    def stats(self) -> CompileStats:
        """The sums of their counters."""
        return total(function.stats for function in self.functions)

    @property
    def last_failure(self) -> CompileFailure | None:
        """Their last failed attempt."""
        return self.functions[0].last_failure

    @property
    def bypassed(self) -> tuple[str, ...]:
        """The reasons, in words, for which the library had no effect on a call of them."""
        return self.functions[0].bypassed

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the cells of the table row, one for each heading, and then those of each function if there are more."""
        next_retry = self.functions[0].next_retry
        yield self.name, self.state.value, f"due {next_retry}" if next_retry else "", *_counters(self.stats)
        if len(self.functions) > 1:
            for number, function in enumerate(self.functions, 1):
                # The state and the next attempt are those of all, and not repeated.
                yield f"  {function.fqn or f'#{number}'}", "", "", *_counters(function.stats)


def _counters(s: CompileStats) -> tuple[str, ...]:
    books = (s.calls, s.compiled_calls, s.mixed_calls, s.eager_calls, s.attempts, s.failures, s.recoveries)
    return *map(str, books), f"{s.compile_seconds:.1f} s"


@dataclass(frozen=True, repr=False)
class Report:
    """The snapshot that :func:`report` returns: a table for `print`, rich and notebooks.

    Attributes:
        functions: One record per function, with `name`, `fqn`, `group`, `state`, `stats`, `last_failure` and
            `next_retry`.
        expanded: Whether the table has a row for each of the functions that share, below the row for all of them.
        active: Whether the library is switched on: see :func:`set_active`.
    """

    functions: tuple[FunctionReport, ...]
    expanded: bool = False
    active: bool = True

    @property
    def groups(self) -> tuple[GroupReport, ...]:
        """One record per row of the table, with `name`, `functions`, `state`, `stats` and `last_failure`."""
        groups: dict[int, list[FunctionReport]] = {}
        for function in self.functions:
            groups.setdefault(function.group, []).append(function)
        return tuple(GroupReport(tuple(functions)) for functions in groups.values())

    def as_dict(self) -> dict[str, Any]:
        """Return everything as ``{"active": ..., "functions": [...]}``, with JSON-serializable values only."""
        return {"active": self.active, "functions": [function.as_dict() for function in self.functions]}

    def show(self) -> None:
        """Print the table, in colour if rich is installed, otherwise as plain text."""
        try:
            import rich
        except ImportError:
            print(self)  # noqa: T201  # printing is its purpose
        else:
            rich.print(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__  # for interactive sessions

    def _rows(self) -> Iterator[tuple[GroupReport | None, tuple[str, ...]]]:
        """Yield the rows that are shown: the group and its cells, or None and the cells of one of its functions."""
        for group in self.groups:
            row, *rows = group.rows()
            yield group, row
            for each in rows if self.expanded else ():
                yield None, each

    def _lines(self) -> Iterator[str]:
        if not self.functions:
            yield _EMPTY
            yield from self._notices()
            return
        rows = [_HEADINGS, *(row for _, row in self._rows())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(map(_aligned, _HEADINGS, row, widths)).rstrip()
        yield from self._notices()
        for name, failure in self._failures():
            yield f"{name}: {summary(failure)}"

    def _notices(self) -> Iterator[str]:
        if not self.active:
            yield _OFF
        for group in self.groups:
            for reason in group.bypassed:
                yield f"{group.name}: bypassed: {reason}"

    def _failures(self) -> Iterator[tuple[str, CompileFailure]]:
        for group in self.groups:
            if group.last_failure is not None:
                yield group.name, group.last_failure

    def __rich_console__(self, console: object, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text  # not plain strings: a message may look like markup

        if not self.functions:
            yield Text(_EMPTY)
        else:
            yield self._rich_table(frozenset() if options.max_width >= _WIDE else _WIDE_COLUMNS)
        for notice in self._notices():
            yield Text(notice)
        for name, failure in self._failures():
            yield Text.assemble((name, "bold"), ": ", summary(failure))

    def _rich_table(self, left_out: frozenset[str]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
        for heading in _HEADINGS:
            if heading not in left_out:
                folds = heading in _TEXT_COLUMNS
                table.add_column(heading, justify="left" if folds else "right", overflow="fold", no_wrap=not folds)
        for group, row in self._rows():
            styles = {"function": "bold", "state": _RICH_STYLES[group.state]} if group else {}
            cells = zip(_HEADINGS, row, strict=True)
            table.add_row(*(Text(text, styles.get(heading, "")) for heading, text in cells if heading not in left_out))
        return table

    def _repr_html_(self) -> str:
        notices = "".join(f"<p>{_escape(notice)}</p>" for notice in self._notices())
        if not self.functions:
            return f"<p>{_EMPTY}</p>{notices}"
        rows = "".join(_html_group(group, expanded=self.expanded) for group in self.groups)
        failures = "".join(_html_failure(name, failure) for name, failure in self._failures())
        return f"{_html_table(rows)}{notices}{failures}"


def report(*, expanded: bool = False) -> Report:
    """Report on all decorated functions of this process: state, counters, last failure and next attempt.

    The report includes modules compiled in place, and leaves out functions that have been garbage-collected. The order
    is that of decoration. Functions that share their compiled code have one row, with the sums of their counters.

    Args:
        expanded: Whether to show a row for each of the functions that share, too. In a notebook, these rows can be
            opened and closed.

    Returns:
        A snapshot. Print it, call its ``show()``, display it in a notebook, or use its ``as_dict()``.

    Example:
        >>> @compile_with_fallback
        ... def train_step(x):
        ...     return x.sin()
        >>> report().as_dict()["functions"][-1]["state"]
        'pending'
    """
    functions = live_functions.alive()
    numbers: dict[Group, int] = {}
    for fn in functions:
        numbers.setdefault(fn._group, len(numbers))
    return Report(tuple(_report(fn, numbers[fn._group]) for fn in functions), expanded, active.on)


def _report(fn: CompiledFunction[..., Any], group: int) -> FunctionReport:
    ranks = fn._group.ranks()
    return FunctionReport(
        name=fn.name,
        fqn=fn._record.fqn,
        group=group,
        state=fn.state,
        stats=fn.stats,
        last_failure=fn.last_failure,
        next_retry=fn.next_retry,
        bypassed=tuple(fn._group.journal.bypassed),
        ranks=RanksReport(ranks.name, ranks.ranks[ranks.rank], ranks.ranks) if ranks is not None else None,
    )


def _aligned(heading: str, cell: str, width: int) -> str:
    return cell.ljust(width) if heading in _TEXT_COLUMNS else cell.rjust(width)


def _alignment(heading: str) -> str:
    return f"text-align:{'left' if heading in _TEXT_COLUMNS else 'right'}"


def _html_table(rows: str) -> str:
    headings = "".join(f'<th style="{_alignment(heading)}">{heading}</th>' for heading in _HEADINGS)
    return f"<table><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>"


def _html_group(group: GroupReport, *, expanded: bool) -> str:
    """Return the group's row, and below it, if it has several functions, a row that opens to show one row for each."""
    row, *rows = group.rows()
    line = _html_row(row, _HTML_COLOURS[group.state])
    if not rows:
        return line
    opened, table = " open" if expanded else "", _html_table("".join(map(_html_row, rows)))
    details = f"<details{opened}><summary>{len(rows)} functions</summary>{table}</details>"
    return f'{line}<tr><td colspan="{len(_HEADINGS)}" style="text-align:left">{details}</td></tr>'


def _html_row(cells: tuple[str, ...], colour: str = "") -> str:
    def cell(heading: str, text: str) -> str:
        mark = f";border-left:4px solid {colour}" if colour and heading == "state" else ""
        return f'<td style="{_alignment(heading)}{mark}">{_escape(text)}</td>'

    return f"<tr>{''.join(map(cell, _HEADINGS, cells))}</tr>"


def _html_failure(name: str, failure: CompileFailure) -> str:
    line, traceback = _escape(f"{name}: {summary(failure)}"), _escape(failure.traceback)
    return f"<details><summary>{line}</summary><pre>{traceback}</pre></details>"


def _escape(text: str) -> str:
    from html import escape  # slow to import, and rarely needed

    return escape(text)
