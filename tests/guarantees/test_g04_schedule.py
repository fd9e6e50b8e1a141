"""G4: the schedule of attempts, by calls, by seconds and under threads, and its end."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from typing import Any

import pytest
import tenacity
import torch
from tenacity import stop_after_attempt, stop_after_delay, wait_exponential, wait_fixed

from compile_retry import CompiledFunction, CompileState, NextRetry, RetryPolicy, compile_with_fallback
from compile_retry.testing import FakeClock, record_events
from support import Compiler, first, full_disk, rows

X = torch.ones(3)


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def attempts_in(fn: CompiledFunction[..., Any], calls: int, x: torch.Tensor = X) -> list[int]:
    """Return the numbers of the next calls in which there was an attempt."""
    made = []
    for call in range(1, calls + 1):
        before = fn.stats.attempts
        torch.testing.assert_close(fn(x), x.sin())
        if fn.stats.attempts > before:
            made.append(call)
    return made


def test_the_schedule_of_a_cifar_step() -> None:
    """After two failures with waits of 2 and 4 calls, attempts occur in calls 1, 3 and 7, whatever the batch sizes."""
    compiler = Compiler(first(2))
    policy = RetryPolicy(wait=None, wait_calls=wait_exponential(multiplier=2, max=64), stop=stop_after_attempt(6))

    @compile_with_fallback(dynamic=True, policy=policy, backend=compiler)
    def train_step(
        model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, criterion: torch.nn.Module
    ) -> Any:
        outputs = model(inputs)
        return criterion(outputs, targets), outputs

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(3600, 10),
    )
    made = []
    for call in range(1, 13):
        batch = 6 if call % 4 == 0 else 8
        before = train_step.stats.attempts
        loss, outputs = train_step(
            model, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)), torch.nn.CrossEntropyLoss()
        )
        loss.backward()
        assert outputs.shape == (batch, 10)
        if train_step.stats.attempts > before:
            made.append(call)
    stats = train_step.stats
    assert made == [1, 3, 7]
    assert (stats.eager_calls, stats.compiled_calls, stats.mixed_calls) == (6, 6, 0)
    assert (stats.attempts, stats.failures, stats.recoveries) == (3, 2, 1)
    assert train_step.state is CompileState.COMPILED


@pytest.mark.parametrize(
    "arguments",
    [
        {"wait": 0},
        {"wait": 1},
        {},
        {"wait": 0, "max_overhead": 0.5},
        {"wait": None, "wait_calls": 1, "max_overhead": 0.05},
        {"wait": 100, "wait_calls": 3, "max_overhead": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("cost", [0.5, 3.0, 40.0])
def test_failed_attempts_take_no_more_than_their_share(arguments: dict[str, Any], cost: float) -> None:
    """Failed attempts stay within `max_overhead`, whatever the wait, and exhaust it if nothing else limits them."""
    clock, failed_at = FakeClock(), list[float]()

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        clock.advance(cost)
        failed_at.append(clock())
        raise full_disk()

    policy = RetryPolicy(clock=clock, **arguments)
    fn = compile_with_fallback(sine, backend=compiler, policy=policy)
    share = policy.max_overhead
    assert share is not None
    while len(failed_at) < 6:
        fn(X)
        clock.advance(cost / 10)
    for number, now in enumerate(failed_at[1:], 2):
        assert number * cost <= share * (now - failed_at[0]) + 1e-6
    if arguments.get("wait") in (0, None) and arguments:
        assert 6 * cost >= share * (failed_at[-1] - failed_at[0] - cost / 10) - 1e-6  # at most one call late
    assert fn.stats.compile_seconds == pytest.approx(6 * cost)


def test_a_share_of_the_time_is_announced() -> None:
    """If `max_overhead` delays a due retry, `next_retry` and the log say so; `retry_now()` lifts the delay."""
    clock = FakeClock()

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        clock.advance(10)
        raise full_disk()

    policy = RetryPolicy(wait=None, wait_calls=2, max_overhead=0.1, clock=clock)
    fn = compile_with_fallback(sine, backend=compiler, policy=policy)
    with record_events() as events:
        fn(X)
    assert fn.next_retry == NextRetry(calls=2, seconds=None, at_least=190, max_overhead=0.1)
    assert events[1].message.endswith("next attempt in 2 calls and 190 s (delayed by max_overhead=0.1)")
    clock.advance(100)
    assert attempts_in(fn, 5) == []
    assert fn.next_retry == NextRetry(calls=1, seconds=None, at_least=90, max_overhead=0.1)
    fn.retry_now()
    assert fn.next_retry == NextRetry(calls=1, seconds=None)
    assert attempts_in(fn, 1) == [1]
    clock.advance(500)
    assert attempts_in(fn, 3) == [2]


@pytest.mark.parametrize(
    ("cost", "arguments", "expected"),
    [
        (60, {"wait": 30}, "in 540 s (delayed by max_overhead=0.2)"),
        (60, {"wait": 540}, "in 540 s"),
        (60, {"wait": 600}, "in 600 s"),
        (60, {"wait": 30, "max_overhead": 0.5}, "in 180 s (delayed by max_overhead=0.5)"),
        (60, {"wait": 30, "max_overhead": math.inf}, "in 30 s"),
        (60, {"wait": 30, "wait_calls": 5}, "in 5 calls or in 30 s"),
        (60, {"wait": 30, "wait_calls": 5, "max_overhead": 0.2}, "in 540 s (delayed by max_overhead=0.2)"),
        (
            60,
            {"wait": 900, "wait_calls": 5, "max_overhead": 0.2},
            "in 5 calls and 540 s (delayed by max_overhead=0.2) or in 900 s",
        ),
        (0, {"wait": None, "wait_calls": 5, "max_overhead": 0.2}, "in 5 calls"),
    ],
)
def test_the_reason_for_a_long_wait(
    cost: float, arguments: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the share delays an attempt beyond the policy's wait, `next_retry` and the log line say so."""
    clock = FakeClock()

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        clock.advance(cost)
        raise full_disk()

    fn = compile_with_fallback(sine, backend=compiler, policy=RetryPolicy(clock=clock, **arguments))
    with caplog.at_level(logging.WARNING, logger="compile_retry"):
        fn(X)
    assert str(fn.next_retry) == expected
    assert caplog.messages[-1].endswith(f"; running eagerly, next attempt {expected}")
    clock.advance(1000)
    assert fn.next_retry is not None
    assert "delayed" not in str(fn.next_retry)


