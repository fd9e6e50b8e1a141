"""G11: the statistics are honest. Silent eager execution counts as eager, and the numbers add up, under threads too."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from compile_retry import CompileState, CompileStats, RetryPolicy, compile_with_fallback
from compile_retry.events import AttemptStarted
from compile_retry.testing import record_events
from support import Compiler, first, full_disk, wait_until_waiting

X = torch.ones(3)
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_past_the_recompile_limit(fullgraph: bool) -> None:
    """Calls beyond the limit count as eager, their results are correct, and one log line says so."""
    compiler = Compiler()
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, fullgraph=fullgraph)
    limit = torch._dynamo.config.recompile_limit
    with record_events(kinds={"recompile limit", "gave up"}) as events:
        for n in range(2, limit + 12):
            x = torch.ones(n)
            torch.testing.assert_close(fn(x), x.sin())
    assert (compiler.asked, fn.stats.compiled_calls, fn.stats.eager_calls) == (limit, limit, 10)
    assert len(events) == 1
    for n in range(2, limit + 2):
        fn(torch.ones(n))
    assert fn.stats.compiled_calls == 2 * limit


def test_past_the_limit_of_all_recompiles() -> None:
    """The limit counts only what this wrapper has compiled, not other wrappers or failures."""
    fn = compile_with_fallback(sine, backend=Compiler(first(4)), dynamic=False, policy=EVERY_CALL)
    with torch._dynamo.config.patch(accumulated_recompile_limit=3), record_events(kinds={"recompile limit"}) as events:
        for n in (2, 3, 4, 5, 2, 3, 4):
            fn(torch.ones(n))
        assert (fn.stats.compiled_calls, len(events)) == (3, 0)
        for n in (5, 6, 2):
            fn(torch.ones(n))
    assert (fn.stats.compiled_calls, fn.stats.eager_calls, len(events)) == (4, 6, 1)


def test_the_recompile_limit_in_a_later_graph() -> None:
    """A call with one graph over the limit is mixed. After torch._dynamo.reset() the count starts again."""

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    fn = compile_with_fallback(step, backend=Compiler(), dynamic=False)
    torch._dynamo.config.recompile_limit, limit = 2, torch._dynamo.config.recompile_limit
    try:
        for n in (2, 3, 4, 5, 4):
            fn(X, torch.ones(n))
    finally:
        torch._dynamo.config.recompile_limit = limit
    assert (fn.stats.eager_calls + fn.stats.mixed_calls, fn.stats.compiled_calls) == (3, 2)
    torch._dynamo.reset()
    fn(X, torch.ones(4))
    assert fn.stats.compiled_calls == 3


def test_the_limit_that_the_user_wants_to_raise() -> None:
    """torch._dynamo.config.fail_on_recompile_limit_hit is respected."""
    fn = compile_with_fallback(sine, backend=Compiler(), dynamic=False)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=1):
        fn(torch.ones(2))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            fn(torch.ones(3))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_stances(fullgraph: bool) -> None:
    """force_eager and eager_on_recompile count as eager; fail_on_recompile raises, as the user asked."""
    fn = compile_with_fallback(sine, backend=Compiler(), fullgraph=fullgraph, dynamic=False)
    with torch.compiler.set_stance("force_eager"):
        fn(X)
    assert (fn.stats.eager_calls, fn.state) == (1, CompileState.PENDING)
    fn(X)
    with torch.compiler.set_stance("eager_on_recompile"):
        fn(X)
        fn(torch.ones(4))
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="fail_on_recompile"):
        fn(torch.ones(5))
    assert (fn.stats.compiled_calls, fn.stats.eager_calls, fn.stats.failures) == (2, 3, 0)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_disabled_dynamo(fullgraph: bool) -> None:
    """While torch._dynamo.config.disable is set, calls count as eager, even if it was set in the first call."""
    fn = compile_with_fallback(sine, backend=Compiler(), fullgraph=fullgraph)
    with torch._dynamo.config.patch(disable=True):
        for _ in range(3):
            torch.testing.assert_close(fn(X), X.sin())
    fn(X)
    assert (fn.stats.eager_calls, fn.stats.compiled_calls) == (3, 1)


def test_disable_true_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile(disable=True) and TORCHDYNAMO_DISABLE=1 are respected, and calls count as eager."""
    fn = compile_with_fallback(sine, disable=True)
    fn(X)
    assert (fn.stats.eager_calls, fn.stats.calls, fn.state) == (1, 1, CompileState.PENDING)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    fn = compile_with_fallback(sine)
    fn(X)
    assert (fn.stats.eager_calls, fn.state) == (1, CompileState.PENDING)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_nothing_to_compile(fullgraph: bool) -> None:
    """A function without tensors runs once per call and returns its result, with fullgraph=True too."""
    ran = 0

    def add(a: int, b: int) -> int:
        nonlocal ran
        ran += 1
        return a + b

    fn = compile_with_fallback(add, fullgraph=fullgraph, backend="eager")
    assert [fn(2, 3), fn(2, 3), fn(4, 5)] == [5, 5, 9]
    assert ran == 3
    assert (fn.stats.calls, fn.stats.failures) == (3, 0)
    assert fn.stats.eager_calls >= 1


