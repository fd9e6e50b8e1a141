"""RetryPolicy: the arguments that it accepts, and the calls of tenacity's strategies."""

from __future__ import annotations

import functools
import logging
import math
import random
from datetime import timedelta
from typing import Any

import pytest
import tenacity
import torch
from hypothesis import given
from hypothesis import strategies as st
from tenacity import RetryCallState

from compile_retry import CompileState, NextRetry, RetryPolicy, compile_with_fallback
from compile_retry._schedule.breaker import Breaker
from compile_retry.testing import FakeClock
from support import Compiler, full_disk

X = torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"wait": -1}, ValueError, "wait must be at least 0 seconds, not -1"),
        ({"wait": math.nan}, ValueError, "wait must be at least 0 seconds, not nan"),
        ({"wait": timedelta(seconds=-1)}, ValueError, "wait must be at least 0 seconds, not -1.0"),
        (
            {"wait": "30"},
            TypeError,
            "wait must be a tenacity wait strategy, a number of seconds, a timedelta or None, n",
        ),
        ({"wait": True}, TypeError, "not True"),
        ({"wait": tenacity.wait_fixed}, TypeError, "wait must be"),
        ({"wait_calls": 0}, ValueError, "wait_calls must be at least 1 call, not 0"),
        ({"wait_calls": 0.5}, ValueError, "wait_calls must be at least 1 call"),
        ({"wait_calls": math.nan}, ValueError, "wait_calls must be at least 1 call"),
        ({"wait_calls": timedelta(3)}, TypeError, r"a number of calls or None, not datetime\.timedelta\(days=3\)"),
        ({"wait_calls": []}, TypeError, "wait_calls must be a tenacity wait strategy, a number of calls or None"),
        ({"wait": None}, ValueError, "wait and wait_calls are both None"),
        ({"stop": 5}, TypeError, r"stop must be a tenacity stop strategy such as stop_after_attempt\(10\)"),
        ({"stop": None}, TypeError, "stop must be"),
        ({"stop": tenacity.stop_after_attempt}, TypeError, "stop must be"),
        ({"retry": OSError}, TypeError, "retry must be a tenacity retry predicate"),
        ({"retry": False}, TypeError, "retry must be"),
        ({"clock": 3.0}, TypeError, "clock must be a callable"),
        ({"max_overhead": 0}, ValueError, "so it must be above 0 and at most 1, not 0; use 0.05 for"),
        ({"max_overhead": 5}, ValueError, "max_overhead is a share of the time, .*, not 5; use 0.05 for 5 %, math.inf"),
        ({"max_overhead": -math.inf}, ValueError, "not -inf"),
        ({"max_overhead": math.nan}, ValueError, "not nan"),
        ({"max_overhead": "5 %"}, TypeError, "max_overhead must be a number such as 0.05, math.inf or None, not '5 %'"),
        ({"max_overhead": True}, TypeError, "not True"),
    ],
)
def test_invalid_values(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """Invalid arguments raise an error with the argument, the value and what is allowed."""
    with pytest.raises(error, match=message):
        RetryPolicy(**arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 0.2),
        ({"wait": 10}, 0.2),
        ({"wait_calls": 10}, math.inf),
        ({"wait": None, "wait_calls": 10}, math.inf),
        ({"wait": None, "wait_calls": 10, "max_overhead": 0.5}, 0.5),
        ({"max_overhead": math.inf}, math.inf),
        ({"max_overhead": 1}, 1),
        ({"max_overhead": None}, 0.2),
    ],
)
def test_the_default_overhead(arguments: dict[str, Any], expected: float) -> None:
    """Waits in seconds are limited to a fifth of the time by default; waits in calls are not limited."""
    assert RetryPolicy(**arguments).max_overhead == expected


