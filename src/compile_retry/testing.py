"""Test tools: make compiles fail on purpose, control the clock, record events, and assert on decorated functions.

With them, you can test that your training survives a failed compile and recovers. Nothing here sleeps or needs pytest.
For pytest there are fixtures as well: see `pytest_compile_retry`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
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
    """A clock for ``RetryPolicy(clock=...)`` that stands still until you advance it.

    Args:
        start: The initial time, in seconds or as a ``timedelta``.

    Example:
        >>> clock = FakeClock()
        >>> clock.advance(30)
        >>> clock()
        30.0
    """

    def __init__(self, start: float | timedelta = 0.0) -> None:
        self._now = _in_seconds(start)

    def __call__(self) -> float:
        """Return the current time, in seconds."""
        return self._now

    def advance(self, seconds: float | timedelta) -> None:
        """Advance the clock.

        Args:
            seconds: The number of seconds, or a ``timedelta``.

        Raises:
            ValueError: `seconds` is negative.
        """
        if _in_seconds(seconds) < 0:
            raise ValueError(f"seconds must not be negative, not {seconds!r}")
        self._now += _in_seconds(seconds)


def _in_seconds(value: float | timedelta) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)


@dataclass
class Faults:
    """Counts of the attempts that :func:`fail_compiles` has seen so far.

    Attributes:
        attempts: Attempts that matched ``function`` and ``graph``.
        failed: Attempts among them that it made fail.
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

    The exception is raised in place of the compiler, so everything above it is real: Dynamo, the fallback, the schedule
    and the recovery.

    Args:
        exception: The exception to raise, or its class.
        times: The number of attempts that fail; by default all attempts in the block.
        function: The name of the decorated function whose attempts fail; by default those of all functions.
        graph: The number of the graph in a call whose attempts fail, from 1; by default all. The first graph break
            separates graph 1 from graph 2.

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
    """Break the C++ compiler while the block runs: Inductor uses a compiler that always fails.

    As on a real machine, Inductor does not recompile what is in its cache. If that matters, use a new cache directory
    (``TORCHINDUCTOR_CACHE_DIR``).
    """
    from ._compile.healing import heal
    from ._torch import inductor

    with tempfile.TemporaryDirectory() as folder:
        compiler = Path(folder, "c++")
        compiler.write_text("#!/bin/sh\necho 'compile_retry: this compiler is broken' >&2\nexit 1\n")
        compiler.chmod(0o755)
        heal()  # Inductor has cached that the real compiler works
        with inductor.cxx(str(compiler)):
            yield


@contextmanager
def record_events(function: str | None = None, *, kinds: Collection[str] | None = None) -> Iterator[list[Event]]:
    """Record the events that occur while the block runs: see `compile_retry.events`.

    Args:
        function: The name of the decorated function whose events are recorded; by default those of all functions.
        kinds: The values of ``kind`` to record; by default all.

    Yields:
        The list of events, which grows as they occur.
    """
    events: list[Event] = []

    def hook(event: Event) -> None:
        if function in (None, event.function) and (kinds is None or event.kind in kinds):
            events.append(event)

    with register_hook(hook):
        yield events
