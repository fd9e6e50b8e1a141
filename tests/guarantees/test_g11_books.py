"""G11: the statistics are honest. Silent eager execution counts as eager, and the numbers add up, under threads too."""

from __future__ import annotations

import pytest
import torch

from compile_retry import CompileState, CompileStats, RetryPolicy, compile_with_fallback
from compile_retry.testing import record_events
from support import Compiler, first

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
@pytest.mark.parametrize("before", [0, 300])
def test_silent_eager(before: int, fullgraph: bool) -> None:
    """A disabled Dynamo and a stance that forces eager are noticed at once, in the first call too. So is their end."""
    fn = compile_with_fallback(sine, backend=Compiler(), fullgraph=fullgraph)
    for _ in range(before):
        fn(X)
    with torch._dynamo.config.patch(disable=True):
        for x in (torch.ones(4), torch.ones(5)):  # compiled code still runs, as under stock
            torch.testing.assert_close(fn(x), x.sin())
    with torch.compiler.set_stance("force_eager"):
        fn(X), fn(X)
    assert (fn.stats.compiled_calls, fn.stats.eager_calls) == (before, 4)
    fn(X), fn(X)
    assert (fn.stats.compiled_calls, fn.stats.eager_calls) == (before + 2, 4)


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
    """If a graph break that Dynamo cannot resume makes it skip the frame, it is traced once, and calls are eager."""

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for i in range(2):
                try:
                    torch._dynamo.graph_break()
                finally:
                    x = x + i
        return x

    fn, frames = compile_with_fallback(step, backend=Compiler()), list[int]()
    for _ in range(4):
        torch.testing.assert_close(fn(X), X + 1)
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert (fn.stats.calls, fn.stats.eager_calls, fn.stats.failures) == (4, 4, 0)
    assert frames == [frames[0]] * 4


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


def test_a_call_that_raises() -> None:
    """It is counted by what it ran until then."""

    def raise_if_negative(x: torch.Tensor) -> None:
        if x[0] < 0:
            raise LookupError

    check = torch.compiler.disable(raise_if_negative)

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        check(x)
        return y.cos()

    fn = compile_with_fallback(step, backend=Compiler())
    for _ in range(300):
        fn(X)
    with pytest.raises(LookupError):
        fn(-X)
    fn(X)
    assert fn.stats.compiled_calls == fn.stats.calls == 302


def test_nested_calls_are_part_of_their_callers_graph() -> None:
    """A function that Dynamo inlines counts no calls; one that is called directly does."""
    inner = compile_with_fallback(sine, backend=Compiler(), name="inner")
    outer = compile_with_fallback(lambda x: inner(x) + 1, backend=Compiler(), name="outer")
    for _ in range(3):
        outer(X)
    assert (outer.stats.compiled_calls, inner.stats.calls) == (3, 0)
    inner(X)
    assert inner.stats.compiled_calls == 1


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
        "partly_tuned": 0,
        "compiled_fraction": 0.75,
    }
    assert stats.compile_seconds > 0
    assert stats == CompileStats(3, 0, 1, 2, 1, 1, stats.compile_seconds)
