"""The retry policy, in tenacity's terms. Nothing here sleeps or loops, and nothing here imports torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from numbers import Real
from typing import NamedTuple, TypeAlias

from tenacity import (
    AsyncRetrying,
    BaseRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_never,
    wait_exponential,
)

from compile_retry import _switches
from compile_retry._failures import is_transient

from .equality import meaning
from .reprs import as_call, as_expression

WaitStrategy: TypeAlias = Callable[[RetryCallState], float | timedelta]
StopStrategy: TypeAlias = Callable[[RetryCallState], bool]
RetryPredicate: TypeAlias = Callable[[RetryCallState], bool]

_IF_TRANSIENT = retry_if_exception(is_transient)

# Default of `max_overhead` if waits are in seconds only. It decides when the second attempt comes if the first one took
# long to fail; later on, waits that grow by a quarter cost far less than this share.
_DEFAULT_SHARE = 0.2

# tenacity passes its retry object to strategies. Here no retry object runs, so they all get this one.
_UNUSED_RETRYING = Retrying()


@dataclass(frozen=True, repr=False)
class RetryPolicy:
    """A policy for how long to hold off after a failed attempt, which failures to retry, and when to give up.

    Attributes:
        wait: Seconds until the next attempt: a tenacity wait strategy, a number, a ``timedelta``, or ``None``.
        wait_calls: The wait in calls of the decorated function: after a failure in call *c*, a wait of *w* calls makes
            call *c + w* an attempt. A fraction is rounded up, to at least one call. If both waits are given, the
            attempt is due at whichever comes first.
        stop: A tenacity stop strategy, applied to the episode's failed attempts and the seconds since its first
            failure.
        retry: A tenacity retry predicate that selects the failures to retry. By default :func:`is_transient` decides.
        clock: A callable that returns seconds and never runs backwards. Tests pass a fake clock.
        max_overhead: The share of the time since the first failure that failed attempts may take, those of the function
            and those of all decorated functions together, for example 0.05 for 5 %. The next attempt is delayed until
            one as long as the last would stay within this share. ``math.inf`` removes the limit, and the function
            neither waits for others nor delays them. The default is 0.2 if only ``wait`` is given: after a first
            attempt that took *c* seconds to fail, the next one comes after 9 *c* seconds or later. The default is
            ``math.inf`` if ``wait_calls`` is given, so that attempts come at exactly those calls.

    Raises:
        TypeError: A value has the wrong type, for example a number instead of a strategy.
        ValueError: A wait is negative or NaN, a wait in calls is less than one, both waits are ``None``, or the share
            is neither between 0 and 1 nor infinite.
    """

    wait: WaitStrategy | float | timedelta | None = wait_exponential(multiplier=15, exp_base=1.25, min=15, max=3600)
    wait_calls: WaitStrategy | float | None = None
    stop: StopStrategy = stop_never
    retry: RetryPredicate = _IF_TRANSIENT
    clock: Callable[[], float] = time.monotonic
    max_overhead: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.wait, timedelta):
            object.__setattr__(self, "wait", self.wait.total_seconds())
        _check_wait("wait", self.wait, at_least=0)
        _check_wait("wait_calls", self.wait_calls, at_least=1)
        if self.wait is None and self.wait_calls is None:
            raise ValueError(
                "wait and wait_calls are both None, so no retry would ever be due; give at least one of them"
            )
        _check_strategy("stop", self.stop, "a tenacity stop strategy such as stop_after_attempt(10) or stop_never")
        _check_strategy("retry", self.retry, "a tenacity retry predicate such as retry_if_exception_type(OSError)")
        if self.max_overhead is None:
            object.__setattr__(self, "max_overhead", _DEFAULT_SHARE if self.wait_calls is None else math.inf)
        else:
            _check_share("max_overhead", self.max_overhead)
        _check_strategy("clock", self.clock, "a callable that returns seconds, such as time.monotonic")

    @classmethod
    def every(
        cls,
        *,
        seconds: float | timedelta | None = None,
        calls: int | None = None,
        stop: StopStrategy = stop_never,
        retry: RetryPredicate = _IF_TRANSIENT,
        clock: Callable[[], float] = time.monotonic,
        max_overhead: float | None = None,
    ) -> RetryPolicy:
        """Make a policy with a constant wait in seconds, in calls, or whichever comes first.

        Args:
            seconds: The wait in seconds, or a ``timedelta``.
            calls: The wait in calls of the decorated function.
            stop: As in :class:`RetryPolicy`.
            retry: As in :class:`RetryPolicy`.
            clock: As in :class:`RetryPolicy`.
            max_overhead: As in :class:`RetryPolicy`. So failed attempts may take at most a fifth of the time by default
                if only `seconds` is given.

        Raises:
            TypeError: A value has the wrong type, or neither `seconds` nor `calls` is given.
            ValueError: `seconds` is negative or NaN, or `calls` is less than one.

        Example:
            >>> RetryPolicy.every(calls=100)
            RetryPolicy(wait=None, wait_calls=100)
        """
        if seconds is None and calls is None:
            raise TypeError("every() needs seconds, calls or both, such as every(calls=100)")
        in_seconds = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
        _check_wait("seconds", in_seconds, at_least=0)
        _check_wait("calls", calls, at_least=1)
        return cls(in_seconds, calls, stop, retry, clock, max_overhead)

    @classmethod
    def never(cls) -> RetryPolicy:
        """Make a policy that gives up after the first failed attempt.

        What has failed runs eagerly until :meth:`CompiledFunction.reset` or :meth:`CompiledFunction.retry_now`.
        """
        return cls(stop=stop_after_attempt(1))

    def __repr__(self) -> str:
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {
            field.name: arguments[field.name]
            for field in fields(self)
            if field.name == "wait" or arguments[field.name] is not field.default
        }
        if self.wait_calls is not None and self.max_overhead == math.inf:
            del given["max_overhead"]  # the default
        return as_call(type(self).__name__, given)

    @classmethod
    def of(cls, policy: object) -> RetryPolicy:
        """Convert an argument to a policy: a policy, a ``tenacity.Retrying``, or ``None`` for the default.

        The environment variables ``COMPILE_RETRY_WAIT`` and ``COMPILE_RETRY_MAX_OVERHEAD`` take precedence.
        """
        if policy is None:
            given = cls()
        elif isinstance(policy, cls):
            given = policy
        elif isinstance(policy, BaseRetrying) and not isinstance(policy, AsyncRetrying):
            given = cls(wait=policy.wait, stop=policy.stop, retry=policy.retry)
        else:
            raise TypeError(f"policy must be a RetryPolicy, a tenacity.Retrying or None, not {policy!r}")
        overrides = _switches.overrides()
        return replace(given, **overrides) if overrides else given  # type: ignore[arg-type]  # its other fields


def _check_wait(name: str, value: object, at_least: int) -> None:
    unit = "call" if at_least else "second"
    if value is None or (callable(value) and not isinstance(value, type)):
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        duration = "" if at_least else ", a timedelta"
        raise TypeError(
            f"{name} must be a tenacity wait strategy, a number of {unit}s{duration} or None, not {value!r}"
        )
    if math.isnan(value) or value < at_least:
        raise ValueError(f"{name} must be at least {at_least} {unit}{'s' * (not at_least)}, not {value!r}")


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number such as 0.05, math.inf or None, not {value!r}")
    if not (0 < float(value) <= 1 or value == math.inf):
        raise ValueError(
            f"{name} is a share of the time, so it must be above 0 and at most 1, not {value!r}; use 0.05 for 5 %,"
            " math.inf for no limit"
        )


def _check_strategy(name: str, value: object, what: str) -> None:
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be {what}, not {value!r}")


class Decision(NamedTuple):
    """A policy's decision after a failed attempt.

    Attributes:
        retry: Whether the failure is worth a retry.
        stop: Whether to give up.
        seconds: Seconds to hold off; infinite if that wait does not apply.
        calls: Calls to hold off; infinite if that wait does not apply.
        at_least: Minimum number of seconds to hold off in any case; 0 if the waits are longer.
        wait: The policy's own wait in seconds.
    """

    retry: bool
    stop: bool
    seconds: float
    calls: float
    at_least: float = 0.0
    wait: float = math.inf


def decide(
    policy: RetryPolicy,
    exc: BaseException,
    *,
    attempt: int,
    number: int,
    started: float,
    now: float,
    waited: float,
    at_least: float,
    retry: bool | None = None,
) -> Decision:
    """Evaluate the policy's strategies after a failed attempt.

    They are called as in tenacity's own loop: ``wait`` before ``stop``, so that ``stop_before_delay`` sees the coming
    wait. The state that they receive is dropped afterwards, because it holds the exception.

    Args:
        policy: The policy.
        exc: The root cause of the failure.
        attempt: Number of the failed attempt within its episode, from 1.
        number: The number that ``wait`` sees: the same, or more if other functions have failed for the same reason.
        started: The clock at the episode's first failure.
        now: The clock now.
        waited: Seconds of hold-off so far in this episode.
        at_least: Seconds to hold off at least, because of ``max_overhead``.
        retry: Whether the failure is worth a retry, if that is already known.
    """
    state = _state(exc, attempt, started, now)
    state.idle_for = waited
    try:
        if not (policy.retry(state) if retry is None else retry):
            return Decision(retry=False, stop=False, seconds=math.inf, calls=math.inf)
        state.attempt_number = number
        wait = _evaluate("wait", policy.wait, state)
        state.attempt_number = attempt
        calls = _evaluate("wait_calls", policy.wait_calls, state)
        if math.isinf(calls) and at_least <= wait:
            at_least = 0.0
        seconds = max(at_least, wait)
        state.upcoming_sleep = 0.0 if math.isinf(seconds) else seconds
        stop = bool(policy.stop(state))
        calls = max(1, calls if math.isinf(calls) else math.ceil(calls))
        return Decision(retry=True, stop=stop, seconds=seconds, calls=calls, at_least=at_least, wait=wait)
    finally:
        state.outcome = None


def is_worth_retry(policy: RetryPolicy, exc: BaseException, *, attempt: int, started: float, now: float) -> bool:
    """Evaluate the policy's predicate alone: see `decide`."""
    state = _state(exc, attempt, started, now)
    try:
        return bool(policy.retry(state))
    finally:
        state.outcome = None


