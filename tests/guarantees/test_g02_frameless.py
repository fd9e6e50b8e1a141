"""G2 for graphs without a frame: stances that compile later, compiled autograd, and disabled guards."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import FakeClock, record_events
from support import Compiler, first, full_disk

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
X = torch.ones(3)


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("stance", ["eager_then_compile", "aot_eager_then_compile"])
def test_a_graph_without_a_frame_is_retried(stance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph runs eagerly, the state and the log say until when, and no recovery is reported meanwhile."""
    # PyTorch remembers for the life of the process with what these stances have called a function first.
    monkeypatch.setattr(torch._dynamo.eval_frame, "_EXAMPLE_INPUTS", None)
    if stance.startswith(
        "aot"
    ):  # otherwise its first call would compile with torch's own backend, which fits all later
        with torch.compiler.set_stance("eager_then_compile"):
            compile_with_fallback(sine, backend="eager", name="another")(X)
    compiler = Compiler(first(2))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=3))
    states, waits = [], []
    with (
        torch.compiler.set_stance(stance),
        record_events(kinds={"failed", "retry scheduled", "recovered"}) as events,
    ):
        for _ in range(10):
            torch.testing.assert_close(fn(X), X.sin())
            states.append(fn.state)
            waits.append(fn.next_retry and fn.next_retry.calls)
    assert [event.kind for event in events] == ["failed", "retry scheduled"] * 2 + ["recovered"]
    start = 1 if stance.startswith("aot") else 2  # the first call in which torch runs the backend
    assert [event.call for event in events] == [start, start, start + 3, start + 3, start + 6]
    assert states[start - 1 : start + 5] == [CompileState.FALLBACK] * 6
    assert waits[start - 1 : start + 5] == [3, 2, 1, 3, 2, 1]
    assert (fn.state, fn.stats.failures, fn.stats.recoveries) == (CompileState.COMPILED, 2, 1)
    before = compiler.ran
    with torch.compiler.set_stance(stance):
        fn(X)
    assert compiler.ran == before + 1


def test_code_from_a_retry_is_used_for_arguments_that_look_the_same() -> None:
    """Code from a retry runs for arguments that look the same; others get their own code."""
    compiler = Compiler(first(1))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=EVERY_CALL)
    with torch.compiler.set_stance("eager_then_compile"):
        for _ in range(4):
            torch.testing.assert_close(fn(X), X.sin())
        assert (compiler.asked, fn.state) == (2, CompileState.COMPILED)
        y = torch.ones(6)[::2]  # the same size, but other strides
        for _ in range(2):
            torch.testing.assert_close(fn(y), y.sin())
        with torch.no_grad():
            torch.testing.assert_close(fn(X), X.sin())


def test_a_graph_that_takes_sizes_is_not_retried() -> None:
    """It stays eager until a reset, and the state says so, because code for one size must not run for others."""
    compiler = Compiler(first(1, MemoryError))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=True, policy=EVERY_CALL)
    with torch.compiler.set_stance("eager_then_compile"), record_events(kinds={"gave up", "recovered"}) as events:
        for n in (3, 4, 5, 6, 7):
            torch.testing.assert_close(fn(torch.ones(n)), torch.ones(n).sin())
    assert [event.kind for event in events] == ["gave up"]
    assert "until torch.compiler.reset()" in events[0].message
    assert (fn.state, fn.next_retry, compiler.asked) == (CompileState.GAVE_UP, None, 1)
    torch.compiler.reset()
    gc.collect()
    assert fn.state is not CompileState.GAVE_UP
    fn(X)
    assert fn.state is CompileState.COMPILED


def test_a_graph_that_takes_sizes_and_was_held_off_is_given_up() -> None:
    """PyTorch passes it to the backend only once, so no retry can come, and the log and the state say so."""
    compiler = Compiler(first(1))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=True, policy=RetryPolicy(wait=None, wait_calls=4))
    fn(X)
    with (
        torch.compiler.set_stance("eager_then_compile"),
        record_events(kinds={"gave up", "recovered"}) as events,
    ):
        for n in range(4, 80):
            torch.testing.assert_close(fn(torch.ones(n)), torch.ones(n).sin())
    assert [event.kind for event in events] == ["gave up"]
    assert "until torch.compiler.reset()" in events[0].message
    assert (compiler.asked, fn.state, fn.next_retry) == (1, CompileState.GAVE_UP, None)
    fn.reset()
    assert fn.state is CompileState.PENDING
    torch.compiler.reset()
    gc.collect()
    fn(X)
    assert (compiler.asked, fn.state) == (2, CompileState.COMPILED)


def test_a_graph_that_takes_sizes_is_given_up_again_after_a_reset_of_the_function() -> None:
    """PyTorch still does not pass it to the backend again, so the state is still GAVE_UP."""
    compiler = Compiler(first(1, MemoryError))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=True, policy=EVERY_CALL)
    with torch.compiler.set_stance("eager_then_compile"):
        for n in (3, 4, 5):
            fn(torch.ones(n))
        fn.reset()
        fn(torch.ones(6))
    assert (compiler.asked, fn.state) == (1, CompileState.GAVE_UP)


