"""G4, G6: all functions together: their share of the time, their due moments, and who tries first."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tenacity import stop_after_attempt

from compile_retry import CompiledFunction, CompileState, RetryPolicy, compile_with_fallback
from compile_retry.events import AttemptPostponed, Recovered
from compile_retry.testing import FakeClock, record_events
from support import full_disk

X = torch.ones(3)


class SlowCompiler:
    """A compiler that takes time, and fails while it is broken.

    Attributes:
        cost: Seconds per run.
        broken: Whether it fails, or a function that decides for the name of the decorated function.
        runs: The clock and the name at the end of each run.
        spent: Seconds that failed runs have taken.
    """

    def __init__(self, clock: FakeClock, cost: float) -> None:
        self.clock, self.cost = clock, cost
        self.broken: bool | Callable[[str], Exception | None] = True
        self.runs: list[tuple[float, str]] = []
        self.spent = 0.0

    def backend(self, name: str) -> Callable[..., Any]:
        def compiler(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            self.clock.advance(self.cost)
            self.runs.append((self.clock(), name))
            error = self.broken(name) if callable(self.broken) else full_disk() if self.broken else None
            if error is not None:
                self.spent += self.cost
                raise error
            return graph_module.forward

        return compiler


def decorated(compiler: SlowCompiler, number: int, **policy: Any) -> list[CompiledFunction[..., Any]]:
    """Decorate functions of different names, which do not share their code."""

    def step(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    policy = {"wait": RetryPolicy().wait, "clock": compiler.clock, **policy}
    return [
        compile_with_fallback(step, name=name, backend=compiler.backend(name), policy=RetryPolicy(**policy))
        for name in (f"step{i}" for i in range(number))
    ]


def seconds_left(function: CompiledFunction[..., Any]) -> float:
    """Return the seconds until the function's next attempt."""
    assert function.next_retry is not None
    assert function.next_retry.seconds is not None
    return function.next_retry.seconds


def call_all(functions: list[CompiledFunction[..., Any]]) -> None:
    for function in functions:
        torch.testing.assert_close(function(X), X.sin())


def run(functions: list[CompiledFunction[..., Any]], clock: FakeClock, until: float, pause: float) -> None:
    """Call all functions in turn, with a pause after each round, until the clock shows this time."""
    while clock() < until:
        call_all(functions)
        clock.advance(pause)


@pytest.mark.parametrize("number", [2, 20])
@pytest.mark.parametrize("cost", [1.0, 10.0])
def test_failed_attempts_of_all_functions_keep_to_the_share(number: int, cost: float) -> None:
    """At the end of each failed attempt, all together have taken at most a fifth of the time since the first."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, cost)
    functions = decorated(compiler, number)
    run(functions, clock, until=3600, pause=5)
    first = compiler.runs[0][0]
    for spent, (time, _) in enumerate(compiler.runs[1:], start=2):
        assert spent * cost <= 0.2 * (time - first + cost) + 1e-3
    assert len({name for _, name in compiler.runs}) == min(number, len(compiler.runs))
    assert compiler.spent <= 0.2 * 3600


def test_a_broken_compiler_is_tried_by_one_of_a_hundred_functions() -> None:
    """Each due moment has one attempt. After the repair all functions return at the same one."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 60.0)
    functions = decorated(compiler, 100)
    run(functions, clock, until=8 * 3600, pause=60)
    assert compiler.spent <= 0.06 * 8 * 3600
    compiler.broken, compiler.cost = False, 1.0
    clock.advance(min(seconds_left(fn) or 0.0 for fn in functions if fn.next_retry is not None))
    call_all(functions)  # those that are called before the one that tries run eagerly once more
    call_all(functions)
    assert all(fn.state is CompileState.COMPILED for fn in functions)
    assert all(fn.stats.attempts == fn.stats.failures + 1 for fn in functions)


@pytest.mark.parametrize(("cost", "attempts"), [(0.5, 8), (0.9, 5), (1.0, 1)])
def test_quick_failures_are_free_at_first(cost: float, attempts: int) -> None:
    """They delay nobody until five seconds are spent, or eight functions have failed for the same reason."""
    compiler = SlowCompiler(FakeClock(), cost)
    call_all(decorated(compiler, 20))
    assert len(compiler.runs) == attempts