def test_valid_values() -> None:
    """Numbers, infinities, strategies, sums of strategies and plain callables are accepted."""
    cases: list[dict[str, Any]] = [
        {},
        {"wait": 0},
        {"wait": 1.5, "wait_calls": 7},
        {"wait": math.inf},
        {"wait": None, "wait_calls": 1.5},
        {
            "wait": tenacity.wait_fixed(1) + tenacity.wait_random(0, 1),
            "stop": tenacity.stop_after_attempt(3) | tenacity.stop_after_delay(9),
        },
        {"wait": lambda state: 3.0, "stop": lambda state: False, "retry": lambda state: True},
    ]
    for arguments in cases:
        policy = RetryPolicy(**arguments)
        assert policy == RetryPolicy(**arguments)
    with pytest.raises(AttributeError):
        RetryPolicy().wait = 3  # type: ignore[misc]  # frozen


def test_durations() -> None:
    """A timedelta is taken wherever seconds are: as a wait, from a strategy, and by the fake clock."""
    clock = FakeClock(timedelta(minutes=1))
    clock.advance(timedelta(milliseconds=500))
    assert clock() == 60.5
    with pytest.raises(ValueError, match=r"seconds must not be negative, not datetime\.timedelta\("):
        clock.advance(timedelta(-1))
    half_a_minute = timedelta(seconds=30)
    assert RetryPolicy(wait=half_a_minute) == RetryPolicy(wait=30) == RetryPolicy.every(seconds=half_a_minute)
    for wait in (half_a_minute, lambda state: half_a_minute):
        policy = RetryPolicy(wait=wait, clock=clock)
        fn = compile_with_fallback(lambda x: x.sin(), backend=Compiler(lambda inputs: full_disk()), policy=policy)
        fn(X)
        assert fn.next_retry == NextRetry(None, 30.0)


EVALUATED = [
    "RetryPolicy(wait=30, max_overhead=0.2)",
    "RetryPolicy(wait=0.5, max_overhead=math.inf)",
    "RetryPolicy(wait=None, wait_calls=100)",
    "RetryPolicy(wait=600, wait_calls=wait_exponential(multiplier=50, max=5000), max_overhead=0.05)",
    "RetryPolicy(wait=wait_exponential(multiplier=15, max=3600, exp_base=1.25, min=15), max_overhead=0.2)",
    "RetryPolicy(wait=wait_exponential(), stop=stop_after_attempt(10), max_overhead=0.2)",
    "RetryPolicy(wait=wait_chain(wait_fixed(1), wait_fixed(2)), max_overhead=0.2)",
    "RetryPolicy(wait=wait_combine(wait_fixed(3), wait_random(max=2)), max_overhead=0.2)",
    "RetryPolicy(wait=wait_none(), stop=stop_any(stop_after_delay(60), stop_after_attempt(3)), max_overhead=1)",
    "RetryPolicy(wait=1, retry=retry_if_exception_type(OSError), max_overhead=0.2)",
    "RetryPolicy(wait=1, retry=retry_if_exception_type((OSError, MemoryError)), max_overhead=0.2)",
    "RetryPolicy(wait=1, retry=retry_if_exception_type((OSError,)), max_overhead=0.2)",
    "RetryPolicy(wait=1, retry=retry_if_exception(bool), max_overhead=0.2)",
    "RetryPolicy(wait=1, retry=retry_if_exception_message(message='full'), max_overhead=0.2)",
    "RetryPolicy(wait=1, retry=retry_always, max_overhead=0.2)",
]


@pytest.mark.parametrize("expression", EVALUATED)
def test_repr(expression: str) -> None:
    """It is the call of the constructor, strategies of tenacity's included, without what has its default value."""
    names = {**vars(tenacity), **vars(tenacity.wait), "retry_always": tenacity.retry_always}
    policy = eval(expression, {"RetryPolicy": RetryPolicy, "math": math, **names})
    assert repr(policy) == expression


