"""Statistics and state of a decorated function."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from ._locks import Lock


class CompileState(enum.Enum):
    """The state of a decorated function."""

    PENDING = "pending"
    """No attempt has been made yet."""

    COMPILED = "compiled"
    """Everything called so far runs compiled code, as far as PyTorch compiles it."""

    FALLBACK = "fallback"
    """Something runs eagerly, and a retry will come."""

    GAVE_UP = "gave up"
    """Something runs eagerly, and no retry will come."""


@dataclass(frozen=True)
class CompileStats:
    """A snapshot of a decorated function's counters.

    Attributes:
        compiled_calls: Calls that ran at least one graph and ran all graphs as compiled code.
        mixed_calls: Calls that ran some graphs as compiled code and others eagerly.
        eager_calls: Calls that ran no compiled code, for any reason.
        attempts: Runs of the compiler, one per captured graph, plus failures before there was a graph.
        failures: Attempts that did not produce code.
        recoveries: Number of recoveries: moments when everything that had fallen back was compiled again.
        compile_seconds: Seconds spent in Dynamo and the compiler, including failed attempts, by the policy's clock.
        partly_tuned: Attempts that produced code although some of Inductor's autotuning candidates could not be timed,
            for example for lack of memory.
    """

    compiled_calls: int
    mixed_calls: int
    eager_calls: int
    attempts: int
    failures: int
    recoveries: int
    compile_seconds: float
    partly_tuned: int = 0

    @property
    def calls(self) -> int:
        """The number of finished calls, except nested calls that Dynamo traces as part of their caller."""
        return self.compiled_calls + self.mixed_calls + self.eager_calls

    @property
    def compiled_fraction(self) -> float:
        """The fraction of calls that ran only compiled code, from 0 to 1; 0 before the first call."""
        return self.compiled_calls / self.calls if self.calls else 0.0

    def as_dict(self) -> dict[str, int | float]:
        """Return all values by name, for example for a metrics logger."""
        return {"calls": self.calls, **asdict(self), "compiled_fraction": self.compiled_fraction}


def total(stats: Iterable[CompileStats]) -> CompileStats:
    """Add up the counters of several functions."""
    rows = tuple(stats)
    return CompileStats(**{field.name: sum(getattr(row, field.name) for row in rows) for field in fields(CompileStats)})


class Counter(itertools.count):  # type: ignore[type-arg]  # cannot be subscripted at run time
    """A counter without a lock: `next` is a single C call and therefore atomic."""

    def __init__(self) -> None:
        next(self)  # count from 1

    @property
    def value(self) -> int:
        return int(repr(self)[len("Counter(") : -1]) - 1  # the only way to read without counting


class Books:
    """The live counters behind `CompileStats`."""

    def __init__(self) -> None:
        self.calls = {"compiled": Counter(), "mixed": Counter(), "eager": Counter()}
        self.attempts = Counter()
        self.failures = Counter()
        self.recoveries = Counter()
        self.partly_tuned = Counter()
        self._seconds = 0.0
        self._lock = Lock()

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
            partly_tuned=self.partly_tuned.value,
        )