def test_functions_that_fail_for_the_same_reason_share_their_due_moments() -> None:
    """The one that has not been tried for longest tries for both, and its success makes the other due at once."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 0.0)
    a, b = functions = decorated(compiler, 2, wait=10)
    call_all([a])
    clock.advance(4)
    call_all([b])
    assert seconds_left(a) == seconds_left(b) == 6
    clock.advance(6)
    call_all([b, a, b])  # b gives way to a, which has not been tried for longer
    assert (a.stats.failures, b.stats.failures) == (2, 1)
    assert seconds_left(a) == seconds_left(b) == 10
    compiler.broken = False
    clock.advance(10)
    call_all([a, b, a])
    assert [fn.state for fn in functions] == [CompileState.COMPILED] * 2
    assert (a.stats.attempts, b.stats.attempts) == (3, 2)


def test_a_function_that_is_not_called_any_more_holds_up_nobody() -> None:
    """Functions give way to it for one call."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 0.0)
    gone, step = decorated(compiler, 2, wait=10)
    call_all([gone])
    clock.advance(1)
    call_all([step])
    compiler.broken = False
    clock.advance(10)
    call_all([step])
    assert step.stats.attempts == 1
    call_all([step])
    assert step.state is CompileState.COMPILED


def test_while_one_function_tries_the_others_wait() -> None:
    """Its attempt may take longer than a call, and the others may be called in other threads meanwhile."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 0.0)
    a, b = decorated(compiler, 2, wait=10)
    call_all([a, b])
    clock.advance(10)
    tries, goes_on = threading.Event(), threading.Event()

    def slowly(name: str) -> Exception | None:
        tries.set()
        goes_on.wait(30)
        return None

    compiler.broken = slowly
    thread = threading.Thread(target=call_all, args=([a],))
    thread.start()
    try:
        assert tries.wait(30)
        call_all([b] * 3)
        assert b.stats.attempts == 1
    finally:
        goes_on.set()
        thread.join()
    call_all([b])
    assert (a.state, b.state) == (CompileState.COMPILED, CompileState.COMPILED)


def test_a_kept_exception_of_the_program_holds_up_nobody() -> None:
    """A call that tries and raises is over, although its traceback, which a notebook keeps, still refers to it."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 0.0)
    wrong = False

    def raises(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        if wrong:
            raise KeyError("the program's own")
        return y

    a = compile_with_fallback(raises, backend=compiler.backend("a"), policy=RetryPolicy(wait=10, clock=clock))
    (b,) = decorated(compiler, 1, wait=10)
    call_all([a, b])
    clock.advance(10)
    wrong = True
    with pytest.raises(KeyError) as kept:
        a(X)
    wrong, compiler.broken = False, False
    call_all([a, b, a, b])
    assert kept.tb is not None
    assert [fn.state for fn in (a, b)] == [CompileState.COMPILED] * 2


def test_an_attempt_in_progress_is_not_put_off() -> None:
    """Another function, told to retry now, fails while it runs, for the same reason. It still counts as a recovery."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 0.0)
    a, b = decorated(compiler, 2, wait=10)
    call_all([a, b])

    def fails(name: str) -> Exception | None:
        if name == "step1":
            return full_disk()
        b.retry_now()
        call_all([b])
        return None

    compiler.broken = fails
    clock.advance(10)
    call_all([a])
    assert (a.state, a.stats.recoveries) == (CompileState.COMPILED, 1)
    assert b.stats.failures == 2


def test_a_clock_that_cannot_be_hashed() -> None:
    """It is told apart by its identity."""

    @dataclass
    class Clock:
        time: float = 0.0

        def __call__(self) -> float:
            return self.time

    clock = Clock()
    policy = RetryPolicy(wait=10, clock=clock)

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        clock.time += 10
        raise full_disk()

    a, b = (compile_with_fallback(lambda x: x.sin(), name=name, backend=compiler, policy=policy) for name in "ab")
    call_all([a, b])
    assert (a.stats.failures, b.stats.failures) == (1, 0)


def test_a_success_makes_the_others_due_at_once() -> None:
    """Those that failed for the same reason need not wait for their due moment. Those that failed for another do."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 0.0)
    compiler.broken = lambda name: MemoryError("no memory") if name == "step2" else full_disk()
    a, _, other = functions = decorated(compiler, 3, wait=10)
    call_all(functions)
    compiler.broken = False
    a.retry_now()
    call_all(functions)
    assert [fn.state for fn in functions] == [CompileState.COMPILED, CompileState.COMPILED, CompileState.FALLBACK]
    assert seconds_left(other) == 10


def test_after_a_success_the_others_do_not_wait_for_their_own_share() -> None:
    """A function that has failed just now, and long, tries at once if another one succeeds."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 10.0)
    a, b = decorated(compiler, 2)
    call_all([a])
    clock.advance(90)
    call_all([b])
    clock.advance(seconds_left(a))
    assert seconds_left(b) > 0
    compiler.broken = False
    call_all([a, b])
    assert [fn.state for fn in (a, b)] == [CompileState.COMPILED] * 2


def test_other_reasons_have_due_moments_of_their_own() -> None:
    """A function that keeps failing for its own reason does not delay one that failed for another."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 0.0)
    compiler.broken = lambda name: full_disk() if name == "step0" else MemoryError("no memory")
    a, b = decorated(compiler, 2, wait=10)
    call_all([a])
    clock.advance(9)
    call_all([b])
    assert (seconds_left(a), seconds_left(b)) == (1, 10)
    clock.advance(1)
    call_all([a])
    assert (seconds_left(a), seconds_left(b)) == (10, 9)
    assert a.stats.failures == 2


def test_a_function_with_a_problem_of_its_own_delays_nobody() -> None:
    """Others have compiled since, so what fails next for the same reason keeps its own, short wait."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 0.0)
    bad, good, other = decorated(compiler, 3)
    for _ in range(20):
        call_all([bad])
        clock.advance(seconds_left(bad))
    call_all([bad])
    assert seconds_left(bad) > 1000
    compiler.broken = lambda name: None if name == "step1" else full_disk()
    call_all([good, other])
    assert good.state is CompileState.COMPILED
    assert seconds_left(other) == 15


def test_a_function_that_fails_for_another_reason_leaves_the_outage() -> None:
    """Those that fail for the old reason move its due moment no more."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 0.0)
    a, b = decorated(compiler, 2, wait=10)
    call_all([a, b])
    compiler.broken = lambda name: MemoryError("no memory") if name == "step0" else full_disk()
    clock.advance(10)
    call_all([a])
    clock.advance(5)
    call_all([b])
    assert (seconds_left(a), seconds_left(b)) == (5, 10)


@pytest.mark.parametrize("other", [{"wait": 20}, {"wait_calls": 5, "wait": None, "max_overhead": 0.2}])
def test_functions_with_another_policy_share_the_time_only(other: dict[str, Any]) -> None:
    """They have due moments of their own, but wait for each other's cost."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 10.0)
    (a,) = decorated(compiler, 1, wait=10)
    (b,) = decorated(compiler, 1, **other)
    call_all([a, b])
    assert (a.stats.failures, b.stats.failures) == (1, 0)
    assert b.next_retry is not None
    assert seconds_left(b) == pytest.approx(90)  # so that 20 s are a fifth of the time
    clock.advance(90)
    call_all([b, a])
    assert (a.stats.failures, b.stats.failures) == (1, 1)
    assert a.next_retry is not None
    assert a.next_retry.max_overhead == 0.2
    assert seconds_left(a) == pytest.approx(40)  # so that 30 s are a fifth
    assert "(delayed by max_overhead=0.2)" in str(a.next_retry)


def test_functions_without_a_share_take_no_part() -> None:
    """They attempt when their own policy says so, and the others do not wait for them."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 10.0)
    (a,) = decorated(compiler, 1, wait=10, max_overhead=1.0)
    b, c = decorated(compiler, 2, wait=None, wait_calls=2)
    call_all([b, c, a, b])
    assert (a.stats.failures, b.stats.failures, c.stats.failures) == (1, 1, 1)
    call_all([b, c, b])
    assert (b.stats.failures, c.stats.failures) == (2, 1)


def test_what_has_not_failed_waits_and_says_so_once() -> None:
    """Functions that were never attempted, and new shapes of compiled ones, run eagerly until the share allows them."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 10.0)
    compiler.broken = False
    compiled, failing, new = decorated(compiler, 3)
    call_all([compiled])
    compiler.broken = True
    call_all([failing])
    compiler.broken = False
    shape = torch.ones(2, 2, dtype=torch.float64)
    with record_events() as events:
        for _ in range(3):
            torch.testing.assert_close(compiled(shape), shape.sin())
            call_all([compiled, new])
    told = [event for event in events if isinstance(event, AttemptPostponed)]
    assert [(event.function, event.level) for event in told] == [("step0", logging.WARNING), ("step2", logging.INFO)]
    assert told[0].next_retry.seconds == pytest.approx(90)
    assert "attempts of other functions have failed" in told[0].message
    assert (compiled.state, new.state) == (CompileState.COMPILED, CompileState.PENDING)
    assert compiled.stats.compiled_calls == 4
    assert new.stats.eager_calls == 3
    assert new.next_retry is not None
    assert seconds_left(new) == pytest.approx(90)
    clock.advance(90)
    call_all([failing, new])  # the one that has never failed goes first
    torch.testing.assert_close(compiled(shape), shape.sin())
    assert new.next_retry is None
    assert (failing.stats.attempts, new.stats.attempts, compiled.stats.attempts) == (1, 1, 2)
    call_all([failing])
    assert failing.state is CompileState.COMPILED


@pytest.mark.usefixtures("process_group")
def test_with_several_ranks_what_has_not_failed_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait on this rank alone, and run eagerly while the others run compiled code."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    compiler = SlowCompiler(FakeClock(), 10.0)
    failing, new = decorated(compiler, 2)
    call_all([failing])
    compiler.broken = False
    call_all([new])
    assert [fn.state for fn in (failing, new)] == [CompileState.FALLBACK, CompileState.COMPILED]


@pytest.mark.parametrize("ask", ["retry_now", "reset"])
def test_a_user_may_ask_for_an_attempt(ask: str) -> None:
    """It is made in the next call, whatever the others have cost, by functions held off or never attempted."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 10.0)
    failing, new = decorated(compiler, 2)
    call_all([failing, new])
    compiler.broken = False
    getattr(new, ask)()
    assert new.next_retry is None
    call_all([failing, new])
    assert (failing.stats.attempts, new.stats.attempts) == (1, 1)
    getattr(failing, ask)()
    call_all([failing])
    assert failing.state is CompileState.COMPILED


def test_a_failed_attempt_that_the_user_asked_for_restarts_the_wait() -> None:
    """Also for the functions that share its due moments."""
    clock = FakeClock()
    a, b = decorated(SlowCompiler(clock, 0.0), 2, wait=10)
    call_all([a, b])
    clock.advance(4)
    a.retry_now()
    call_all([a])
    assert a.stats.failures == 2
    assert seconds_left(a) == seconds_left(b) == 10


def test_an_attempt_that_the_user_asked_for_is_not_put_off() -> None:
    """Another function's failure moves the due moment of the others, but not of one that was told to retry now."""
    compiler = SlowCompiler(FakeClock(), 0.0)
    a, b = decorated(compiler, 2, wait=10)
    call_all([a, b])
    a.retry_now()
    b.retry_now()
    call_all([b])
    assert (a.stats.failures, b.stats.failures) == (1, 2)
    compiler.broken = False
    call_all([a])
    assert a.state is CompileState.COMPILED


@pytest.mark.parametrize("end", ["recovery", "reset", "death", "giving up"])
def test_after_the_last_hold_off_nothing_is_limited(end: str) -> None:
    """The time that attempts of an earlier outage have taken does not count."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 10.0)
    functions = decorated(compiler, 2, stop=stop_after_attempt(2))
    call_all(functions)
    call_all(functions[1:] * 20)  # from some call on, it is held off without further checks
    assert functions[1].stats.attempts == 0
    if end == "recovery":
        compiler.broken = False
        clock.advance(100)
        call_all(functions[:1] * 2)
        assert functions[0].state is CompileState.COMPILED
    elif end == "reset":
        functions[0].reset()
    elif end == "death":
        del functions[0]
    else:
        clock.advance(100)
        call_all(functions[:1] * 2)
        assert functions[0].state is CompileState.GAVE_UP
    compiler.broken = False
    call_all(functions[-1:])
    assert functions[-1].state is CompileState.COMPILED


def test_a_second_outage_does_not_pay_for_the_first() -> None:
    """The share is one of the time since the first failure of those that are held off now."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 10.0)
    a, b = decorated(compiler, 2)
    call_all([a])
    compiler.broken = False
    clock.advance(90)
    call_all([a])
    assert a.state is CompileState.COMPILED
    compiler.broken = True
    call_all([b])
    assert seconds_left(b) == pytest.approx(90)


def test_the_last_attempt_before_giving_up_counts() -> None:
    """Its time is part of the share, although its function will not attempt again."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 10.0)
    (a,) = decorated(compiler, 1, stop=stop_after_attempt(2))
    (b,) = decorated(compiler, 1)
    call_all([a])
    clock.advance(90)
    call_all([b])
    clock.advance(seconds_left(a))
    compiler.cost = 30.0
    call_all([a])
    assert a.state is CompileState.GAVE_UP
    assert seconds_left(b) == pytest.approx(200)  # so that 80 s are a fifth of the time since the first failure


def test_a_permanent_failure_delays_nobody() -> None:
    """It costs once, and says nothing about other functions."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 10.0)
    compiler.broken = lambda name: NotImplementedError(name) if name == "step0" else None
    functions = decorated(compiler, 2)
    call_all(functions)
    assert [fn.state for fn in functions] == [CompileState.GAVE_UP, CompileState.COMPILED]


def test_all_functions_say_that_they_recovered() -> None:
    """Each has its own line, events and books."""
    clock = FakeClock()
    compiler = SlowCompiler(clock, 0.0)
    functions = decorated(compiler, 3)
    call_all(functions)
    compiler.broken = False
    clock.advance(15)
    with record_events() as events:
        call_all(functions)
    assert [event.function for event in events if isinstance(event, Recovered)] == ["step0", "step1", "step2"]
    assert all((fn.stats.failures, fn.stats.recoveries) == (1, 1) for fn in functions)
