"""What happened, told in one log line per transition and to whoever records it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ._breaker import NextRetry
from ._failures import CompileFailure
from ._stats import CompileState

log = logging.getLogger("compile_retry")

TransitionKind = Literal["compiled", "failed", "recovered", "gave up", "recompile limit", "damaged cache"]


@dataclass(frozen=True)
class Transition:
    """One change in how a decorated function stands.

    Attributes:
        kind: ``"compiled"`` (its first compiled code), ``"failed"`` (a failed attempt), ``"recovered"``, ``"gave up"``
            (a failed attempt after which no retry will come), ``"recompile limit"`` (torch has given a frame up) or
            ``"damaged cache"`` (it took another cache directory to compile).
        function: Name of the decorated function.
        call: The call in which it happened, from 1.
        state: How the function stands after it.
        failure: What failed, for ``"failed"`` and ``"gave up"``.
        next_retry: When the next attempt is due, where one is.
        message: The log line.
    """

    kind: TransitionKind
    function: str
    call: int
    state: CompileState
    message: str
    failure: CompileFailure | None = None
    next_retry: NextRetry | None = None


# Called with each transition, outside any lock. `compile_retry.testing` records through it.
listeners: list[Callable[[Transition], None]] = []


def publish(transition: Transition, level: int) -> None:
    """Log a transition and tell the listeners. Neither may break a training step."""
    log.log(level, "%s: %s", transition.function, transition.message)
    for listener in tuple(listeners):
        _tell(listener, transition)


def _tell(listener: Callable[[Transition], None], transition: Transition) -> None:
    try:
        listener(transition)
    except Exception:
        log.exception("a listener failed on %r", transition)
