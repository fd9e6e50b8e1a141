"""G11 and G12: later calls go through almost no code of the library, and everything unusual is still noticed.

The benchmarks measure times. These tests count the library's functions that a call goes through.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch

from compile_retry import CompiledFunction, CompileState, RetryPolicy, compile_with_fallback
from compile_retry.events import AttemptStarted
from compile_retry.testing import FakeClock, record_events
from support import LIBRARY, Compiler, Moment, first, full_disk, moments, rows

X = torch.ones(3)
SECONDS = 20.0


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def gone_through(fn: CompiledFunction[..., Any], calls: int = 200) -> int:
    """Count the library's Python functions that most of these calls go through."""
    seen: list[int] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(LIBRARY):
            seen[-1] += 1

    sys.setprofile(note)
    try:
        for _ in range(calls):
            seen.append(0)
            fn(X)
    finally:
        sys.setprofile(None)
    [(usual, times)] = Counter(seen).most_common(1)
    assert times > calls * 0.9
    return usual


HELD_OFF = 1  # the call itself
COMPILED = 2  # the call itself and its graph


class Pause:
    """A graph break at which a chosen thread waits until it may continue."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.here = torch.compiler.disable(self._here)

    def _here(self) -> None:
        if threading.current_thread() is self.thread:
            self.reached.set()
            assert self.go_on.wait(SECONDS)

    def start(self, call: Callable[[], object]) -> threading.Thread:
        self.reached.clear()
        self.go_on.clear()
        self.thread = threading.Thread(target=call)
        self.thread.start()
        assert self.reached.wait(SECONDS)
        return self.thread

    def finish(self, thread: threading.Thread) -> None:
        self.go_on.set()
        thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.fixture
def pause() -> Iterator[Pause]:
    pause = Pause()
    yield pause
    pause.go_on.set()


def test_a_compiled_call() -> None:
    """A compiled call goes through one function, and one more per graph, which calls the compiled code directly."""
    fn = compile_with_fallback(sine, backend=Compiler())
    assert gone_through(fn) == COMPILED
    assert fn.stats.compiled_calls == fn.stats.calls == 200


def test_a_held_off_call() -> None:
    """A held-off call goes through one function, which reads only the clock."""
    fn = compile_with_fallback(sine, backend=Compiler(first(1)), policy=RetryPolicy(wait=1e9))
    for _ in range(70):
        fn(X)
    assert gone_through(fn) == HELD_OFF
    assert fn.stats.eager_calls == fn.stats.calls == 270


def test_after_a_recovery() -> None:
    """After a recovery, calls are as cheap as if nothing had failed."""
    policy = RetryPolicy(wait=None, wait_calls=2)
    fn = compile_with_fallback(sine, backend=Compiler(first(2)), policy=policy)
    for _ in range(5):
        fn(X)
    assert fn.state is CompileState.COMPILED
    assert gone_through(fn) == COMPILED


def test_no_more_functions_than_without_the_library() -> None:
    """A compiled call goes through no more Python functions, including torch's own, than under stock torch."""
    fn, stock = compile_with_fallback(sine, backend="eager"), torch.compile(sine, backend="eager")
    counts = []
    for call in (fn, stock):
        for _ in range(300):
            call(X)
        counted = 0

        def note(frame: FrameType, event: str, arg: object) -> None:
            nonlocal counted
            counted += event == "call"

        sys.setprofile(note)
        call(X)
        sys.setprofile(None)
        counts.append(counted)
    assert counts[0] <= counts[1]


def test_after_threads(pause: Pause) -> None:
    """Calls stay cheap while other threads make calls, and all of them are counted."""

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        pause.here()
        return x.cos()

    fn = compile_with_fallback(step, backend=Compiler(), policy=RetryPolicy(clock=FakeClock()))
    alone = gone_through(fn)
    thread = pause.start(lambda: fn(X))
    assert gone_through(fn, 1000) == alone
    pause.finish(thread)
    assert fn.stats.compiled_calls == fn.stats.calls == 1201
    for _ in range(5000):
        fn(X)
    assert gone_through(fn) == alone
    assert fn.stats.compiled_calls == fn.stats.calls == 6401


