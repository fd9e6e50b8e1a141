"""G1 and G2: the call survives, and everything in it happens exactly as often as in its eager twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import fail_compiles
from support import Compiler, Trainer, assert_twins, first, full_disk

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
SECOND_CALL = RetryPolicy(wait=None, wait_calls=2)


def whole_step(t: Trainer, x: torch.Tensor) -> torch.Tensor:
    t.optimizer.zero_grad()
    loss: torch.Tensor = t.net(x).pow(2).mean()
    t.steps += 1
    loss.backward()
    t.optimizer.step()
    return loss


def broken_step(t: Trainer, x: torch.Tensor) -> torch.Tensor:
    """Break the graph before and after the forward pass."""
    t.optimizer.zero_grad()
    t.steps += 1
    h = x * 2
    torch._dynamo.graph_break()
    t.steps += 10
    loss: torch.Tensor = t.net(h).pow(2).mean()
    torch._dynamo.graph_break()
    t.steps += 100
    loss.backward()
    t.optimizer.step()
    return loss.detach() + 1


def forward_only(t: Trainer, x: torch.Tensor) -> torch.Tensor:
    t.steps += 1
    loss: torch.Tensor = t.net(x).pow(2).mean()
    return loss


def run(
    step: Callable[..., torch.Tensor], t: Trainer, calls: int, *, optimize: bool, batches: tuple[int, ...] = (5,)
) -> list[float]:
    losses = []
    for call in range(calls):
        torch.manual_seed(call)
        x = torch.randn(batches[call % len(batches)], 6)
        if optimize:
            t.optimizer.zero_grad()
        loss = step(t, x)
        if optimize:
            loss.backward()
            t.optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(ours: list[float], theirs: list[float]) -> None:
    """Compare all but the last digit: some versions of Dynamo capture the optimizer's operations in another order."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


STEPS = [(whole_step, False), (broken_step, False), (forward_only, True)]


# The number of attempts that each step makes.
ATTEMPTS = [(whole_step, False, which, EVERY_CALL) for which in range(1, 5)]
ATTEMPTS += [(broken_step, False, which, EVERY_CALL) for which in range(1, 8)]
ATTEMPTS += [(forward_only, True, which, EVERY_CALL) for which in range(1, 3)]
# An eager call between the failure and the retry.
ATTEMPTS += [(whole_step, False, 2, SECOND_CALL), (broken_step, False, 3, SECOND_CALL)]
ATTEMPTS += [(forward_only, True, 1, SECOND_CALL)]


@pytest.mark.parametrize(("body", "optimize", "which", "policy"), ATTEMPTS)
def test_any_one_attempt_fails(body: Callable[..., Any], optimize: bool, which: int, policy: RetryPolicy) -> None:
    """Whichever attempt of a step fails, the run equals its eager twin's and ends up compiled."""
    asked = 0

    def fails(inputs: list[Any]) -> Exception | None:
        nonlocal asked
        asked += 1
        return full_disk() if asked == which else None

    ours = Trainer()
    twin = ours.twin()
    step = compile_with_fallback(body, backend=Compiler(fails), policy=policy)
    assert_same(run(step, ours, 7, optimize=optimize), run(body, twin, 7, optimize=optimize))
    assert_twins(ours, twin)
    assert step.state is CompileState.COMPILED
    assert step.stats.failures == step.stats.recoveries == 1
    assert step.stats.calls == 7