def test_repr_of_what_is_not_tenacitys() -> None:
    """Functions have their name, objects without a repr their class, and nothing an address."""

    class Patient:
        def __init__(self, seconds: float, *more: float) -> None:
            self.waits = seconds

        def __call__(self, state: RetryCallState) -> float:
            return self.waits

    def soon(state: RetryCallState) -> float:
        return 1.0

    def later(state: RetryCallState, seconds: float) -> float:
        return seconds

    class Unknown:
        __signature__ = "not in Python"

        def __call__(self, state: RetryCallState) -> float:
            return 1.0

    class Several:
        def __init__(self, *several: float) -> None:
            self.several = 3

        def __call__(self, state: RetryCallState) -> bool:
            return False

    policy = RetryPolicy(wait=Patient(3), wait_calls=soon, stop=Several(), clock=FakeClock(3), max_overhead=0.5)
    assert repr(policy) == (
        "RetryPolicy(wait=Patient(...), wait_calls=soon, stop=Several(...), clock=FakeClock(3), max_overhead=0.5)"
    )
    assert "<lambda>" in repr(RetryPolicy(wait=lambda state: 1.0))
    assert repr(RetryPolicy(wait=Unknown())) == "RetryPolicy(wait=Unknown(...), max_overhead=0.2)"
    partial = functools.partial(later, seconds=3)
    assert repr(RetryPolicy(wait=partial)) == "RetryPolicy(wait=partial(later, seconds=3), max_overhead=0.2)"


