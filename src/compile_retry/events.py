"""Records of what happens to decorated functions, one per transition, and the hooks that are called with them.

The log says the same in words. A hook is called in the thread in which the thing happened, after the library has let go
of its locks. The exceptions are `AttemptStarted`, during which torch holds the lock under which it compiles, and
`StillCompiling`, which comes from a thread of its own.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch.utils.hooks import RemovableHandle

from ._failures import CompileFailure
from ._schedule.breaker import NextRetry
from ._stats import CompileState

__all__ = [
    "AttemptFailed",
    "AttemptStarted",
    "CacheMoved",
    "Compiled",
    "Event",
    "GaveUp",
    "Hook",
    "RecompileLimit",
    "Recovered",
    "RetryScheduled",
    "StillCompiling",
    "StillEager",
    "SweptAway",
    "register_hook",
]

log = logging.getLogger("compile_retry")


@dataclass(frozen=True, kw_only=True)
class Event:
    """The base class of all events.

    Attributes:
        kind: What happened, in a word or two; the same for all events of a class.
        function: Name of the decorated function.
        call: The call in which it happened, from 1.
        time: When it happened, by the policy's clock. Hooks may be told of what happens in two threads in either order.
        state: How the function stands after it.
        message: The same in words.
        level: Logging level of its line in the log; None if it has none, as another event's line says the same.
        functions: How many decorated functions share their compiled code, and so this event.
    """

    kind: ClassVar[str] = ""
    function: str
    call: int
    time: float
    state: CompileState
    message: str
    level: int | None = None
    functions: int = 1


@dataclass(frozen=True, kw_only=True)
class AttemptStarted(Event):
    """The compiler is about to run. What fails inside Dynamo, before there is a graph to compile, has no such event.

    Attributes:
        graph: Which graph of the call it is, from 1.
    """

    kind = "attempt started"
    graph: int


@dataclass(frozen=True, kw_only=True)
class Compiled(Event):
    """An attempt produced code.

    Attributes:
        graph: Which graph of the call it is, from 1.
        seconds: How long it took, Dynamo's part included, by the policy's clock.
    """

    kind = "compiled"
    graph: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AttemptFailed(Event):
    """An attempt did not produce code.

    Attributes:
        failure: Why.
        seconds: How long it took, by the policy's clock.
    """

    kind = "failed"
    failure: CompileFailure
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RetryScheduled(Event):
    """A failed attempt will be repeated.

    Attributes:
        next_retry: When.
    """

    kind = "retry scheduled"
    next_retry: NextRetry


@dataclass(frozen=True, kw_only=True)
class Recovered(Event):
    """Everything that had fallen back is compiled again.

    Attributes:
        seconds: How long ago the first failure was, by the policy's clock.
        failures: How many attempts failed.
        attempt_seconds: How long these took.
        eager_calls: How many calls ran eagerly, at least in part, since the first failure.
    """

    kind = "recovered"
    seconds: float
    failures: int
    attempt_seconds: float
    eager_calls: int


@dataclass(frozen=True, kw_only=True)
class SweptAway(Event):
    """Nothing is left to try: a graph is gone, as after ``torch.compiler.reset()``, or Dynamo skips the frame."""

    kind = "swept away"


@dataclass(frozen=True, kw_only=True)
class GaveUp(Event):
    """A failed attempt will not be repeated.

    Attributes:
        failure: Why it failed.
    """

    kind = "gave up"
    failure: CompileFailure


@dataclass(frozen=True, kw_only=True)
class StillCompiling(Event):
    """An attempt has been running for long.

    Attributes:
        graph: Which graph of the call it is, from 1.
        seconds: For how long so far, by the wall clock.
    """

    kind = "still compiling"
    graph: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StillEager(Event):
    """Something has been held off for long.

    Attributes:
        eager_calls: How many calls ran eagerly, at least in part, since the first failure.
        seconds: How long ago that was, by the policy's clock.
        slowdown: The time of an eager call against a compiled one, where both have been seen.
        seconds_lost: What running eagerly has cost so far, where both have been seen.
        next_retry: When the next attempt is due; None if none will come.
    """

    kind = "still eager"
    eager_calls: int
    seconds: float
    slowdown: float | None
    seconds_lost: float | None
    next_retry: NextRetry | None


@dataclass(frozen=True, kw_only=True)
class RecompileLimit(Event):
    """Torch compiled a frame so often that it gave it up: what its code does not fit runs eagerly from now on."""

    kind = "recompile limit"


@dataclass(frozen=True, kw_only=True)
class CacheMoved(Event):
    """An attempt succeeded with another cache directory, because files in the usual one are damaged or not writable.

    Attributes:
        directory: The usual one.
    """

    kind = "damaged cache"
    directory: str


class Hook(Protocol):
    """Any callable that takes an event."""

    def __call__(self, event: Event, /) -> object:
        """Called with each event. What it raises is logged once, and breaks nothing."""


class Hooks:
    """Hooks that are called together, in the order of their registration. None of them can break anything."""

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
        """Call all hooks with an event, except those in `told`, to which they are added."""
        for number, hook in tuple(self._hooks.items()):
            if told is not None:
                if hook in told:
                    continue
                told.append(hook)
            self._tell(number, hook, event)

    def _tell(self, number: int, hook: Hook, event: Event) -> None:
        try:
            hook(event)
        except Exception:
            if number not in self._failed:
                self._failed.add(number)
                log.exception("%r failed on %r; further failures of it are not logged", hook, event)


# Called with the events of all functions: the former before, the latter after the hooks of the function itself.
first_hooks, _everywhere = Hooks(), Hooks()


def register_hook(hook: Hook) -> RemovableHandle:
    """Have a hook told of the events of every decorated function in this process.

    Args:
        hook: A callable that takes an :class:`Event`.

    Returns:
        A handle. Its ``remove()`` takes the hook away, and so does the end of a ``with`` block that it heads.

    Raises:
        TypeError: `hook` cannot be called.
    """
    return _everywhere.register(hook)


def publish(event: Event, *hooks: Hooks) -> None:
    """Call all hooks with an event.

    Args:
        event: The event.
        hooks: Those of its function, or of each function that shares it. A hook that several have is called once.
    """
    first_hooks.tell(event)
    if len(hooks) == 1:
        hooks[0].tell(event)
    else:
        told: list[Hook] = []
        for each in hooks:
            each.tell(event, told)
    _everywhere.tell(event)
