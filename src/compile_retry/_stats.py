"""The books: what became of the calls, and how a function stands."""

from __future__ import annotations

import enum
import itertools
from dataclasses import asdict, dataclass

from ._locks import Lock


class CompileState(enum.Enum):
    """How a decorated function stands."""

    PENDING = "pending"
    """Nothing has been attempted yet."""

    COMPILED = "compiled"
    """What has been called runs compiled code, as far as torch compiles it."""

    FALLBACK = "fallback"
    """Something runs eagerly, and a retry will come."""

    GAVE_UP = "gave up"
    """Something runs eagerly, and no retry will come."""


@dataclass(frozen=True)
class CompileStats:
    """A snapshot of a decorated function's books.

    Attributes:
        compiled_calls: Calls in which every captured graph was compiled code, and there was at least one.
        mixed_calls: Calls in which some graphs were compiled code and others ran eagerly.
        eager_calls: Calls in which no compiled code ran, for whatever reason.
        attempts: Runs of the compiler, one per captured graph, and failures before there was a graph.
        failures: Attempts that did not produce code.
        recoveries: How often everything that had fallen back was compiled again.
        compile_seconds: Seconds in which Dynamo and the compiler compiled, failed attempts included, by the policy's
            clock.
    """

    compiled_calls: int
    mixed_calls: int
    eager_calls: int
    attempts: int
    failures: int
    recoveries: int
    compile_seconds: float

    @property
    def calls(self) -> int:
        """Calls of the function that are over. A call that Dynamo traces into is part of its caller's."""
        return self.compiled_calls + self.mixed_calls + self.eager_calls

    @property
    def compiled_fraction(self) -> float:
        """The share of calls that ran compiled code only, from 0 to 1; 0 before the first call."""
        return self.compiled_calls / self.calls if self.calls else 0.0

    def as_dict(self) -> dict[str, int | float]:
        """All figures by name, for a metrics logger."""
        return {"calls": self.calls, **asdict(self), "compiled_fraction": self.compiled_fraction}


class Counter(itertools.count):  # type: ignore[type-arg]  # cannot be subscripted at run time
    """Counts without a lock: `next` of it is one C call and therefore atomic."""

    def __init__(self) -> None:
        next(self)  # count from 1

    @property
    def value(self) -> int:
        return int(repr(self)[len("Counter(") : -1]) - 1  # the only way to look without counting


class Books:
    """The running counts behind `CompileStats`."""

    def __init__(self) -> None:
        self.calls = {"compiled": Counter(), "mixed": Counter(), "eager": Counter()}
        self.attempts = Counter()
        self.failures = Counter()
        self.recoveries = Counter()
        self._seconds = 0.0
        self._lock = Lock()

    @property
    def not_compiled(self) -> int:
        """How many calls ran eagerly, at least in part."""
        return self.calls["eager"].value + self.calls["mixed"].value

    def add_seconds(self, seconds: float) -> None:
        with self._lock:
            self._seconds += seconds

    def snapshot(self) -> CompileStats:
        return CompileStats(
            compiled_calls=self.calls["compiled"].value,
            mixed_calls=self.calls["mixed"].value,
            eager_calls=self.calls["eager"].value,
            attempts=self.attempts.value,
            failures=self.failures.value,
            recoveries=self.recoveries.value,
            compile_seconds=self._seconds,
        )