def test_shorthands() -> None:
    """For a constant wait, in seconds, calls or both; and for no retry at all."""
    clock = FakeClock()
    assert RetryPolicy.every(seconds=30) == RetryPolicy(wait=30)
    assert RetryPolicy.every(calls=100) == RetryPolicy(wait=None, wait_calls=100)
    assert RetryPolicy.every(seconds=30, calls=100) == RetryPolicy(wait=30, wait_calls=100)
    others: dict[str, Any] = {"stop": tenacity.stop_after_attempt(3), "clock": clock, "max_overhead": 0.1}
    others["retry"] = tenacity.retry_if_exception_type(OSError)
    assert RetryPolicy.every(seconds=30, **others) == RetryPolicy(wait=30, **others)
    fn = compile_with_fallback(
        lambda x: x.sin(), backend=Compiler(lambda inputs: full_disk()), policy=RetryPolicy.never()
    )
    for _ in range(3):
        fn(X)
    assert (fn.stats.attempts, fn.stats.eager_calls, fn.state) == (1, 3, CompileState.GAVE_UP)
    fn.retry_now()
    fn(X)
    assert (fn.stats.attempts, fn.state) == (2, CompileState.GAVE_UP)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, r"every\(\) needs seconds, calls or both, such as every\(calls=100\)"),
        ({"seconds": -1}, ValueError, "^seconds must be at least 0 seconds, not -1"),
        ({"seconds": "soon"}, TypeError, "^seconds must be"),
        ({"calls": 0}, ValueError, "^calls must be at least 1 call, not 0"),
        ({"calls": 5, "stop": 3}, TypeError, "stop must be"),
    ],
)
def test_wrong_shorthands(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """They name their own arguments."""
    with pytest.raises(error, match=message):
        RetryPolicy.every(**arguments)


@pytest.mark.parametrize("policy", [tenacity.AsyncRetrying(), "30s", tenacity.wait_fixed(3)])
def test_invalid_policies(policy: Any) -> None:
    """A policy must be a RetryPolicy, a Retrying or None."""
    with pytest.raises(TypeError, match=r"policy must be a RetryPolicy, a tenacity\.Retrying or None"):
        compile_with_fallback(lambda x: x, policy=policy)


def test_the_default() -> None:
    """By default the waits are 15 s growing by a quarter up to an hour, forever, without drawing random numbers."""
    clock = FakeClock()
    fn = compile_with_fallback(
        lambda x: x.sin(), backend=Compiler(lambda i: full_disk()), policy=RetryPolicy(clock=clock)
    )
    waits, state = [], random.getstate()
    for _ in range(28):
        fn(X)
        assert fn.next_retry is not None
        assert fn.next_retry.calls is None
        waits.append(fn.next_retry.seconds)
        clock.advance(fn.next_retry.seconds or 0)
    assert waits == pytest.approx([min(15 * 1.25**n, 3600) for n in range(28)])
    assert waits[:5] == [15, 18.75, 23.4375, 29.296875, 36.62109375]
    assert waits[-2:] == [3600, 3600]
    assert random.getstate() == state


COMPILED_STEP, EAGER_STEP, COMPILE = 1.5, 3.0, 30.0


def day(policy: RetryPolicy, clock: FakeClock, *, length: float, repair: float, cost: float) -> tuple[float, float]:
    """Return the time of a run divided by the ideal's, and the share of its time in failed attempts.

    The compiler is broken until the repair, and takes that long to fail. The ideal knows when: it compiles then.
    """
    breaker, spent, code = Breaker(policy), 0.0, False
    before = math.ceil(min(repair, length) / EAGER_STEP)
    after = math.ceil(max(0.0, length - before * EAGER_STEP - COMPILE) / COMPILED_STEP)
    for call in range(1, before + after + 1):
        if not code and (breaker.episode is None or breaker.let_through(call)):
            began = clock()
            if code := began >= repair:
                clock.advance(COMPILE)
            else:
                clock.advance(cost)
                spent += cost
                breaker.failed(OSError(), call, began, cost)
            breaker.probe_ended()
        clock.advance(COMPILED_STEP if code else EAGER_STEP)
    ideal = before * EAGER_STEP + after * COMPILED_STEP + (COMPILE if after else 0)
    return clock() / ideal, spent / clock()


DAYS = [(length, cost) for length in (600.0, 3600.0, 28800.0) for cost in (1.0, 10.0, 60.0) if cost <= length / 60]


@pytest.mark.parametrize("broken", [0.1, 0.5])
@pytest.mark.parametrize(("length", "cost"), DAYS)
def test_a_bad_day_with_the_default(length: float, cost: float, broken: float) -> None:
    """At most a tenth behind an ideal that knows the repair, where an attempt takes at most a sixtieth of the day."""
    clock = FakeClock()
    behind, _ = day(RetryPolicy(clock=clock), clock, length=length, repair=broken * length, cost=cost)
    assert 1 < behind <= 1.10


@pytest.mark.parametrize("cost", [1.0, 10.0, 60.0])
def test_a_day_without_a_repair(cost: float) -> None:
    """With the default, failed attempts take at most 6 % of eight hours; with a constant wait, at most a fifth."""
    clocks = FakeClock(), FakeClock()
    behind, spent = day(RetryPolicy(clock=clocks[0]), clocks[0], length=28800, repair=math.inf, cost=cost)
    _, often = day(RetryPolicy(wait=30, clock=clocks[1]), clocks[1], length=28800, repair=math.inf, cost=cost)
    assert 1 < behind <= 1.06
    assert spent < often <= 0.2


def test_strategies_see_what_tenacity_would_show_them() -> None:
    """Strategies see the attempt number, root cause, elapsed time and coming wait, but none of the arguments."""
    seen: list[tuple[Any, ...]] = []
    clock = FakeClock(100)

    class Wait(tenacity.wait.wait_base):  # wait_chain's annotations accept no plain functions
        def __call__(self, retry_state: RetryCallState) -> float:
            assert retry_state.outcome is not None
            exc = repr(retry_state.outcome.exception())
            seen.append(("wait", retry_state.attempt_number, exc, retry_state.seconds_since_start))
            assert (retry_state.args, retry_state.kwargs, retry_state.fn) == ((), {}, None)
            return 5.0

    def stop(retry_state: RetryCallState) -> bool:
        seen.append(("stop", retry_state.upcoming_sleep, retry_state.idle_for))
        return False

    states: list[RetryCallState] = []

    def retry(retry_state: RetryCallState) -> bool:
        states.append(retry_state)
        return True

    policy = RetryPolicy(wait=tenacity.wait_chain(Wait(), Wait()), stop=stop, retry=retry, clock=clock)
    fn = compile_with_fallback(lambda x: x.sin(), backend=Compiler(lambda inputs: full_disk()), policy=policy)
    fn(X)
    clock.advance(7)
    fn(X)
    disk = repr(full_disk())
    assert seen == [("wait", 1, disk, 0.0), ("stop", 5.0, 0.0), ("wait", 2, disk, 7.0), ("stop", 5.0, 7.0)]
    assert [state.outcome for state in states] == [None, None]


def test_stop_before_delay() -> None:
    """Strategies that look at the coming wait see it."""
    clock = FakeClock()
    policy = RetryPolicy(wait=10, stop=tenacity.stop_before_delay(25), clock=clock)
    fn = compile_with_fallback(lambda x: x.sin(), backend=Compiler(lambda inputs: full_disk()), policy=policy)
    for _ in range(5):
        fn(X)
        clock.advance(10)
    assert (fn.stats.attempts, fn.state) == (3, CompileState.GAVE_UP)


def test_the_retry_predicate_decides() -> None:
    """A failure that the predicate refuses is permanent, whatever its kind."""
    policy = RetryPolicy(wait=None, wait_calls=1, retry=tenacity.retry_if_not_exception_type(OSError))
    fn = compile_with_fallback(lambda x: x.sin(), backend=Compiler(lambda inputs: full_disk()), policy=policy)
    for _ in range(4):
        fn(X)
    assert (fn.stats.failures, fn.state) == (1, CompileState.GAVE_UP)


@pytest.mark.parametrize(
    "broken",
    [
        {"wait": lambda state: math.nan},
        {"wait": lambda state: -1.0},
        {"wait": None, "wait_calls": lambda state: "soon"},
        {"wait": None, "wait_calls": lambda state: timedelta(seconds=3)},
        {"stop": lambda state: 1 / 0},
        {"retry": lambda state: state.nothing},
    ],
)
def test_a_strategy_that_fails(broken: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A strategy that raises or returns nonsense breaks no step: it is logged, and no further attempt is made."""
    fn = compile_with_fallback(
        lambda x: x.sin(), backend=Compiler(lambda inputs: full_disk()), policy=RetryPolicy(**broken)
    )
    with caplog.at_level(logging.ERROR, logger="compile_retry"):
        for _ in range(4):
            torch.testing.assert_close(fn(X), X.sin())
    assert (fn.stats.failures, fn.state) == (1, CompileState.GAVE_UP)
    assert sum("the retry policy raised" in r.message for r in caplog.records) == 1


def test_next_retry_in_words() -> None:
    """NextRetry reads well in log lines."""
    assert str(NextRetry(1, None)) == "in 1 call"
    assert str(NextRetry(5, 30.0)) == "in 5 calls or in 30 s"
    assert str(NextRetry(None, 0.25)) == "in 0.25 s"
    assert str(NextRetry(None, 3599.99)) == "in 3600 s"
    assert str(NextRetry(None, 540.0, 540.0, 0.2)) == "in 540 s (delayed by max_overhead=0.2)"
    assert str(NextRetry(1, None, 540.0, 0.2)) == "in 1 call and 540 s (delayed by max_overhead=0.2)"
    assert str(NextRetry(1, 0.0)) == "in 1 call or in 0 s"


@given(
    waits=st.lists(st.floats(min_value=0, max_value=50), min_size=1, max_size=6),
    calls=st.integers(min_value=1, max_value=120),
    fails=st.integers(min_value=0, max_value=6),
)
def test_the_schedule_follows_the_model(waits: list[float], calls: int, fails: int) -> None:
    """Attempts occur exactly where a reference model of the schedule puts them."""
    policy = RetryPolicy(wait=None, wait_calls=lambda s: waits[min(s.attempt_number, len(waits)) - 1])
    breaker, made, left = Breaker(policy), [], fails
    for call in range(1, calls + 1):
        if breaker.episode is None or breaker.let_through(call):
            made.append(call)
            breaker.probe_ended()
            if left == 0:
                breaker.end()
                break
            left -= 1
            breaker.failed(OSError(), call, 0.0, 0.0)
    expected, due = [], 1
    for attempt in range(fails + 1):
        if due > calls:
            break
        expected.append(due)
        due += max(1, math.ceil(waits[min(attempt + 1, len(waits)) - 1]))
    assert made == expected
