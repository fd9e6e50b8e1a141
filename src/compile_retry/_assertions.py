"""Assertions on decorated functions, for `compile_retry.testing`. Most of this module is their messages.

They do not need pytest, but ``__tracebackhide__`` hides their own frames in its reports.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ._decorator import compiled_function
from ._failures import in_words
from ._function import CompiledFunction, title_of
from ._stats import CompileState
from .events import AttemptFailed, AttemptStarted, Compiled, Event, Hook, RetryScheduled, register_hook

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils.hooks import RemovableHandle

# Maximum number of events in a message.
_EVENTS = 10

_STATES = {
    CompileState.PENDING: "pending: nothing is compiled, and nothing is held off",
    CompileState.FALLBACK: "fallback: something runs eagerly, and a retry will come",
    CompileState.GAVE_UP: "gave up: something runs eagerly, and no retry will come",
}


def assert_compiled(fn: CompiledFunction[..., Any] | torch.nn.Module | Callable[..., Any], /) -> None:
    """Assert that everything called so far runs compiled code: the state is ``COMPILED``.

    Args:
        fn: A decorated function or method, or a module that was compiled in place.

    Raises:
        AssertionError: The state is another one. The message contains the state, the counters, the last failure, the
            due moment of the next attempt and the latest events.
        TypeError: `fn` was not decorated with :func:`~compile_retry.compile_with_fallback`.

    Example:
        >>> import torch
        >>> from compile_retry import compile_with_fallback
        >>> double = compile_with_fallback(lambda x: 2 * x, backend="eager", name="double")
        >>> y = double(torch.ones(2))
        >>> assert_compiled(double)
    """
    __tracebackhide__ = True
    function = compiled_function(fn)
    state = function.state
    if state is not CompileState.COMPILED:
        raise AssertionError(_describe(function, _STATES[state]))


def assert_max_attempts(
    n: int, fn: CompiledFunction[..., Any] | torch.nn.Module | Callable[..., Any] | None = None, /
) -> AbstractContextManager[None]:
    """Assert that at most `n` compile attempts are made while the block runs.

    An attempt is one run of the compiler for one graph, or a failure before there is a graph, as in
    ``CompileStats.attempts``. If the block raises, its exception is not replaced.

    Args:
        n: The number of attempts allowed.
        fn: The decorated function, method or module whose attempts count; by default those of all functions.

    Raises:
        AssertionError: More than `n` attempts were made. The message lists them with function, call, graph and outcome.
        TypeError: `fn` was not decorated with :func:`~compile_retry.compile_with_fallback`, or `n` is not an integer.
        ValueError: `n` is negative.

    Example:
        >>> import torch
        >>> from compile_retry import compile_with_fallback
        >>> double = compile_with_fallback(lambda x: 2 * x, backend="eager")
        >>> with assert_max_attempts(1, double):
        ...     for _ in range(3):
        ...         y = double(torch.ones(2))
    """
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n must be an integer, not {n!r}")
    if n < 0:
        raise ValueError(f"n must not be negative, not {n!r}")
    return _MaxAttempts(n, register_hook if fn is None else compiled_function(fn).register_hook)


# Message of assert_compiled()


def _describe(function: CompiledFunction[..., Any], state: str) -> str:
    lines = [f"{title_of(function)} is not compiled. Its state is {state}.", _counters(function)]
    if (failure := function.last_failure) is not None:
        lines.append(
            f"The last failure was attempt {failure.attempt}, in call {failure.call}, and is {failure.kind}:"
            f" {failure}, compiling {in_words(failure.frame)}."
        )
    if function.next_retry is not None:
        lines.append(f"The next attempt is due {function.next_retry}.")
    return "\n".join((*lines, *_past(function)))


def _counters(function: CompiledFunction[..., Any]) -> str:
    stats = function.stats
    if not stats.calls:
        return "It has not been called, or its first call is not over."
    paths = f"{stats.compiled_calls} compiled, {stats.mixed_calls} mixed, {stats.eager_calls} eager"
    calls = f"Calls: {stats.calls} ({paths})."
    if not stats.attempts:
        return f"{calls} Attempts: 0. torch.compile may be disabled by the environment, an option or a stance."
    return f"{calls} Attempts: {stats.attempts} ({stats.failures} failed). Recoveries: {stats.recoveries}."


def _past(function: CompiledFunction[..., Any]) -> list[str]:
    # These two are redundant: other events' messages contain the same facts.
    events = [
        event
        for event in tuple(function._record.history.events)
        if not isinstance(event, AttemptStarted | RetryScheduled)
    ]
    latest = events[-_EVENTS:]
    heading = "Events" if len(events) == len(latest) else f"Last {_EVENTS} events"
    return [f"{heading}:", *(f"  {event.message}" for event in latest)] if latest else []


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# Implementation of assert_max_attempts()


@dataclass
class _Attempt:
    """One attempt. `graph` is None if it failed before there was one; `outcome` is None until it is known."""

    function: str
    call: int
    graph: int | None
    outcome: str | None = None

    def __str__(self) -> str:
        graph = "no graph yet" if self.graph is None else f"graph {self.graph}"
        return f"{self.function}, call {self.call}, {graph}: {self.outcome or 'has not ended'}"


class _MaxAttempts(AbstractContextManager[None]):
    """The context manager that `assert_max_attempts` returns."""

    def __init__(self, n: int, register: Callable[[Hook], RemovableHandle]) -> None:
        self._n = n
        self._register = register

    def __enter__(self) -> None:
        self._events: list[Event] = []
        self._handle = self._register(self._events.append)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        self._handle.remove()
        attempts = _attempts(self._events)
        if exc_type is None and len(attempts) > self._n:
            allowed = f"at most {_count(self._n, 'attempt')}" if self._n else "no attempt"
            made = f"{len(attempts)} were made" if len(attempts) > 1 else "1 was made"
            listed = "".join(f"\n  {attempt}" for attempt in attempts)
            raise AssertionError(f"Expected {allowed}, but {made}:{listed}")


def _attempts(events: list[Event]) -> list[_Attempt]:
    """Combine the events of each attempt."""
    attempts: list[_Attempt] = []
    for event in events:
        if isinstance(event, AttemptStarted):
            restarted = _open(attempts, event, event.graph)  # Dynamo restarted its analysis: still the same attempt
            if restarted is None:
                attempts.append(_Attempt(event.function, event.call, event.graph))
        elif isinstance(event, Compiled):
            _end(attempts, event, event.graph, f"compiled in {event.seconds:.3g} s")
        elif isinstance(event, AttemptFailed):
            outcome = f"failed, {event.failure}, compiling {in_words(event.failure.frame)}"
            _end(attempts, event, None, outcome, had_graph=event.failure.stage == "backend")
    return attempts


def _open(attempts: list[_Attempt], event: Event, graph: int | None) -> _Attempt | None:
    """Return the unfinished attempt in the event's call for this graph, or for any graph if it is None."""
    for attempt in reversed(attempts):
        same_call = (attempt.function, attempt.call) == (event.function, event.call)
        if same_call and attempt.outcome is None and graph in (None, attempt.graph):
            return attempt
    return None


def _end(attempts: list[_Attempt], event: Event, graph: int | None, outcome: str, *, had_graph: bool = True) -> None:
    attempt = _open(attempts, event, graph) if had_graph else None
    if attempt is None:
        attempt = _Attempt(event.function, event.call, graph)
        attempts.append(attempt)
    attempt.outcome = outcome
