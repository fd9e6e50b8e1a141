"""Counters of all decorated functions, for integrations that read them periodically."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from compile_retry._compile.sharing import Group
from compile_retry._function import CompiledFunction, live_functions
from compile_retry._locks import Lock
from compile_retry._record.record import Records
from compile_retry._stats import CompileState, CompileStats, total

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Reading:
    """The state and the counters of all functions with the same name.

    Attributes:
        function: Their name.
        stats: The sums of their counters, including those of garbage-collected functions.
        states: The number of functions in each state.
        calls_left: The calls until the nearest next attempt; None if no policy counts calls.
        seconds_left: The same in seconds.
        rank: The rank of this process, if one of them has a group of ranks and has been attempted.
    """

    function: str
    stats: CompileStats
    states: Counter[CompileState]
    calls_left: int | None
    seconds_left: float | None
    rank: int | None = None

    @property
    def calls(self) -> dict[str, int]:
        """The number of calls by execution path."""
        stats = self.stats
        return {"compiled": stats.compiled_calls, "mixed": stats.mixed_calls, "eager": stats.eager_calls}


class Totals:
    """Sums of counters that never decrease, even when functions are garbage-collected."""

    def __init__(self) -> None:
        self._lock = Lock()
        # By group, not by function: a function that joins a group and is gone before the next update still counts.
        self._records: dict[weakref.ref[Group], tuple[str, Records]] = {}
        self._gone = defaultdict[str, CompileStats](lambda: total(()))

    def update(self) -> list[CompiledFunction[..., Any]]:
        """Include all functions alive now, so that they still count when they are gone. Return them."""
        with self._lock:
            functions = live_functions.alive()
            for function in functions:
                group = function._group
                self._records.setdefault(weakref.ref(group), (function.name, group.journal.records))
            for ref in [ref for ref in self._records if ref() is None]:
                name, records = self._records.pop(ref)
                self._gone[name] = total((self._gone[name], records.totals()))
            return functions

    def read(self) -> list[Reading]:
        """Return one reading per name."""
        with self._lock:
            functions = self.update()
            stats = self._gone.copy()
            for name, records in self._records.values():
                stats[name] = total((stats[name], records.totals()))
            by_name: dict[str, list[CompiledFunction[..., Any]]] = {name: [] for name in stats}
            for function in functions:
                by_name[function.name].append(function)
        return [_reading(name, stats[name], functions) for name, functions in by_name.items()]


def _reading(name: str, stats: CompileStats, functions: list[CompiledFunction[..., Any]]) -> Reading:
    due = [retry for function in functions if (retry := function.next_retry) is not None]
    return Reading(
        name,
        stats,
        Counter(function.state for function in functions),
        _least(each.calls for each in due),
        _least(each.seconds for each in due),
        _least(function._group.journal.rank for function in functions),  # all have the same, if any
    )


def _least(values: Iterable[N | None]) -> N | None:
    return min((value for value in values if value is not None), default=None)
