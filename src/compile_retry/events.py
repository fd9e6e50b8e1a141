"""Events, one record per transition of a decorated function, and the hooks that are called with them.

The log has the same information in words. A hook is called in the thread in which the event occurred, after the library
has released its locks. There are three exceptions: torch holds its compile lock during `AttemptStarted`, and during
`Bypassed` if another ``torch.compile`` is the reason. `StillCompiling` comes from a thread of its own.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch.utils.hooks import RemovableHandle

from ._failures import CompileFailure
from ._schedule.episode import NextRetry
from ._stats import CompileState

__all__ = [
    "AttemptFailed",
    "AttemptPostponed",
    "AttemptStarted",
    "Bypassed",
    "CacheMoved",
    "Compiled",
    "DeviceLost",
    "Event",
    "GaveUp",
    "Hook",
    "PartlyTuned",
    "RecompileLimit",
    "Recovered",
    "RequestFailed",
    "RetryScheduled",
    "StillCompiling",
    "StillEager",
    "SweptAway",
    "Tuned",
    "register_hook",
]

log = logging.getLogger("compile_retry")


def title(function: str, functions: int, fqns: Sequence[str]) -> str:
    """Name one function, or several that share their compiled code: ``Block x20 (layers.0 ... layers.19)``.

    Args:
        function: Their name.
        functions: Their number.
        fqns: The fully qualified names of those that are modules of a model, as far as they are known.
    """
    who = function if functions <= 1 else f"{function} x{functions}"
    return f"{who} ({abbreviated(fqns)})" if fqns else who


def abbreviated(fqns: Sequence[str]) -> str:
    """Name the first and the last of several modules."""
    return ", ".join(fqns) if len(fqns) <= 2 else f"{fqns[0]} ... {fqns[-1]}"


@dataclass(frozen=True, kw_only=True)
class Event:
    """The base class of all events.

    Attributes:
        kind: The event's name, the same for all events of a class.
        function: The name of the decorated function.
        call: The number of the call in which it occurred, from 1.
        time: The policy's clock when it occurred. Events of two threads may reach hooks in either order.
        state: The function's state after the event.
        message: The event in words.
        level: The logging level of its log line; None if it has none, because another event's line says the same.
        functions: The number of decorated functions that share their compiled code, and so this event.
        fqns: The fully qualified names of the modules among them, such as ``layers.0``, as far as they are known: see
            :func:`~compile_retry.compile_repeated_blocks`.
        rank: The rank of this process, if the function has a group of ranks and has been attempted.
    """

    kind: ClassVar[str] = ""
    function: str
    call: int
    time: float
    state: CompileState
    message: str
    level: int | None = None
    functions: int = 1
    fqns: tuple[str, ...] = ()
    rank: int | None = None

    @property
    def who(self) -> str:
        """The functions in words, as the log line names them, such as ``Block x20 (layers.0 ... layers.19)``."""
        return title(self.function, self.functions, self.fqns)


@dataclass(frozen=True, kw_only=True)
class AttemptStarted(Event):
    """The compiler is about to run. A failure inside Dynamo, before there is a graph, has no such event.

    Attributes:
        graph: The number of the graph in the call, from 1.
    """

    kind = "attempt started"
    graph: int


@dataclass(frozen=True, kw_only=True)
class Compiled(Event):
    """An attempt produced code.

    Attributes:
        graph: The number of the graph in the call, from 1.
        seconds: The attempt's duration, including Dynamo, by the policy's clock.
    """

    kind = "compiled"
    graph: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AttemptFailed(Event):
    """An attempt failed.

    Attributes:
        failure: The record of the failure.
        seconds: The attempt's duration, by the policy's clock.
    """

    kind = "failed"
    failure: CompileFailure
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RetryScheduled(Event):
    """A failed attempt will be retried.

    Attributes:
        next_retry: The due moment of the next attempt.
    """

    kind = "retry scheduled"
    next_retry: NextRetry


@dataclass(frozen=True, kw_only=True)
class AttemptPostponed(Event):
    """Something that has not failed is not attempted yet, because the failed attempts of other functions cost too much.

    Attributes:
        next_retry: The due moment of the next attempt.
    """

    kind = "postponed"
    next_retry: NextRetry


@dataclass(frozen=True, kw_only=True)
class Recovered(Event):
    """Everything that had fallen back is compiled again.

    Attributes:
        seconds: The time since the first failure, by the policy's clock.
        failures: The number of failed attempts.
        attempt_seconds: The total duration of the failed attempts.
        eager_calls: The number of calls since the first failure that ran eagerly, at least in part.
    """

    kind = "recovered"
    seconds: float
    failures: int
    attempt_seconds: float
    eager_calls: int


@dataclass(frozen=True, kw_only=True)
class SweptAway(Event):
    """Nothing is left to retry: ``torch.compiler.reset()`` has dropped the graph, or Dynamo skips the frame."""

    kind = "swept away"


@dataclass(frozen=True, kw_only=True)
class GaveUp(Event):
    """A failed attempt will not be retried.

    Attributes:
        failure: The record of the failure.
    """

    kind = "gave up"
    failure: CompileFailure


@dataclass(frozen=True, kw_only=True)
class RequestFailed(Event):
    """``retry_now()`` or ``reset()`` has no effect, because not all ranks of the function's group have called it."""

    kind = "request failed"


