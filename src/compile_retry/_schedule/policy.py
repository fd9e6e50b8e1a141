"""When to try again, in tenacity's terms. Nothing here sleeps or loops, and nothing here knows torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple, TypeAlias

from tenacity import (
    AsyncRetrying,
    BaseRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_never,
    wait_exponential,
)

from compile_retry._failures import is_transient

WaitStrategy: TypeAlias = Callable[[RetryCallState], float]
StopStrategy: TypeAlias = Callable[[RetryCallState], bool]
RetryPredicate: TypeAlias = Callable[[RetryCallState], bool]

# tenacity's strategies are handed the object that drives them. Nothing drives them here.
_NOBODY = Retrying()


@dataclass(frozen=True)
class RetryPolicy:
    """How long to stay eager after a failed attempt, and when to give up.

    Attributes:
        wait: Seconds until the next attempt: a tenacity wait strategy, a number, or ``None``.
        wait_calls: The same in calls of the decorated function: after a failure in call *c*, a wait of *w* calls makes
            call *c + w* an attempt. Fractions are rounded up, and less than one call counts as one. If both are
            given, whichever comes first counts.
        stop: A tenacity stop strategy over the episode's failed attempts and the seconds since its first failure.
        retry: A tenacity retry predicate: which failures are worth another attempt. By default
            :func:`is_transient` decides.
        clock: Any callable that returns seconds and never runs backwards. Tests put a fake one here.
        max_overhead: The share of the time since the episode began that failed attempts may take, for example 0.05. The
            next attempt is pushed out until one as long as the last would stay within it. ``math.inf`` pushes nothing
            out. By default 0.05 where only ``wait`` is given, and ``math.inf`` where ``wait_calls`` is: attempts then
            come at the calls it says.

    Raises:
        TypeError: A value of the wrong kind, for example a number where a strategy belongs.
        ValueError: A negative or NaN wait, less than one call, neither wait given, or a share that is not positive.
    """

    wait: WaitStrategy | float | None = wait_exponential(multiplier=30, min=30, max=3600)
    wait_calls: WaitStrategy | float | None = None
    stop: StopStrategy = stop_never
    retry: RetryPredicate = retry_if_exception(is_transient)
    clock: Callable[[], float] = time.monotonic
    max_overhead: float | None = None

    def __post_init__(self) -> None:
        _check_wait("wait", self.wait, at_least=0)
        _check_wait("wait_calls", self.wait_calls, at_least=1)
        if self.wait is None and self.wait_calls is None:
            raise ValueError(
                "wait and wait_calls are both None, so no retry would ever be due; give at least one of them"
            )
        _check_strategy("stop", self.stop, "a tenacity stop strategy such as stop_after_attempt(10) or stop_never")
        _check_strategy("retry", self.retry, "a tenacity retry predicate such as retry_if_exception_type(OSError)")
        if self.max_overhead is None:
            object.__setattr__(self, "max_overhead", 0.05 if self.wait_calls is None else math.inf)
        else:
            _check_share("max_overhead", self.max_overhead)
        _check_strategy("clock", self.clock, "a callable that returns seconds, such as time.monotonic")

    @classmethod
    def of(cls, policy: object) -> RetryPolicy:
        """The policy that an argument means: a policy, a ``tenacity.Retrying``, or ``None`` for the default."""
        if policy is None:
            return cls()
        if isinstance(policy, cls):
            return policy
        if isinstance(policy, BaseRetrying) and not isinstance(policy, AsyncRetrying):
            return cls(wait=policy.wait, stop=policy.stop, retry=policy.retry)
        raise TypeError(f"policy must be a RetryPolicy, a tenacity.Retrying or None, not {policy!r}")


def _check_wait(name: str, value: object, at_least: int) -> None:
    unit = "call" if at_least else "second"
    if value is None or (callable(value) and not isinstance(value, type)):
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a tenacity wait strategy, a number of {unit}s or None, not {value!r}")
    if math.isnan(value) or value < at_least:
        raise ValueError(f"{name} must be at least {at_least} {unit}{'s' * (not at_least)}, not {value!r}")


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number such as 0.05, math.inf or None, not {value!r}")
    if not float(value) > 0:
        raise ValueError(f"{name} must be positive, not {value!r}; math.inf does not limit it")


def _check_strategy(name: str, value: object, what: str) -> None:
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be {what}, not {value!r}")


class Decision(NamedTuple):
    """What a policy says of one failed attempt: how long to hold off, or that nothing more will be tried.

    ``seconds`` and ``calls`` are infinite where that wait does not apply. ``at_least`` seconds are to pass in any case.
    """

    retry: bool
    stop: bool
    seconds: float
    calls: float
    at_least: float = 0.0


def decide(
    policy: RetryPolicy,
    exc: BaseException,
    *,
    attempt: int,
    started: float,
    now: float,
    waited: float,
    spent: float,
    cost: float,
) -> Decision:
    """Ask the policy's strategies about a failed attempt.

    The strategies are called the way tenacity's own loop calls them (``wait`` before ``stop``, so that
    ``stop_before_delay`` sees the coming wait), on a state that is dropped afterwards: it holds the exception.

    Args:
        policy: Whose strategies are asked.
        exc: The root cause of the failure.
        attempt: Number of the failed attempt within its episode, from 1.
        started: The clock at the episode's first failure.
        now: The clock now.
        waited: Seconds of hold-off so far in this episode.
        spent: Seconds that its failed attempts have taken, this one included.
        cost: Seconds that this one has taken.
    """
    state = RetryCallState(_NOBODY, None, (), {})
    state.attempt_number = attempt
    state.start_time = started
    state.idle_for = waited
    state.set_exception((type(exc), exc, None))
    state.outcome_timestamp = now
    try:
        if not policy.retry(state):
            return Decision(retry=False, stop=False, seconds=math.inf, calls=math.inf)
        at_least = pause(policy, now - started, spent, cost)
        seconds = max(at_least, _evaluate("wait", policy.wait, state))
        calls = _evaluate("wait_calls", policy.wait_calls, state)
        state.upcoming_sleep = 0.0 if math.isinf(seconds) else seconds
        stop = bool(policy.stop(state))
        calls = max(1, calls if math.isinf(calls) else math.ceil(calls))
        return Decision(retry=True, stop=stop, seconds=seconds, calls=calls, at_least=at_least)
    finally:
        state.outcome = None


def pause(policy: RetryPolicy, elapsed: float, spent: float, cost: float) -> float:
    """Seconds until another attempt of this cost can fail and the episode's stay within their share of the time."""
    share = policy.max_overhead
    if share is None or math.isinf(share):
        return 0.0
    return max(0.0, (spent + cost) / share - cost - elapsed)


def _evaluate(name: str, wait: WaitStrategy | float | None, state: RetryCallState) -> float:
    if wait is None:
        return math.inf
    value = wait(state) if callable(wait) else wait
    if math.isnan(value) or value < 0:
        raise ValueError(f"{name} strategy {wait!r} returned {value!r}; it must return a number that is not negative")
    return float(value)
