"""The report on all decorated functions, for a terminal, a notebook or a program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ._failures import CompileFailure, summary
from ._function import live_functions
from ._schedule.breaker import NextRetry
from ._stats import CompileState, CompileStats

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType
    from rich.table import Table

_EMPTY = "compile_retry: no decorated functions"
_HEADINGS = (
    "function",
    "state",
    "calls",
    "compiled",
    "mixed",
    "eager",
    "attempts",
    "failed",
    "recovered",
    "compiling",
    "next attempt",
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
class FunctionReport:
    """The report on one function."""

    name: str
    state: CompileState
    stats: CompileStats
    last_failure: CompileFailure | None
    next_retry: NextRetry | None

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table row, one for each heading."""
        s = self.stats
        books = (s.calls, s.compiled_calls, s.mixed_calls, s.eager_calls, s.attempts, s.failures, s.recoveries)
        seconds = f"{s.compile_seconds:.1f} s"
        return self.name, self.state.value, *map(str, books), seconds, str(self.next_retry or "")

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary of JSON-serializable values."""
        failure, next_retry = self.last_failure, self.next_retry
        return {
            "name": self.name,
            "state": self.state.value,
            "stats": self.stats.as_dict(),
            "last_failure": None if failure is None else {**asdict(failure), "frame": list(failure.frame)},
            "next_retry": None if next_retry is None else asdict(next_retry),
        }


@dataclass(frozen=True, repr=False)
class Report:
    """The snapshot that :func:`report` returns: a table for `print`, rich and notebooks.

    Attributes:
        functions: One record per function, with `name`, `state`, `stats`, `last_failure` and `next_retry`.
    """

    functions: tuple[FunctionReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as ``{"functions": [...]}``, with JSON-serializable values only."""
        return {"functions": [function.as_dict() for function in self.functions]}

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

    def _lines(self) -> Iterator[str]:
        if not self.functions:
            yield _EMPTY
            return
        rows = [_HEADINGS, *(function.cells() for function in self.functions)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(map(_aligned, _HEADINGS, row, widths)).rstrip()
        for name, failure in self._failures():
            yield f"{name}: {summary(failure)}"

    def _failures(self) -> Iterator[tuple[str, CompileFailure]]:
        for function in self.functions:
            if function.last_failure is not None:
                yield function.name, function.last_failure

    def __rich_console__(self, console: object, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text  # not plain strings: a message may look like markup

        if not self.functions:
            yield Text(_EMPTY)
            return
        yield self._rich_table(frozenset() if options.max_width >= _WIDE else _WIDE_COLUMNS)
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
        for function in self.functions:
            styles = {"function": "bold", "state": _RICH_STYLES[function.state]}
            cells = zip(_HEADINGS, function.cells(), strict=True)
            table.add_row(*(Text(text, styles.get(heading, "")) for heading, text in cells if heading not in left_out))
        return table

    def _repr_html_(self) -> str:
        if not self.functions:
            return f"<p>{_EMPTY}</p>"
        headings = "".join(f'<th style="{_alignment(heading)}">{heading}</th>' for heading in _HEADINGS)
        rows = "".join(map(_html_row, self.functions))
        failures = "".join(_html_failure(name, failure) for name, failure in self._failures())
        return f"<table><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>{failures}"


def report() -> Report:
    """Report on all decorated functions of this process: state, counters, last failure and next attempt.

    The report includes modules compiled in place, and leaves out functions that have been garbage-collected. The order
    is that of decoration.

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
    return Report(
        tuple(FunctionReport(fn.name, fn.state, fn.stats, fn.last_failure, fn.next_retry) for fn in functions)
    )


def _aligned(heading: str, cell: str, width: int) -> str:
    return cell.ljust(width) if heading in _TEXT_COLUMNS else cell.rjust(width)


def _alignment(heading: str) -> str:
    return f"text-align:{'left' if heading in _TEXT_COLUMNS else 'right'}"


def _html_row(function: FunctionReport) -> str:
    def cell(heading: str, text: str) -> str:
        mark = f";border-left:4px solid {_HTML_COLOURS[function.state]}" if heading == "state" else ""
        return f'<td style="{_alignment(heading)}{mark}">{_escape(text)}</td>'

    return f"<tr>{''.join(map(cell, _HEADINGS, function.cells()))}</tr>"


def _html_failure(name: str, failure: CompileFailure) -> str:
    line, traceback = _escape(f"{name}: {summary(failure)}"), _escape(failure.traceback)
    return f"<details><summary>{line}</summary><pre>{traceback}</pre></details>"


def _escape(text: str) -> str:
    from html import escape  # slow to import, and rarely needed

    return escape(text)