def test_a_new_shape_after_many_calls() -> None:
    """A failure in the second graph of call 301 is reported with that number, and the call is mixed."""

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()

    compiler = Compiler()
    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=2))
    for _ in range(300):
        fn(X)
    compiler.fails = lambda inputs: full_disk() if compiler.asked == 4 else None
    y = torch.ones(4)
    with record_events(kinds={"attempt started"}) as events:
        torch.testing.assert_close(fn(y), y.sin().cos())
        torch.testing.assert_close(fn(y), y.sin().cos())
        torch.testing.assert_close(fn(y), y.sin().cos())
    started = [(event.call, event.graph) for event in events if isinstance(event, AttemptStarted)]
    assert started == [(301, 1), (301, 2), (303, 2)]
    assert fn.last_failure is not None
    assert fn.last_failure.call == 301
    assert (fn.stats.compiled_calls, fn.stats.mixed_calls, fn.stats.eager_calls) == (301, 2, 0)


def test_a_call_within_a_call_after_many_calls() -> None:
    """Both calls are counted and numbered, and the nested call's graphs count for the outer call too."""
    length = 3

    def step(x: torch.Tensor, depth: int) -> torch.Tensor:
        x = x + 1
        if depth:
            x = again(x, depth - 1)
        return x.sin()

    def call(x: torch.Tensor, depth: int) -> torch.Tensor:
        return fn(x, depth).sum().expand(length)

    compiler = Compiler()
    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=1))
    again = torch.compiler.disable(call)
    for depth in (0, 1, *[0] * 298):
        fn(X, depth)
    assert fn.stats.compiled_calls == fn.stats.calls == 301
    for _ in range(3):
        torch.testing.assert_close(fn(X, 1), (X + 2).sin().sum().sin().expand(3))
    assert fn.stats.compiled_calls == fn.stats.calls == 307
    for _ in range(5000):
        fn(X, 0)
    length, compiler.fails = 4, rows(4)
    with record_events(kinds={"attempt started"}) as events:
        fn(X, 1)  # fails in the outer call's last graph
    started = [(event.call, event.graph) for event in events if isinstance(event, AttemptStarted)]
    assert started == [(5308, 3)]
    assert (fn.stats.calls, fn.stats.compiled_calls, fn.stats.mixed_calls) == (5309, 5308, 1)


def test_a_call_within_a_held_off_call() -> None:
    """The nested call becomes due and compiles while the outer one runs eagerly, so only one counts as compiled."""
    clock = FakeClock()

    def step(x: torch.Tensor, depth: int) -> torch.Tensor:
        if depth:
            clock.advance(100)
            x = fn(x, depth - 1)
        return x.sin()

    fn = compile_with_fallback(step, backend=Compiler(first(1)), policy=RetryPolicy(wait=100, clock=clock))
    for _ in range(100):
        fn(X, 0)
    with torch.inference_mode():
        torch.testing.assert_close(fn(X, 1), X.sin().sin())
    assert (fn.stats.compiled_calls, fn.stats.calls) == (1, 102)


def test_a_call_in_another_thread(pause: Pause) -> None:
    """Concurrent calls are each counted by the graphs that they have run themselves."""

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        pause.here()
        return x.sum() + y.cos()

    compiler = Compiler()
    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=1000))
    for _ in range(300):
        fn(X, X)
    thread = pause.start(lambda: fn(X, X))
    assert fn.stats.calls == 300  # finished calls only
    for _ in range(5):
        fn(X, X)
    pause.finish(thread)
    assert fn.stats.compiled_calls == fn.stats.calls == 306

    thread = pause.start(lambda: fn(X, torch.ones(4)))  # its second graph will be new
    compiler.fails = rows(4)
    fn(X, X)
    pause.finish(thread)
    assert fn.last_failure is not None
    assert fn.last_failure.call == 307
    assert (fn.stats.compiled_calls, fn.stats.mixed_calls, fn.stats.calls) == (307, 1, 308)