@dataclass(frozen=True, kw_only=True)
class PartlyTuned(Event):
    """An attempt produced code, but some autotuning candidates could not be timed, for example for lack of memory.

    Attributes:
        timed: How many candidates were timed.
        candidates: The number of candidates of the operations concerned.
        error: The class of the first candidate's error, and the first line of its message.
        next_retry: The due moment of the attempt to tune it again; None if there will be none.
    """

    kind = "partly tuned"
    timed: int
    candidates: int
    error: str
    next_retry: NextRetry | None


@dataclass(frozen=True, kw_only=True)
class Tuned(Event):
    """Code that was partly tuned has been tuned again, and all candidates were timed."""

    kind = "tuned"


@dataclass(frozen=True, kw_only=True)
class DeviceLost(Event):
    """The accelerator's context is lost. The call raises the device's own error, and no attempt is made after it.

    Attributes:
        error: The error's class and the first line of its message.
    """

    kind = "device lost"
    error: str


@dataclass(frozen=True, kw_only=True)
class StillCompiling(Event):
    """An attempt is still running, after one minute, two, four and so on.

    Attributes:
        graph: The number of the graph in the call, from 1.
        seconds: The time since the compiler started, in real time rather than by the policy's clock.
    """

    kind = "still compiling"
    graph: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StillEager(Event):
    """Something is still held off, one minute, two, four and so on after the first failure.

    Attributes:
        eager_calls: The number of calls since the first failure that ran eagerly, at least in part.
        seconds: The time since the first failure, by the policy's clock.
        slowdown: The duration of an eager call divided by that of a compiled one; None unless both have been timed.
        seconds_lost: The time lost by running eagerly, estimated from both; None unless both have been timed.
        next_retry: The due moment of the next attempt; None if no retry will come.
    """

    kind = "still eager"
    eager_calls: int
    seconds: float
    slowdown: float | None
    seconds_lost: float | None
    next_retry: NextRetry | None


@dataclass(frozen=True, kw_only=True)
class Bypassed(Event):
    """The library has no effect on a call. Each reason is told once.

    Attributes:
        reason: The reason in words.
    """

    kind = "bypassed"
    reason: str


@dataclass(frozen=True, kw_only=True)
class RecompileLimit(Event):
    """A frame reached torch's recompile limit. Calls that do not match its compiled code run eagerly from now on."""

    kind = "recompile limit"


@dataclass(frozen=True, kw_only=True)
class CacheMoved(Event):
    """An attempt succeeded with another cache directory, because files in the usual one are damaged or not writable.

    Attributes:
        directory: The usual directory.
    """

    kind = "cache moved"
    directory: str


class Hook(Protocol):
    """Any callable that takes an event."""

    def __call__(self, event: Event, /) -> object:
        """Handle an event. An exception is logged once per hook, and breaks nothing."""


class Hooks:
    """Hooks that are called together, in the order of registration. Their exceptions are logged, not raised."""

    def __init__(self) -> None:
        self._hooks: OrderedDict[int, Hook] = OrderedDict()
        self._failed: set[int] = set()

    def register(self, hook: Hook) -> RemovableHandle:
        if not callable(hook) or isinstance(hook, type):
            raise TypeError(f"hook must be a callable that takes an event, not {hook!r}")
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def tell(self, event: Event, told: list[Hook] | None = None) -> None:
        """Call all hooks with an event.

        Args:
            event: The event.
            told: Hooks that are left out. Those that are called are added.
        """
        for number, hook in tuple(self._hooks.items()):
            if told is None or hook not in told:
                self._tell(number, hook, event)
            if told is not None:
                told.append(hook)

    def _tell(self, number: int, hook: Hook, event: Event) -> None:
        try:
            hook(event)
        except Exception:
            if number not in self._failed:
                self._failed.add(number)
                log.exception("%r failed on %r; its further failures are not logged", hook, event)


# Hooks for the events of all functions. The former are called before the function's own hooks, the latter after them.
first_hooks, _everywhere = Hooks(), Hooks()


def register_hook(hook: Hook) -> RemovableHandle:
    """Register a hook for the events of all decorated functions in this process.

    Args:
        hook: A callable that takes an :class:`Event`.

    Returns:
        A handle. Its ``remove()`` removes the hook. As a context manager, it removes the hook at the end of the block.

    Raises:
        TypeError: `hook` is not callable.
    """
    return _everywhere.register(hook)


def publish(event: Event, *hooks: Hooks) -> None:
    """Call all hooks with an event.

    Args:
        event: The event.
        hooks: The hooks of its function, or of each function that shares it. If several have a hook, it is called once.
    """
    first_hooks.tell(event)
    told: list[Hook] | None = None if len(hooks) == 1 else []
    for each in hooks:
        each.tell(event, told)
    _everywhere.tell(event)