def _state(exc: BaseException, attempt: int, started: float, now: float) -> RetryCallState:
    state = RetryCallState(_UNUSED_RETRYING, None, (), {})
    state.attempt_number = attempt
    state.start_time = started
    state.set_exception((type(exc), exc, None))
    state.outcome_timestamp = now
    return state


def pause(policy: RetryPolicy, elapsed: float, spent: float, cost: float) -> float:
    """Return the seconds until another failed attempt of this cost would stay within ``max_overhead``."""
    share = policy.max_overhead
    if share is None or math.isinf(share):
        return 0.0
    return max(0.0, (spent + cost) / share - cost - elapsed)


def policy_key(policy: RetryPolicy, *, of_objects: Callable[[object], Hashable] = id) -> Hashable:
    """Return equal keys for policies that mean the same. See `meaning`."""
    return tuple(meaning(getattr(policy, field.name), of_objects=of_objects) for field in fields(policy))


def _evaluate(name: str, wait: WaitStrategy | float | timedelta | None, state: RetryCallState) -> float:
    if wait is None:
        return math.inf
    value = wait(state) if callable(wait) else wait
    if isinstance(value, timedelta):
        if name != "wait":
            raise TypeError(
                f"{name} strategy {as_expression(wait)} returned {value!r}; it must return a number of calls"
            )
        value = value.total_seconds()
    if math.isnan(value) or value < 0:
        raise ValueError(
            f"{name} strategy {as_expression(wait)} returned {value!r}; it must return a non-negative number"
        )
    return float(value)
