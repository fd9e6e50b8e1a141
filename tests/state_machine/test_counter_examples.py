"""Failures found by test_state_machine.py, each as the shortest program that shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.testing import record_events
from support import Compiler, dynamo_fails_in, first, full_disk

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
X = torch.ones(3)


class Trouble(Exception):
    pass


class ByGraph:
    """A backend that fails if the graph's code contains one of these, and records the graphs that run."""

    def __init__(self, *failing: str, exc: type[Exception] = OSError) -> None:
        self.failing = set(failing)
        self.exc = exc
        self.ran: list[str] = []

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graph = next(name for name in ("sin", "cos") if f".{name}()" in graph_module.code)
        if graph in self.failing:
            raise self.exc("simulated")

        def run(*args: Any) -> Any:
            self.ran.append(graph)
            return graph_module.forward(*args)

        return run


def test_a_step_that_raises_half_way_is_no_recovery() -> None:
    """If the step raises before it reaches the failed graph, that is not a recovery."""
    armed = False

    def between() -> None:
        if armed:
            raise Trouble

    def step(x: torch.Tensor, k: int) -> torch.Tensor:
        y = x.sin() * k
        torch.compiler.disable(between)()
        return y.cos()

    compiler = ByGraph("cos")
    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=EVERY_CALL)
    fn(X, 1)
    armed = True
    with pytest.raises(Trouble):
        fn(X, 2)
    assert (fn.stats.recoveries, fn.state) == (0, CompileState.FALLBACK)
    armed = False
    compiler.failing.clear()
    fn(X, 1)
    assert (fn.stats.recoveries, fn.state) == (1, CompileState.COMPILED)


def test_a_module_in_training_is_not_the_module_in_evaluation() -> None:
    """A compiled training step is not the recovery of an evaluation that has failed and was not retried."""

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() if self.training else x.cos()

    compiler = ByGraph("cos")
    net = compile_with_fallback(Net(), backend=compiler, policy=EVERY_CALL)
    fn = compiled_function(net)
    net.eval()(X)
    net.train()(X)
    assert (fn.stats.recoveries, fn.state) == (0, CompileState.FALLBACK)


@pytest.mark.parametrize("what", ["reset", "retry_now"])
def test_a_reset_between_forward_and_recomputation(what: str) -> None:
    """Graphs that ran compiled forward do so in the recomputation, although another graph's failure was forgotten."""
    compiler = ByGraph("sin", exc=NotImplementedError)

    def cosine(x: torch.Tensor) -> torch.Tensor:
        return x.cos()

    def step(x: torch.Tensor) -> torch.Tensor:
        return cosine(x.sin())

    fn = compile_with_fallback(step, backend=compiler, policy=EVERY_CALL)
    x = torch.ones(3, requires_grad=True)
    fn(x)
    y = checkpoint(fn, x, use_reentrant=False)
    assert compiler.ran == ["cos"]
    getattr(fn, what)()
    y.sum().backward()
    assert compiler.ran == ["cos", "cos"]


@pytest.mark.parametrize("in_dynamo", ["transient, then permanent in the backend", "permanent"])
def test_a_retry_that_fails_inside_dynamo_leaves_nothing_waiting(in_dynamo: str) -> None:
    """A frame whose retries fail in different places waits only once: after it is given up, nothing is held off."""
    compiler = Compiler(first(1))
    fn = compile_with_fallback(lambda x: x.sin(), backend=compiler, policy=EVERY_CALL)
    fn(X)
    exc = (
        MemoryError() if in_dynamo.startswith("transient") else torch._dynamo.exc.UncapturedHigherOrderOpError("cannot")
    )
    with dynamo_fails_in("lambda", exc, times=1):
        fn(X)
    compiler.fails = lambda inputs: NotImplementedError("cannot")
    for _ in range(3):
        fn(X)
    assert (fn.state, fn.next_retry) == (CompileState.GAVE_UP, None)


def test_a_failure_around_a_nested_call_is_held_off() -> None:
    """The nested call, which ends first, does not settle the outer call's failure."""

    def step(x: torch.Tensor, depth: int) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return fn(y, depth - 1).cos() if depth else y

    compiler = Compiler(lambda inputs: full_disk())
    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=RetryPolicy(wait=1000))
    for _ in range(3):
        fn(X, 2)
    assert (compiler.asked, fn.stats.failures, fn.state) == (1, 1, CompileState.FALLBACK)


def test_an_episode_ends_although_a_part_is_given_up() -> None:
    """The episode ends even if a smaller last batch failed and never returns, and another part was given up."""

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    compiler = ByGraph("cos", exc=NotImplementedError)
    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=EVERY_CALL)
    fn(X), fn(X)
    compiler.failing, compiler.exc = {"sin"}, OSError
    fn(torch.ones(2))
    assert fn.state is CompileState.FALLBACK
    for _ in range(64):
        fn(X)
    assert (fn.state, fn.next_retry) == (CompileState.GAVE_UP, None)


def test_an_episode_ends_although_the_waiting_part_is_not_reached() -> None:
    """After a reset, the first part fails permanently, so the rest is not reached; its hold-off ends anyway."""

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    compiler = ByGraph("cos")
    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=EVERY_CALL)
    fn(X)
    torch._dynamo.reset()
    compiler.failing, compiler.exc = {"sin"}, NotImplementedError
    for _ in range(1 + 64):
        fn(X)
    assert (fn.state, fn.next_retry, fn.stats.recoveries) == (CompileState.GAVE_UP, None, 0)


def test_an_episode_ended_by_a_reset_of_dynamo_is_reported() -> None:
    """The failed graph is gone after the reset, so the episode ends with SweptAway instead of Recovered."""
    fn = compile_with_fallback(lambda x: x.sin(), backend=Compiler(lambda inputs: full_disk()), policy=EVERY_CALL)
    with torch.compiler.set_stance("eager_then_compile"):
        fn(X), fn(X)
    assert fn.state is CompileState.FALLBACK
    torch._dynamo.reset()
    with record_events() as events, torch.compiler.set_stance("force_eager"):
        fn(X)
    assert [event.kind for event in events] == ["bypassed", "swept away"]
    assert (fn.state, fn.stats.recoveries) == (events[-1].state, 0)
