"""Events and hooks: contents, order, threads and safety; heartbeats and reminders."""

from __future__ import annotations

import _thread
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_retry import CompileState, NextRetry, RetryPolicy, compile_with_fallback, compiled_function, set_strict
from compile_retry._record import heartbeat
from compile_retry.events import (
    AttemptFailed,
    AttemptStarted,
    Compiled,
    Event,
    GaveUp,
    Recovered,
    RetryScheduled,
    StillCompiling,
    StillEager,
    register_hook,
)
from compile_retry.testing import FakeClock, fail_compiles, record_events
from support import Compiler, first, full_disk

X = torch.ones(3)


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def slow_compiler(clock: FakeClock, fails: int, seconds: float) -> Callable[..., Any]:
    left = [fails]

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        clock.advance(seconds)
        if left[0] > 0:
            left[0] -= 1
            raise full_disk()
        return graph_module.forward

    return compiler


def test_an_episode() -> None:
    """Each transition is one frozen record with its duration and its cost, and other calls are not reported."""
    clock = FakeClock()
    policy = RetryPolicy(wait=None, wait_calls=2, clock=clock)
    fn = compile_with_fallback(sine, backend=slow_compiler(clock, 2, 5.0), policy=policy, name="f")
    with record_events("f") as events:
        for _ in range(50):
            fn(X)
            clock.advance(1)
    assert [type(event) for event in events] == [
        *[AttemptStarted, AttemptFailed, RetryScheduled] * 2,
        *[AttemptStarted, Compiled, Recovered],
    ]
    assert [event.call for event in events] == [*[1] * 3, *[3] * 3, *[5] * 3]
    started, failed, scheduled = events[:3]
    assert isinstance(started, AttemptStarted)
    assert (started.call, started.graph, started.state) == (1, 1, CompileState.PENDING)
    assert isinstance(failed, AttemptFailed)
    assert (failed.seconds, failed.state) == (5.0, CompileState.FALLBACK)
    assert failed.failure.error_type == "builtins.OSError"
    assert isinstance(scheduled, RetryScheduled)
    assert scheduled.next_retry == NextRetry(calls=2, seconds=None)
    compiled, recovered = events[-2:]
    assert isinstance(compiled, Compiled)
    assert (compiled.call, compiled.seconds) == (5, 5.0)
    assert isinstance(recovered, Recovered)
    # Since the end of the first failed attempt: four seconds between calls, and one failed and one successful attempt.
    assert (recovered.seconds, recovered.failures, recovered.attempt_seconds) == (14.0, 2, 10.0)
    assert (recovered.eager_calls, recovered.state) == (4, CompileState.COMPILED)
    assert fn.stats.compile_seconds == 15.0
    with pytest.raises(AttributeError):
        recovered.seconds = 0.0  # type: ignore[misc]  # frozen


def test_hooks_of_one_function_and_of_all() -> None:
    """A handle removes its hook, and can be used as a context manager."""
    mine, all_of_them = list[str](), list[str]()
    a = compile_with_fallback(sine, backend="eager", name="a")
    b = compile_with_fallback(lambda x: x.cos(), backend="eager", name="b")
    handle = a.register_hook(lambda event: mine.append(event.function))
    with register_hook(lambda event: all_of_them.append(event.function)):
        a(X), b(X)
    handle.remove()
    a(torch.ones(2, 2)), b(torch.ones(2, 2))
    assert (set(mine), set(all_of_them)) == ({"a"}, {"a", "b"})
    assert len(mine) == all_of_them.count("a")
    with pytest.raises(TypeError, match="hook must be a callable that takes an event, not 3"):
        a.register_hook(3)  # type: ignore[arg-type]  # must be refused


def test_hooks_of_modules() -> None:
    """A compiled module's hooks are registered through `compiled_function`."""
    events: list[Event] = []
    module = compile_with_fallback(torch.nn.Linear(3, 3), backend="eager")
    compiled_function(module).register_hook(events.append)
    module(X)
    assert [event.kind for event in events] == ["attempt started", "compiled"]


def test_hooks_cannot_break_a_step(caplog: pytest.LogCaptureFixture) -> None:
    """A hook that raises is logged once, and the other hooks are still called."""

    def broken(event: Event) -> None:
        raise RuntimeError("hook")

    fn = compile_with_fallback(sine, backend=Compiler(first(3)), policy=RetryPolicy(wait=None, wait_calls=1))
    with register_hook(broken), record_events() as events:
        for _ in range(5):
            torch.testing.assert_close(fn(X), X.sin())
    assert events[-1].kind == "recovered"
    assert sum("failed on AttemptStarted" in record.getMessage() for record in caplog.records) == 1
    assert sum(record.exc_info is not None for record in caplog.records) == 1