@pytest.mark.parametrize(("clock_per_call", "expected"), [(1.0, [1, 6, 11]), (4.0, [1, 4, 7, 10]), (0.0, [1, 6, 11])])
def test_calls_or_seconds_whichever_comes_first(clock_per_call: float, expected: list[int]) -> None:
    """With wait=10.0 and wait_calls=5, slow calls are retried by the clock and fast ones by their number."""
    clock = FakeClock()
    fn = compile_with_fallback(
        sine, backend=Compiler(lambda inputs: full_disk()), policy=RetryPolicy(wait=10.0, wait_calls=5, clock=clock)
    )
    made = []
    for call in range(1, 13):
        made += [call for _ in attempts_in(fn, 1)]
        clock.advance(clock_per_call)
    assert made == expected


def test_seconds_only() -> None:
    """Without wait_calls, no number of calls makes an attempt due early."""
    clock = FakeClock()
    fn = compile_with_fallback(sine, backend=Compiler(first(2)), policy=RetryPolicy(wait=10.0, clock=clock))
    assert attempts_in(fn, 200) == [1]
    assert fn.next_retry == NextRetry(calls=None, seconds=10.0)
    clock.advance(9.9)
    assert attempts_in(fn, 3) == []
    clock.advance(0.1)
    assert fn.next_retry == NextRetry(calls=None, seconds=0.0)
    assert attempts_in(fn, 3) == [1]
    clock.advance(10)
    assert attempts_in(fn, 3) == [1]
    assert fn.state is CompileState.COMPILED
    assert fn.next_retry is None


def test_after_hundreds_of_held_off_calls() -> None:
    """Attempts are due by calls and by time, exact to the call."""
    clock, compiler = FakeClock(), Compiler(first(3))
    fn = compile_with_fallback(sine, backend=compiler, policy=RetryPolicy(wait=100, wait_calls=500, clock=clock))
    assert attempts_in(fn, 900) == [1, 501]
    clock.advance(100)
    assert attempts_in(fn, 400) == [1]
    assert (fn.stats.calls, compiler.asked) == (1300, 3)


def test_next_retry_counts_down() -> None:
    """`calls` counts down to 1, the attempt itself."""
    fn = compile_with_fallback(sine, backend=Compiler(first(1)), policy=RetryPolicy(wait=None, wait_calls=3))
    assert (fn.state, fn.next_retry) == (CompileState.PENDING, None)
    left: list[int | None] = []
    for _ in range(3):
        fn(X)
        assert fn.next_retry is not None
        assert fn.next_retry.seconds is None
        left.append(fn.next_retry.calls)
    assert left == [3, 2, 1]
    fn(X)
    assert fn.next_retry is None


