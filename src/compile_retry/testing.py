"""Make compiles fail on purpose, turn the clock by hand, record what happened, and assert on it.

For the test suites of users: does our training survive a failed compile, and does it recover? Nothing here sleeps, and
nothing here needs pytest. With pytest there are fixtures as well, see `pytest_compile_retry`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ._assertions import assert_compiled, assert_max_attempts
from ._compile.call import Attempt
from .events import Event, register_hook

__all__ = [
    "FakeClock",
    "Faults",
    "assert_compiled",
    "assert_max_attempts",
    "broken_compiler",
    "fail_compiles",
    "record_events",
]


class FakeClock:
    """A clock that only moves when it is told to, for ``RetryPolicy(clock=...)``.

    Args:
        start: What it shows at first, in seconds.

    Example:
        >>> clock = FakeClock()
        >>> clock.advance(30)
        >>> clock()
        30.0
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = float(start)

    def __call__(self) -> float:
        """The time it shows, in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass.

        Raises:
            ValueError: `seconds` is negative: clocks do not run backwards.
        """
        if seconds < 0:
            raise ValueError(f"seconds must not be negative, not {seconds!r}")
        self._now += seconds


@dataclass
class Faults:
    """What :func:`fail_compiles` has done so far.

    Attributes:
        attempts: How many of the attempts that it looks at were made.
        failed: How many of these it made fail.
    """

    attempts: int = 0
    failed: int = 0


@contextmanager
def fail_compiles(
    exception: Exception | type[Exception] = MemoryError,
    *,
    times: int | None = None,
    function: str | None = None,
    graph: int | None = None,
) -> Iterator[Faults]:
    """Make compile attempts fail while the block runs.

    The exception is raised where the compiler would have raised it, below the user's backend, so everything above it
    is real: Dynamo, the fallback, the schedule, the recovery.

    Args:
        exception: What the compiler is to raise: an exception, or its class.
        times: How many attempts fail; by default all that are made in the block.
        function: Only attempts of the decorated function of this name.
        graph: Only attempts of the k-th graph of a call, from 1: what comes after the first graph break is graph 2.

    Yields:
        The counts of attempts so far.

    Raises:
        ValueError: `times` or `graph` is less than 1.

    Example:
        >>> import torch
        >>> from compile_retry import RetryPolicy, compile_with_fallback
        >>> @compile_with_fallback(backend="eager", policy=RetryPolicy(wait=None, wait_calls=2))
        ... def double(x):
        ...     return 2 * x
        >>> with fail_compiles(OSError, times=1):
        ...     for _ in range(3):
        ...         y = double(torch.ones(2))
        >>> double.stats.failures, double.stats.recoveries, double.state
        (1, 1, <CompileState.COMPILED: 'compiled'>)
    """
    for name, value in (("times", times), ("graph", graph)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value!r}")
    from ._compile.backend import faults

    done, instance = Faults(), exception() if isinstance(exception, type) else exception

    def fault(attempt: Attempt) -> None:
        if function not in (None, attempt.function) or graph not in (None, attempt.graph):
            return
        done.attempts += 1
        if times is None or done.failed < times:
            done.failed += 1
            raise instance.with_traceback(None)

    faults.append(fault)
    try:
        yield done
    finally:
        faults.remove(fault)


@contextmanager
def broken_compiler() -> Iterator[None]:
    """Break the C++ compiler for real while the block runs: inductor calls one that only ever fails.

    What inductor has compiled before, it may still find in its cache, as on a real machine. Use a new cache directory
    (``TORCHINDUCTOR_CACHE_DIR``) where that matters.
    """
    from ._compile.healing import heal
    from ._torch import inductor

    with tempfile.TemporaryDirectory() as folder:
        compiler = Path(folder, "c++")
        compiler.write_text("#!/bin/sh\necho 'compile_retry: this compiler is broken' >&2\nexit 1\n")
        compiler.chmod(0o755)
        heal()  # inductor remembers that the real one worked
        with inductor.cxx(str(compiler)):
            yield


@contextmanager
def record_events(function: str | None = None, *, kinds: Collection[str] | None = None) -> Iterator[list[Event]]:
    """Collect the events that happen while the block runs, see `compile_retry.events`.

    Args:
        function: Only those of the decorated function of this name.
        kinds: Only those whose ``kind`` is among these.

    Yields:
        The list that they are added to, in order.
    """
    events: list[Event] = []

    def hook(event: Event) -> None:
        if function in (None, event.function) and (kinds is None or event.kind in kinds):
            events.append(event)

    with register_hook(hook):
        yield events