@pytest.mark.parametrize(("body", "optimize"), STEPS, ids=["whole", "broken", "forward"])
@pytest.mark.parametrize("dynamic", [False, True, None])
def test_attempts_fail_often(body: Callable[..., Any], optimize: bool, dynamic: bool | None) -> None:
    """Every other attempt fails, over several shapes, and nothing is lost or done twice."""
    asked = 0

    def fails(inputs: list[Any]) -> Exception | None:
        nonlocal asked
        asked += 1
        return full_disk() if asked % 2 else None

    ours = Trainer()
    twin = ours.twin()
    step = compile_with_fallback(body, backend=Compiler(fails), policy=EVERY_CALL, dynamic=dynamic)
    batches = (5, 5, 3, 4)
    losses = run(step, ours, 8, optimize=optimize, batches=batches)
    assert_same(losses, run(body, twin, 8, optimize=optimize, batches=batches))
    assert_twins(ours, twin)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_backward_graph_fails(fullgraph: bool) -> None:
    """A failing backward compile counts as a failure of the forward's attempt, and never raises in `backward()`."""
    left = 2

    def backward(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise full_disk()
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=lambda gm, inputs: make_boxed_func(gm.forward), bw_compiler=backward)
    ours = Trainer()
    ours.net[2] = torch.nn.Identity()  # AOTAutograd draws different random numbers than eager
    twin = ours.twin()
    step = compile_with_fallback(forward_only, backend=backend, policy=EVERY_CALL, fullgraph=fullgraph)
    torch.testing.assert_close(run(step, ours, 5, optimize=True), run(forward_only, twin, 5, optimize=True))
    assert_twins(ours, twin)
    assert (step.stats.failures, step.stats.compiled_calls, step.state) == (2, 3, CompileState.COMPILED)


def test_backward_is_not_compiled_without_gradients() -> None:
    """Under no_grad there is no backward graph that could fail."""

    def backward(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise AssertionError("nobody asked for a backward")

    backend = aot_autograd(fw_compiler=lambda gm, inputs: make_boxed_func(gm.forward), bw_compiler=backward)
    weight = torch.ones(3, requires_grad=True)
    step = compile_with_fallback(lambda x: (x * weight).sin(), backend=backend)
    with torch.no_grad():
        step(torch.ones(3))
    assert step.stats.compiled_calls == 1


def test_iterators_arguments_and_lists() -> None:
    """In a call with a failure, an iterator advances once, an argument is written once, and a list grows by one."""

    def step(batches: Iterator[torch.Tensor], total: torch.Tensor, seen: list[int]) -> torch.Tensor:
        x = next(batches)
        total.add_(x.sum())
        seen.append(len(seen))
        torch._dynamo.graph_break()
        return x * total

    def go(fn: Callable[..., torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor, list[int], int]:
        batches, total, seen = iter([torch.full((3,), float(i)) for i in range(10)]), torch.zeros(()), list[int]()
        return [fn(batches, total, seen) for _ in range(6)], total, seen, len(list(batches))

    ours = compile_with_fallback(step, backend=Compiler(first(2)), policy=EVERY_CALL)
    torch.testing.assert_close(go(ours), go(step))


def test_a_backend_that_modifies_the_graph_and_fails() -> None:
    """A backend that modifies the graph and then fails does not affect the eager call."""

    def vandal(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        for node in list(gm.graph.nodes):
            if node.op in ("call_function", "call_method"):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
        gm.recompile()
        raise full_disk()

    step = compile_with_fallback(lambda x: x.sin() + 1, backend=vandal, policy=EVERY_CALL)
    x = torch.ones(3)
    for _ in range(3):
        torch.testing.assert_close(step(x), x.sin() + 1)


def test_a_backend_that_modifies_subgraphs_and_fails() -> None:
    """A backend that modifies subgraphs of higher-order operators and then fails does not affect the eager call."""

    def vandal(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        for child in gm.children():
            if isinstance(child, torch.fx.GraphModule):
                for node in list(child.graph.nodes):
                    if node.op.startswith("call"):
                        node.replace_all_uses_with(node.args[0])
                        child.graph.erase_node(node)
                child.recompile()
        raise full_disk()

    def step(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))
        return y

    ours = compile_with_fallback(step, backend=vandal, policy=EVERY_CALL)
    for x in (torch.ones(3), -torch.ones(3)):
        torch.testing.assert_close(ours(x), x.sin() if x.sum() > 0 else x.cos())


@pytest.mark.long
def test_real_inductor() -> None:
    """Inductor fails in the forward, then in the backward, then works, and the run equals its eager twin's."""
    ours = Trainer()
    ours.net[2] = torch.nn.Identity()
    twin = ours.twin()
    step = compile_with_fallback(whole_step, policy=EVERY_CALL)
    with fail_compiles(MemoryError, times=2):
        ours_losses = run(step, ours, 6, optimize=False)
    torch.testing.assert_close(ours_losses, run(whole_step, twin, 6, optimize=False))
    assert_twins(ours, twin)
    assert step.state is CompileState.COMPILED
    assert step.stats.failures == 2