def test_giving_up_and_coming_back() -> None:
    """After `stop`, nothing is attempted until retry_now() or reset()."""
    compiler = Compiler(lambda inputs: full_disk())
    policy = RetryPolicy(wait=None, wait_calls=2, stop=stop_after_attempt(3))
    fn = compile_with_fallback(sine, backend=compiler, policy=policy)
    assert attempts_in(fn, 20) == [1, 3, 5]
    assert (fn.state, fn.next_retry) == (CompileState.GAVE_UP, None)

    fn.retry_now()
    assert (fn.state, fn.next_retry) == (CompileState.FALLBACK, NextRetry(calls=1, seconds=None))
    assert attempts_in(fn, 5) == [1]
    assert (fn.state, fn.stats.attempts) == (CompileState.GAVE_UP, 4)
    failure = fn.last_failure
    assert failure is not None
    assert failure.attempt == 4

    fn.reset()
    assert (fn.state, fn.last_failure) == (CompileState.PENDING, None)
    assert attempts_in(fn, 20) == [1, 3, 5]
    failure = fn.last_failure
    assert failure is not None
    assert failure.attempt == 3

    compiler.fails = lambda inputs: None
    fn.retry_now()
    assert attempts_in(fn, 5) == [1]
    assert fn.state is CompileState.COMPILED
    assert fn.stats.recoveries == 1


def test_stop_after_delay_counts_from_the_first_failure() -> None:
    """tenacity's stop strategies see the seconds since the episode began."""
    clock = FakeClock()
    policy = RetryPolicy(wait=10, stop=stop_after_delay(25), clock=clock)
    fn = compile_with_fallback(sine, backend=Compiler(lambda inputs: full_disk()), policy=policy)
    clock.advance(1000)
    for _ in range(10):
        fn(X)
        clock.advance(10)
    assert fn.state is CompileState.GAVE_UP
    assert fn.stats.attempts == 4


def test_a_new_episode_starts_afresh() -> None:
    """After a recovery, the backoff starts again with the first wait."""
    compiler = Compiler(first(3))
    fn = compile_with_fallback(
        sine, backend=compiler, policy=RetryPolicy(wait=None, wait_calls=wait_exponential(multiplier=2)), dynamic=False
    )
    assert attempts_in(fn, 15) == [1, 3, 7, 15]
    compiler.fails = first(1)
    y = torch.ones(4)
    assert attempts_in(fn, 4, y) == [1, 3]
    assert (fn.stats.failures, fn.stats.recoveries) == (4, 2)


def test_retry_now_forgets_no_failure() -> None:
    """After it, another shape's code is not the recovery."""
    fn = compile_with_fallback(sine, backend=Compiler(rows(4)), dynamic=False, policy=RetryPolicy(wait=10))
    fn(torch.ones(4))
    fn.retry_now()
    fn(X)
    assert (fn.stats.compiled_calls, fn.stats.recoveries, fn.state) == (1, 0, CompileState.FALLBACK)


def test_retry_now_when_nothing_is_held_off() -> None:
    """retry_now() changes nothing if nothing is held off."""
    fn = compile_with_fallback(sine, backend=Compiler())
    fn.retry_now()
    fn(X)
    fn.retry_now()
    assert attempts_in(fn, 3) == []
    assert fn.state is CompileState.COMPILED


def test_a_tenacity_retrying_is_a_policy() -> None:
    """The wait, stop and retry of a tenacity.Retrying are used, but it is never run."""
    clock = FakeClock()
    retrying = tenacity.Retrying(
        wait=wait_fixed(5), stop=stop_after_attempt(2), retry=tenacity.retry_if_exception_type(OSError)
    )
    fn = compile_with_fallback(sine, backend=Compiler(lambda inputs: full_disk()), policy=retrying)
    assert (fn.policy.wait, fn.policy.stop, fn.policy.retry) == (retrying.wait, retrying.stop, retrying.retry)
    timed = dataclasses.replace(fn.policy, clock=clock)
    fn = compile_with_fallback(sine, backend=Compiler(lambda inputs: full_disk()), policy=timed)
    assert attempts_in(fn, 4) == [1]
    clock.advance(5)
    assert attempts_in(fn, 4) == [1]
    assert fn.state is CompileState.GAVE_UP