def test_a_graph_that_contains_graphs_and_tensors() -> None:
    """A graph that contains graphs, such as branches of `torch.cond`, and tensors falls back and recovers."""
    weight = torch.tensor([1.0, 2.0, 3.0])

    def step(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x * weight,))
        return y + torch.tensor(1.0)

    fn = compile_with_fallback(
        step, backend=Compiler(first(1)), dynamic=False, policy=RetryPolicy(wait=None, wait_calls=3)
    )
    with torch.compiler.set_stance("eager_then_compile"):
        for sign in (1, 1, -1, 1, -1, 1, -1):
            torch.testing.assert_close(fn(sign * X), step(sign * X))
    assert (fn.stats.failures, fn.stats.recoveries) == (1, 1)


def test_a_graph_without_a_frame_is_held_off() -> None:
    """During the hold-off, a new graph is not attempted before it is due."""
    clock, compiler = FakeClock(), Compiler(first(1))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=100, clock=clock))
    fn(X)
    with torch.compiler.set_stance("eager_then_compile"):
        for _ in range(70):
            torch.testing.assert_close(fn(torch.ones(4)), torch.ones(4).sin())
        assert (compiler.asked, fn.stats.eager_calls) == (1, 71)
        clock.advance(100)
        for _ in range(3):
            fn(torch.ones(4))
    assert compiler.asked == 2


def test_a_program_that_raises_in_a_graph_without_a_frame() -> None:
    """The error is the program's own, and nothing is counted."""

    def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.softmax(x, dim=dim)

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise IndexError("dim")

    fn = compile_with_fallback(softmax, backend=backend, policy=EVERY_CALL)
    with torch.compiler.set_stance("eager_then_compile"):
        for _ in range(3):
            with pytest.raises(IndexError, match="Dimension out of range"):
                fn(X, 10)
    assert (fn.stats.failures, fn.last_failure) == (0, None)


def test_graph_breaks_stay_graph_breaks() -> None:
    """An exception that Dynamo interprets leaves the backend unchanged."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException

    asked: list[int] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        asked.append(1)
        raise DynamicOutputShapeException(torch.ops.aten.nonzero.default)

    counts = []
    for compile_ in (torch.compile, compile_with_fallback):
        torch._dynamo.reset()
        asked.clear()
        fn: Callable[..., Any] = compile_(sine, backend=backend)
        with torch.compiler.set_stance("eager_then_compile"):
            for _ in range(4):
                torch.testing.assert_close(fn(X), X.sin())
        counts.append(len(asked))
    assert counts[0] == counts[1]
    assert fn.stats.failures == 0  # type: ignore[attr-defined]  # a CompiledFunction


@pytest.mark.parametrize("failing", [(), (1,), (2,), (3,), (1, 2, 3, 4, 5, 6)])
def test_compiled_autograd(failing: tuple[int, ...]) -> None:
    """The backward pass, captured at run time and compiled with the function's backend, equals the twin's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    twin = copy.deepcopy(net)

    def training(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def step(x: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = model(x).pow(2).mean()
            loss.backward()
            return loss.detach()

        return step

    asked = 0

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal asked
        asked += 1
        if asked in failing:
            raise full_disk()
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)

    with torch._dynamo.config.patch(compiled_autograd=True):
        ours, eager = compile_with_fallback(training(net), backend=backend, policy=EVERY_CALL), training(twin)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (net, twin)]
        with record_events(kinds={"recovered"}) as recovered:
            for _ in range(10):
                x = torch.randn(6, 8)
                torch.testing.assert_close(ours(x), eager(x))
                assert not recovered or ours.state is CompileState.COMPILED
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    torch.testing.assert_close(net.state_dict(), twin.state_dict())
    assert ours.state is CompileState.COMPILED
    assert (ours.stats.failures, len(recovered)) == (len(failing), int(bool(failing)))


def test_a_torch_compile_that_returns_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """If torch.compile is patched, whatever it returns is called."""
    monkeypatch.setattr(torch, "compile", lambda fn, **options: functools.partial(fn))
    fn = compile_with_fallback(sine, backend=Compiler())
    torch.testing.assert_close(fn(X), X.sin())
    assert fn.stats.eager_calls == 1


@pytest.mark.parametrize("dynamic", [False, None])
def test_disabled_guards(dynamic: bool | None) -> None:
    """Due attempts are made, and a held-off shape does not run another shape's code."""
    compiler = Compiler(lambda inputs: full_disk() if compiler.asked == 2 else None)
    fn = compile_with_fallback(sine, backend=compiler, dynamic=dynamic, policy=RetryPolicy(wait=None, wait_calls=3))
    a, b = torch.ones(4), torch.ones(5)
    fn(a), fn(b)
    assert fn.state is CompileState.FALLBACK
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        for _ in range(6):
            for x in (a, b):
                torch.testing.assert_close(fn(x), x.sin())
        assert (fn.state, fn.stats.recoveries) == (CompileState.COMPILED, 1)


def test_disabled_guards_and_given_up_frames() -> None:
    """Frames that were given up keep running eagerly."""
    compiler = Compiler(lambda inputs: NotImplementedError() if inputs[0].shape[0] == 5 else None)
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=EVERY_CALL)
    a, b = torch.ones(4), torch.ones(5)
    fn(a), fn(b)
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        for x in (a, b, a, b):
            torch.testing.assert_close(fn(x), x.sin())
    assert (fn.stats.compiled_calls, fn.stats.eager_calls) == (3, 3)