def test_hooks_may_use_other_threads_that_compile() -> None:
    """A hook may wait for another thread that compiles: no lock is held during a failure or a success."""
    other = compile_with_fallback(lambda x: x.cos(), backend="eager")
    stuck: list[bool] = []

    def hook(event: Event) -> None:
        if isinstance(event, AttemptFailed | Compiled | Recovered):
            thread = threading.Thread(target=other, args=(torch.ones(len(stuck) + 2),))
            thread.start()
            thread.join(60)
            stuck.append(thread.is_alive())

    fn = compile_with_fallback(sine, backend=Compiler(first(1)), policy=RetryPolicy(wait=None, wait_calls=1))
    fn.register_hook(hook)
    for _ in range(2):
        fn(X)
    assert stuck == [False] * 3


def test_hooks_may_call_the_function() -> None:
    """A hook may call the function and read its state."""
    seen: list[object] = []

    def hook(event: Event) -> None:
        if isinstance(event, AttemptFailed):
            seen.append((fn.state, fn.next_retry, torch.equal(fn(X), X.sin())))

    fn = compile_with_fallback(sine, backend=Compiler(first(1)), policy=RetryPolicy(wait=None, wait_calls=5))
    fn.register_hook(hook)
    for _ in range(9):
        fn(X)
    assert seen == [(CompileState.FALLBACK, NextRetry(calls=5, seconds=None), True)]
    assert fn.state is CompileState.COMPILED


@pytest.mark.parametrize("permanent", [True, False])
def test_giving_up(permanent: bool) -> None:
    """A failure without a next attempt is followed by GaveUp."""
    from tenacity import stop_after_attempt

    error = NotImplementedError("no") if permanent else full_disk()
    fn = compile_with_fallback(
        sine, backend=Compiler(lambda inputs: error), policy=RetryPolicy(stop=stop_after_attempt(1))
    )
    with record_events() as events:
        fn(X), fn(X)
    assert [type(event) for event in events] == [AttemptStarted, AttemptFailed, GaveUp]
    assert events[-1].state is CompileState.GAVE_UP


def test_strict_mode_publishes_events_too() -> None:
    """In strict mode, events are published before the failure is raised."""
    fn = compile_with_fallback(sine, backend=Compiler(first(1)))
    with set_strict(True), record_events() as events, pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        fn(X)
    assert [event.kind for event in events] == ["attempt started", "failed"]


def test_a_failure_of_torch_compile_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of torch.compile() itself has no AttemptStarted, because there is no graph yet."""

    def fails(*args: object, **options: object) -> Any:
        raise full_disk()

    fn = compile_with_fallback(sine, backend="eager", policy=RetryPolicy(wait=None, wait_calls=1))
    with record_events() as events:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", fails)
            fn(X)
        fn(X)
    assert [e.kind for e in events] == ["failed", "retry scheduled", "attempt started", "compiled", "recovered"]


def threads() -> int:
    """Count the threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_long_attempt_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A long attempt is reported from another thread, at growing intervals, and the thread ends with it."""
    monkeypatch.setattr(heartbeat, "FIRST", 0.01)
    reports = threading.Semaphore(0)

    def hook(event: Event) -> None:
        if isinstance(event, StillCompiling):
            reports.release()

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        for _ in range(3):
            assert reports.acquire(timeout=60)
        return graph_module.forward

    fn = compile_with_fallback(sine, backend=compiler, name="train_step")
    fn.register_hook(hook)
    before = threads()
    with record_events() as events, caplog.at_level(logging.WARNING, "compile_retry"):
        fn(X)
    beats = [event for event in events if isinstance(event, StillCompiling)]
    assert [beat.graph for beat in beats[:3]] == [1, 1, 1]
    assert beats[1].seconds >= 2 * beats[0].seconds
    assert "train_step: still compiling graph 1 of call 1 after 0 s" in caplog.text
    gone = time.monotonic() + 60
    while threads() > before:
        assert time.monotonic() < gone


def test_one_thread_watches_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread watches all attempts, however many run at once."""
    monkeypatch.setattr(heartbeat, "FIRST", 0.01)
    entered, go, watching = threading.Barrier(5), threading.Event(), set[int]()
    heard = threading.Semaphore(0)

    def report(seconds: float) -> None:
        watching.add(threading.get_ident())
        heard.release()

    def attempt() -> None:
        with heartbeat.heartbeat(report):
            entered.wait(60)
            go.wait(60)

    attempts = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in attempts:
        thread.start()
    entered.wait(60)
    for _ in range(12):
        assert heard.acquire(timeout=60)
    go.set()
    for thread in attempts:
        thread.join(60)
    assert len(watching) == 1


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, the attempt runs anyway, without reports."""

    def start(function: Any, args: Any) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", start)
    fn = compile_with_fallback(sine, backend="eager")
    fn(X)
    assert fn.state is CompileState.COMPILED


def test_a_thread_that_finds_no_memory_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt does not wait for a thread that never starts, and the next attempt is watched again."""
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", lambda function, args: 1)
        with heartbeat.heartbeat(lambda seconds: None):
            pass
    monkeypatch.setattr(heartbeat, "FIRST", 0.01)
    heard = threading.Event()
    with heartbeat.heartbeat(lambda seconds: heard.set()):
        assert heard.wait(60)