def test_new_shapes_are_not_attempted_during_hold_off() -> None:
    """New shapes are held off too, with and without compiled code."""
    clock = FakeClock()
    compiler = Compiler(rows(3))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=10, clock=clock))
    fn(torch.ones(3))
    for n in range(4, 80):
        fn(torch.ones(n))
    assert (compiler.asked, fn.stats.eager_calls) == (1, 77)
    clock.advance(10)
    fn(torch.ones(4))
    assert (compiler.asked, fn.stats.compiled_calls) == (2, 1)
    fn(torch.ones(3))
    assert (compiler.asked, fn.stats.failures) == (3, 2)
    for n in range(5, 20):
        fn(torch.ones(n))
        fn(torch.ones(4))
    assert compiler.asked == 3
    assert compiler.ran == 16


@pytest.mark.parametrize("compiled_before", [False, True])
def test_one_attempt_per_due_moment_under_eight_threads(compiled_before: bool) -> None:
    """At a due moment, only one thread attempts, however many call."""
    clock, compiler = FakeClock(), Compiler(rows(3))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=10, clock=clock))
    if compiled_before:
        fn(torch.ones(2))
    start, done, errors = threading.Barrier(9), threading.Barrier(9), list[BaseException]()

    def work() -> None:
        try:
            for _ in range(6):
                start.wait()
                for _ in range(5):
                    torch.testing.assert_close(fn(X), X.sin())
                done.wait()
        except BaseException as exc:
            errors.append(exc)
            start.abort()
            done.abort()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    asked = []
    for _ in range(6):
        before = compiler.asked
        start.wait()
        done.wait()
        asked.append(compiler.asked - before)
        clock.advance(10)
    for thread in threads:
        thread.join()
    assert not errors
    assert asked == [1] * 6
    stats = fn.stats
    assert stats.calls == stats.eager_calls + stats.compiled_calls == 240 + compiled_before
    assert (stats.failures, stats.attempts) == (6, 6 + compiled_before)


@pytest.mark.parametrize("action", ["retry_now", "reset"])
def test_another_thread_acts_at_any_moment(action: str) -> None:
    """The function recovers, even if retry_now() or reset() comes between any two decisions."""
    for moment in range(1, 40):
        fn, compiler = during_which_another_thread_acts(action, moment)
        assert fn.state is CompileState.COMPILED, moment
        assert (fn.stats.calls, fn.stats.failures, fn.stats.attempts) == (8, 2, compiler.asked)


def during_which_another_thread_acts(action: str, moment: int) -> tuple[CompiledFunction[..., Any], Compiler]:
    """Make eight calls, one second apart; two attempts fail. At one reading of the clock, another thread acts."""
    readings, now = 0, 0.0

    def clock() -> float:
        nonlocal readings
        readings += 1
        if readings == moment:
            getattr(fn, action)()
        return now

    compiler = Compiler(first(2))
    fn = compile_with_fallback(sine, backend=compiler, policy=RetryPolicy(wait=1, max_overhead=1, clock=clock))
    for _ in range(8):
        torch.testing.assert_close(fn(X), X.sin())
        now += 1
    return fn, compiler


@pytest.mark.parametrize("action", ["retry_now", "reset"])
def test_a_strategy_during_which_another_thread_acts(action: str) -> None:
    """If the episode changes while the strategy runs, its answer is discarded, and it is evaluated again."""
    asked: list[int] = []

    def wait(retry_state: tenacity.RetryCallState) -> float:
        asked.append(retry_state.attempt_number)
        if len(asked) == 2:
            getattr(fn, action)()
        return 2.0

    fn = compile_with_fallback(sine, backend=Compiler(first(2)), policy=RetryPolicy(wait=None, wait_calls=wait))
    assert attempts_in(fn, 8) == [1, 3, 5]
    assert asked == [1, 2, 1 if action == "reset" else 2]
    assert fn.state is CompileState.COMPILED


def test_an_attempt_fails_while_another_frame_is_traced() -> None:
    """A call from within Dynamo's tracing fails, and the frame being traced is then held off."""
    compiler = Compiler(rows(5))

    def call_another_shape() -> float:
        fn(torch.ones(5))
        return 2.0

    factor = torch._dynamo.assume_constant_result(call_another_shape)

    def step(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * (factor() if x.shape[0] == 3 else 1.0)

    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=20))
    torch.testing.assert_close(fn(X), X.sin() * 2)
    assert (compiler.asked, fn.stats.failures, fn.state) == (1, 1, CompileState.FALLBACK)
