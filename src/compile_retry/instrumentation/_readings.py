"""Counters of all decorated functions, for integrations that read them periodically."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from compile_retry._function import CompiledFunction, live_functions
from compile_retry._locks import Lock
from compile_retry._stats import Books, CompileState, CompileStats

N = TypeVar("N", int, float)

_NOTHING = CompileStats(**dict.fromkeys((field.name for field in fields(CompileStats)), 0))


@dataclass(frozen=True)
class Reading:
    """The state and the counters of all functions with the same name.

    Attributes:
        function: Their name.
        stats: The sums of their counters, including those of garbage-collected functions.
        states: The number of functions in each state.
        calls_left: The calls until the nearest next attempt; None if no policy counts calls.
        seconds_left: The same in seconds.
    """

    function: str
    stats: CompileStats
    states: Counter[CompileState]
    calls_left: int | None
    seconds_left: float | None

    @property
    def calls(self) -> dict[str, int]:
        """The number of calls by execution path."""
        stats = self.stats
        return {"compiled": stats.compiled_calls, "mixed": stats.mixed_calls, "eager": stats.eager_calls}


class Totals:
    """Sums of counters that never decrease, even when functions are garbage-collected."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._books: dict[weakref.ref[CompiledFunction[..., Any]], tuple[str, Books]] = {}
        self._gone: dict[str, CompileStats] = {}

    def update(self) -> list[CompiledFunction[..., Any]]:
        """Include all functions alive now, so that they still count when they are gone. Return them."""
        with self._lock:
            functions = live_functions.alive()
            for function in functions:
                self._books.setdefault(weakref.ref(function), (function.name, function._record.books))
            for ref in [ref for ref in self._books if ref() is None]:
                name, books = self._books.pop(ref)
                self._gone[name] = _sum(self._gone.get(name, _NOTHING), books.snapshot())
            return functions

    def read(self) -> list[Reading]:
        """Return one reading per name."""
        with self._lock:
            functions = self.update()
            stats = dict(self._gone)
            for name, books in self._books.values():
                stats[name] = _sum(stats.get(name, _NOTHING), books.snapshot())
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
    )


def _least(values: Iterable[N | None]) -> N | None:
    return min((value for value in values if value is not None), default=None)


def _sum(a: CompileStats, b: CompileStats) -> CompileStats:
    return CompileStats(**{f.name: getattr(a, f.name) + getattr(b, f.name) for f in fields(CompileStats)})