def test_two_threads_begin_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second watching thread ends at once, and one thread reports all attempts."""
    real, starts = _thread.start_new_thread, list[Any]()
    monkeypatch.setattr(heartbeat, "FIRST", 0.01)
    watching, heard = set[int](), threading.Semaphore(0)

    def report(seconds: float) -> None:
        watching.add(threading.get_ident())
        heard.release()

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", lambda function, args: starts.append((function, args)))
        with heartbeat.heartbeat(report), heartbeat.heartbeat(report):
            before = threads()
            for function, args in starts:
                real(function, args)
            for _ in range(6):
                assert heard.acquire(timeout=60)
            assert (len(starts), len(watching)) == (2, 1)
            assert threads() <= before + 1


@pytest.mark.parametrize("has_code", [False, True])
def test_a_reminder(has_code: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Reminders come at growing intervals, with the calls, the seconds and the next attempt."""
    clock = FakeClock()

    def step(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def work(x: torch.Tensor) -> torch.Tensor:
        result = fn(x)
        clock.advance(10)
        return result

    def backend(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        if inputs[0].shape[0] == 4:
            raise full_disk()
        return graph_module.forward

    fn = compile_with_fallback(
        step, backend=backend, dynamic=False, policy=RetryPolicy(wait=1e6, clock=clock), name="f"
    )
    if has_code:
        for _ in range(20):
            work(torch.ones(3))
    with record_events(kinds={"still eager"}) as events, caplog.at_level(logging.WARNING, "compile_retry"):
        for _ in range(100):
            work(torch.ones(4))
    seconds = [event.seconds for event in events if isinstance(event, StillEager)]
    assert seconds == [60, 120, 240, 480, 960]
    assert [event.eager_calls for event in events if isinstance(event, StillEager)] == [7, 13, 25, 49, 97]
    assert "f: still running eagerly, 7 calls in the 60 s since the first failure" in caplog.text
    assert "; next attempt in 999940 s" in caplog.text


def test_what_running_eagerly_costs() -> None:
    """A reminder compares eager with compiled calls once both have been timed."""
    clock, slow = FakeClock(), [True]

    def backend(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        if inputs[0].shape[0] == 4:
            raise full_disk()
        slow[0] = False
        return graph_module.forward

    takes_a_while = torch.compiler.disable(lambda: clock.advance(1.0))

    def step(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 4:
            takes_a_while()
        takes_a_while()
        return x.sin()

    fn = compile_with_fallback(step, backend=backend, dynamic=False, policy=RetryPolicy(wait=1e6, clock=clock))
    for _ in range(20):
        fn(torch.ones(3))
    with record_events(kinds={"still eager"}) as events:
        for _ in range(31):
            fn(torch.ones(4))
    reminder = events[0]
    assert isinstance(reminder, StillEager)
    assert reminder.slowdown == pytest.approx(2.0)
    assert reminder.seconds_lost == pytest.approx(reminder.eager_calls * 1.0)
    assert "an eager call takes 2 times as long as a compiled one" in reminder.message


def test_no_reminder_without_a_failure_or_after_it() -> None:
    """No reminder comes without a failure, or after the recovery."""
    clock = FakeClock()
    fn = compile_with_fallback(sine, backend="eager", policy=RetryPolicy(wait=50, clock=clock, max_overhead=1.0))
    with record_events(kinds={"still eager"}) as events, fail_compiles(times=1):
        for _ in range(100):
            fn(X)
            clock.advance(30)
    assert (events, fn.state) == ([], CompileState.COMPILED)