def test_a_call_that_runs_no_graph_in_another_thread(pause: Pause) -> None:
    """A call without graphs and concurrent calls with graphs do not affect each other's counts."""

    def step(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            pause.here()
            return None
        return x.sin()

    fn = compile_with_fallback(step, backend=Compiler())
    for _ in range(300):
        fn(X)
    for x in (None, X):
        before = fn.stats
        thread = pause.start(lambda: fn(None))
        for _ in range(3):
            fn(x)
        pause.finish(thread)
        eager = fn.stats.eager_calls - before.eager_calls
        assert (eager, fn.stats.calls - before.calls) == (4 if x is None else 1, 4)
        for _ in range(5000):
            fn(X)


def hold_up(call: Callable[[], object], moment: Moment, meanwhile: Callable[[], object]) -> None:
    """Make a call in a thread that stops at this moment. Continue when `meanwhile` is over, or waits for the thread."""
    stopped_or_over, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        stopped_or_over.set()
        assert go_on.wait(SECONDS)

    def work() -> None:
        with moment.doing(stop):
            call()
        stopped_or_over.set()

    threads = [threading.Thread(target=work), threading.Thread(target=meanwhile)]
    threads[0].start()
    assert stopped_or_over.wait(SECONDS)
    threads[1].start()
    threads[1].join(0.2)
    go_on.set()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_a_thread_that_is_held_up() -> None:
    """Calls made while a thread is held up at any moment are all counted."""
    for moment in moments():
        fn = compile_with_fallback(sine, backend=Compiler(), policy=RetryPolicy(clock=FakeClock()))
        fn(X)
        hold_up(lambda: fn(X), moment, lambda: [fn(X) for _ in range(2)])  # noqa: B023  # ends with this round
        assert fn.stats.compiled_calls == fn.stats.calls == 4
        assert gone_through(fn) == COMPILED
        assert fn.stats.compiled_calls == fn.stats.calls == 204


def test_a_failure_while_a_thread_is_held_up() -> None:
    """Although the held-up thread does not know of the failure, a retry is attempted when it is due."""
    for moment in moments():
        compiler = Compiler(rows(4))
        policy = RetryPolicy(wait=None, wait_calls=3, clock=FakeClock())
        fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=policy)
        for _ in range(15):
            fn(X)
        hold_up(lambda: fn(X), moment, lambda: fn(torch.ones(4)))  # noqa: B023
        assert fn.state is CompileState.FALLBACK
        compiler.fails = lambda inputs: None
        fn(X), fn(X)
        fn(torch.ones(4))
        assert (fn.state, fn.stats.recoveries) == (CompileState.COMPILED, 1)


def test_retry_now_while_a_thread_is_held_up() -> None:
    """Although the held-up thread does not know of `retry_now`, the next call that may attempt does so."""
    for moment in moments():
        fn = compile_with_fallback(sine, backend=Compiler(first(1)), policy=RetryPolicy(wait=100, clock=FakeClock()))
        for _ in range(65):
            fn(X)
        hold_up(lambda: [fn(X) for _ in range(2)], moment, fn.retry_now)  # noqa: B023
        for _ in range(10):
            fn(X)
        assert fn.stats.compiled_calls >= 10


def test_a_call_within_a_held_off_call_while_a_thread_is_in_its_own(pause: Pause) -> None:
    """Each of these calls is counted by the graphs that it has run itself, although the function has recovered."""
    outer_pause = Pause()

    def step(x: torch.Tensor, depth: int) -> torch.Tensor:
        x = x.sin()
        pause.here()
        if depth:
            outer_pause.here()
            x = again(x, depth - 1)
        return x.cos()

    def call(x: torch.Tensor, depth: int) -> torch.Tensor:
        return fn(x, depth)

    again = torch.compiler.disable(call)
    policy = RetryPolicy(wait=100, clock=FakeClock())
    fn = compile_with_fallback(step, backend=Compiler(first(1)), policy=policy)
    for _ in range(100):
        fn(X, 0)
    outer = outer_pause.start(lambda: fn(X, 1))
    fn.retry_now()
    for _ in range(300):
        fn(X, 0)
    before = fn.stats
    thread = pause.start(lambda: fn(X, 0))
    outer_pause.finish(outer)
    pause.finish(thread)
    assert before.compiled_calls == 300
    assert (fn.stats.compiled_calls, fn.stats.eager_calls) == (302, before.eager_calls)