def test_a_frame_that_torch_skips() -> None:
    """If a graph break that Dynamo cannot resume makes it skip the frame, every call counts as eager."""

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for i in range(2):
                try:
                    torch._dynamo.graph_break()
                finally:
                    x = x + i
        return x

    compiler = Compiler()
    fn = compile_with_fallback(step, backend=compiler)
    for _ in range(4):
        torch.testing.assert_close(fn(X), X + 1)
    stats = fn.stats
    assert stats.calls == 4
    assert stats.failures == 0
    assert (stats.compiled_calls > 0) == (compiler.ran > 0)


def test_control_flow_through_the_backend() -> None:
    """If Dynamo restarts its analysis by raising through the backend, that is no failure and no second attempt."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    fn = compile_with_fallback(lambda x: net(x).sum(), backend="aot_eager", dynamic=True)
    for _ in range(3):
        fn(torch.randn(8, 3, 8, 8))
    assert (fn.stats.attempts, fn.stats.failures, fn.stats.compiled_calls) == (1, 0, 3)


def test_a_backend_that_skips_frames() -> None:
    """A backend that raises SkipFrame to leave a frame alone has not failed."""

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        raise torch._dynamo.exc.SkipFrame("not this one")

    fn = compile_with_fallback(sine, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(fn(X), X.sin())
    assert (fn.stats.eager_calls, fn.stats.failures) == (3, 0)


def test_nested_calls_are_part_of_their_callers_graph() -> None:
    """A function that Dynamo inlines counts no calls; one that is called directly does."""
    inner = compile_with_fallback(sine, backend=Compiler(), name="inner")
    outer = compile_with_fallback(lambda x: inner(x) + 1, backend=Compiler(), name="outer")
    for _ in range(3):
        outer(X)
    assert (outer.stats.compiled_calls, inner.stats.calls) == (3, 0)
    inner(X)
    assert inner.stats.compiled_calls == 1


def test_recursion() -> None:
    """A decorated function can call itself where Dynamo does not trace."""

    def step(x: torch.Tensor, depth: int) -> torch.Tensor:
        if depth:
            x = again(x, depth - 1)
        return x.sin()

    def call(x: torch.Tensor, depth: int) -> torch.Tensor:
        return fn(x, depth)

    fn = compile_with_fallback(step, backend=Compiler(first(2)), policy=EVERY_CALL)
    again = torch.compiler.disable(call)
    for _ in range(6):
        torch.testing.assert_close(fn(X, 2), X.sin().sin().sin())
    assert fn.stats.calls == 18
    assert fn.state is CompileState.COMPILED


def test_a_call_within_a_call() -> None:
    """Graphs of the nested call count for the outer call too, and later attempts have the outer call's number."""

    def step(x: torch.Tensor, depth: int) -> torch.Tensor:
        x = x + 1
        if depth:
            x = again(x, depth - 1)
        return x.sin()

    def call(x: torch.Tensor, depth: int) -> torch.Tensor:
        return fn(x, depth)

    compiler = Compiler(lambda inputs: full_disk() if compiler.asked == 3 else None)
    fn = compile_with_fallback(step, backend=compiler, policy=RetryPolicy(wait=None, wait_calls=3))
    again = torch.compiler.disable(call)
    with record_events(kinds={"attempt started"}) as events:
        torch.testing.assert_close(fn(X, 1), (X + 2).sin().sin())
    started = [(event.call, event.graph) for event in events if isinstance(event, AttemptStarted)]
    assert started == [(1, 1), (2, 1), (1, 3)]
    assert fn.last_failure is not None
    assert fn.last_failure.call == 1
    assert (fn.stats.compiled_calls, fn.stats.mixed_calls) == (1, 1)
    assert fn.next_retry is not None
    assert fn.next_retry.calls == 2


def test_a_call_within_a_probe() -> None:
    """A call nested in the probe runs the code that the probe compiles, however long the hold-off was."""

    def step(x: torch.Tensor, depth: int) -> torch.Tensor:
        if depth:
            x = again(x, depth - 1)
        return x.sin()

    def call(x: torch.Tensor, depth: int) -> torch.Tensor:
        return fn(x, depth)

    fn = compile_with_fallback(step, backend=Compiler(first(1)), policy=RetryPolicy(wait=None, wait_calls=151))
    again = torch.compiler.disable(call)
    while fn.stats.calls < 152:  # the inner call has number 2 and fails, so 153 is due, and 154 runs within it
        fn(X, 1)
    held_off = fn.stats
    assert (held_off.compiled_calls, held_off.attempts) == (0, 1)
    torch.testing.assert_close(fn(X, 1), X.sin().sin())
    assert (fn.stats.compiled_calls, fn.stats.eager_calls, fn.stats.recoveries) == (2, held_off.eager_calls, 1)


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


def test_stats_are_a_snapshot() -> None:
    """A snapshot does not change, and `as_dict` has all values."""
    fn = compile_with_fallback(sine, backend=Compiler(first(1)), policy=EVERY_CALL)
    empty = fn.stats
    for _ in range(4):
        fn(X)
    assert (empty.calls, empty.compiled_fraction) == (0, 0.0)
    stats = fn.stats
    assert stats.as_dict() == {
        "calls": 4,
        "compiled_calls": 3,
        "mixed_calls": 0,
        "eager_calls": 1,
        "attempts": 2,
        "failures": 1,
        "recoveries": 1,
        "compile_seconds": stats.compile_seconds,
        "compiled_fraction": 0.75,
    }
    assert stats.compile_seconds > 0
    assert stats == CompileStats(3, 0, 1, 2, 1, 1, stats.compile_seconds)
