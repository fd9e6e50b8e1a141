"""G11 under threads: each call is counted by what it has run itself, and nothing is lost or done twice."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import FakeClock
from support import Compiler, Moment, first, full_disk, moments, rows, wait_until_waiting

X = torch.ones(3)
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
SECONDS = 20.0


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Switch threads a hundred times as often. If guards were not kept alive, Dynamo would crash within seconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 100)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("frequent_switches")
def test_eight_threads_four_shapes() -> None:
    """While failures come and go, every result is correct and the counters add up."""
    rng = random.Random(0)
    compiler = Compiler(lambda inputs: full_disk() if rng.random() < 0.5 else None)
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=5))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        mine = random.Random(seed)
        try:
            for _ in range(200):
                x = torch.full((mine.choice([2, 3, 4, 5]),), mine.random())
                torch.testing.assert_close(fn(x), x.sin())
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = fn.stats
    assert not errors
    assert stats.calls == 1600 == stats.compiled_calls + stats.mixed_calls + stats.eager_calls
    assert stats.attempts == compiler.asked
    compiler.fails = lambda inputs: None
    for _ in range(20):
        for n in (2, 3, 4, 5):
            fn(torch.ones(n))
    assert fn.state is CompileState.COMPILED


def test_two_threads_compile_the_same_frame() -> None:
    """If one of the threads fails, both run the other one's code, and nothing is waiting."""
    second = threading.Thread(target=lambda: fn(X))
    asked: list[int] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        asked.append(1)
        if len(asked) == 2:
            raise full_disk()
        second.start()
        wait_until_waiting(second)
        return gm.forward

    fn = compile_with_fallback(sine, backend=backend, policy=EVERY_CALL)
    fn(X)
    second.join()
    assert (len(asked), fn.stats.failures, fn.stats.eager_calls) == (2, 1, 1)
    fn(X)
    assert (fn.stats.compiled_calls, fn.state) == (2, CompileState.COMPILED)


class Pause:
    """A graph break at which a chosen thread waits until it may continue."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._reached, self._go_on = threading.Event(), threading.Event()
        self.here = torch.compiler.disable(self._here)

    def _here(self) -> None:
        if threading.current_thread() is self._thread:
            self._reached.set()
            assert self._go_on.wait(SECONDS)

    def start(self, call: Callable[[], object]) -> None:
        """Make a call in the thread, as far as the graph break."""
        self._reached.clear()
        self._go_on.clear()
        self._thread = threading.Thread(target=call)
        self._thread.start()
        assert self._reached.wait(SECONDS)

    def finish(self) -> None:
        self._go_on.set()
        if self._thread is not None:
            self._thread.join(SECONDS)
            assert not self._thread.is_alive()


@pytest.fixture
def pause() -> Iterator[Pause]:
    pause = Pause()
    yield pause
    pause.finish()


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
    pause.start(lambda: fn(X, X))
    assert fn.stats.calls == 300  # finished calls only
    for _ in range(5):
        fn(X, X)
    pause.finish()
    assert fn.stats.compiled_calls == fn.stats.calls == 306

    pause.start(lambda: fn(X, torch.ones(4)))  # its second graph will be new
    compiler.fails = rows(4)
    fn(X, X)
    pause.finish()
    assert fn.last_failure is not None
    assert fn.last_failure.call == 307
    assert (fn.stats.compiled_calls, fn.stats.mixed_calls, fn.stats.calls) == (307, 1, 308)


def test_a_retry_that_outlasts_its_episode(pause: Pause) -> None:
    """If the episode has ended, and another one has begun in another thread, the retry is held off too."""

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        pause.here()
        return x.cos()

    clock, compiler = FakeClock(), Compiler(first(1))
    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=RetryPolicy(wait=10, clock=clock))
    fn(X)
    clock.advance(10)
    pause.start(lambda: fn(X))  # has compiled its first graph
    fn.reset()
    compiler.fails = rows(4)
    fn(torch.ones(4))
    pause.finish()
    assert (compiler.asked, fn.stats.failures, fn.stats.mixed_calls) == (3, 2, 1)


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


def test_a_failure_while_a_thread_is_held_up() -> None:
    """Although the held-up thread does not know of the failure, a retry is attempted when it is due."""
    for moment in moments():
        compiler = Compiler(rows(4))
        policy = RetryPolicy(wait=None, wait_calls=3, clock=FakeClock())
        fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=policy)
        for _ in range(15):
            fn(X)
        hold_up(lambda: fn(X), moment, lambda: fn(torch.ones(4)))  # noqa: B023  # ends with this round
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
        hold_up(lambda: [fn(X) for _ in range(2)], moment, fn.retry_now)  # noqa: B023  # ends with this round
        for _ in range(10):
            fn(X)
        assert fn.stats.compiled_calls >= 10