def test_the_programs_error_after_many_calls() -> None:
    """The error reaches the caller unchanged, the call is counted by what it ran, and later calls are compiled."""

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        check(x)
        return y.cos()

    def raise_if_negative(x: torch.Tensor) -> None:
        if x[0] < 0:
            raise LookupError("negative", 7)

    check = torch.compiler.disable(raise_if_negative)
    fn = compile_with_fallback(step, backend=Compiler())
    for _ in range(300):
        fn(X)
    with pytest.raises(LookupError) as info:
        fn(-X)
    assert info.value.args == ("negative", 7)
    assert fn.stats.compiled_calls == fn.stats.calls == 301
    assert fn.stats.failures == 0
    torch.testing.assert_close(fn(X), X.sin().cos())
    assert fn.stats.compiled_calls == fn.stats.calls == 302


def test_silent_eager_after_many_calls() -> None:
    """Stances and a disabled Dynamo are noticed at once, and so is their end."""
    fn = compile_with_fallback(sine, backend=Compiler())
    for _ in range(300):
        fn(X)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(7):
            fn(X)
    with torch._dynamo.config.patch(disable=True):
        fn(torch.ones(5))
    assert (fn.stats.compiled_calls, fn.stats.eager_calls) == (300, 8)
    for _ in range(5):
        fn(X)
    assert (fn.stats.compiled_calls, fn.stats.eager_calls) == (305, 8)


def test_recovery_from_another_thread() -> None:
    """If another thread makes an attempt due, the next call makes it, even if calls bypass Dynamo."""
    clock = FakeClock()
    compiler = Compiler(first(1))
    fn = compile_with_fallback(sine, backend=compiler, policy=RetryPolicy(wait=100, clock=clock))
    for _ in range(300):
        fn(X)
    assert (compiler.asked, fn.stats.eager_calls) == (1, 300)
    thread = threading.Thread(target=fn.retry_now)
    thread.start()
    thread.join()
    fn(X)
    assert (compiler.asked, fn.state, fn.stats.compiled_calls) == (2, CompileState.COMPILED, 1)


def test_due_moments_after_many_held_off_calls() -> None:
    """Attempts are due by time and by calls, exact to the call."""
    clock = FakeClock()
    compiler = Compiler(first(3))
    policy = RetryPolicy(wait=100, wait_calls=500, clock=clock)
    fn = compile_with_fallback(sine, backend=compiler, policy=policy)
    asked: list[int] = []
    for call in range(1, 1300):
        before = compiler.asked
        if call == 901:
            clock.advance(100)
        torch.testing.assert_close(fn(X), X.sin())
        if compiler.asked != before:
            asked.append(call)
    assert asked == [1, 501, 901]
    assert fn.stats.calls == 1299


def test_due_moments_after_calls_that_compiled_nothing() -> None:
    """Calls that compiled nothing count towards `wait_calls` like all others."""
    compiler = Compiler(first(1))
    policy = RetryPolicy(wait=None, wait_calls=300)

    @compile_with_fallback(backend=compiler, policy=policy)
    def step(x: torch.Tensor | None) -> torch.Tensor | None:
        return sine(x) if x is not None else x

    for _ in range(200):
        step(None)
    for _ in range(300):
        step(X)
    assert (compiler.asked, step.stats.calls) == (1, 500)
    step(X)
    assert (compiler.asked, step.stats.compiled_calls) == (2, 1)
