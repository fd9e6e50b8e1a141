"""G1: a graph may be retained, although a compiled backward may reuse the memory of what the forward has saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from compile_retry import CompileState, compile_with_fallback


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU())


def gradients(net: nn.Module, loss: torch.Tensor, passes: int) -> list[list[torch.Tensor]]:
    """Return the gradients of several backward passes through the same graph."""
    found = []
    for left in reversed(range(passes)):
        net.zero_grad()
        loss.backward(retain_graph=left > 0)
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    return found


@pytest.mark.parametrize("rows", [64, 0])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_three_backward_passes(backend: str, rows: int) -> None:
    """They have the same gradients as in eager, also with code that stock has left in the cache."""
    net, x = network(), torch.linspace(-1, 1, rows * 16).reshape(rows, 16)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = net(x).square().sum()
        return loss

    torch.compile(step, backend=backend)(x).backward()
    expected = gradients(net, step(x), 3)
    fn = compile_with_fallback(step, backend=backend)
    for passes in (1, 3, 1, 3):
        torch.testing.assert_close(gradients(net, fn(x), passes), expected[:passes])
    assert (fn.state, fn.stats.compiled_calls) == (CompileState.COMPILED, 4)


@pytest.mark.long
def test_changing_sizes() -> None:
    """The same for strides that are not contiguous, and for a compile with changing sizes."""
    net = network()

    def step(x: torch.Tensor) -> torch.Tensor:
        h = net(x.t()).sin()
        loss: torch.Tensor = (h.t().exp() * x).sum()
        return loss

    stock = torch.compile(step, dynamic=True)
    fn = compile_with_fallback(step, dynamic=True)
    for rows in (8, 24):
        x = torch.linspace(-1, 1, rows * 16).reshape(16, rows)
        stock(x).backward()
        torch.testing.assert_close(gradients(net, fn(x), 3), gradients(net, step(x), 3))


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")  # stock warns of it, too
def test_a_backward_with_plain_arguments() -> None:
    """A backward that takes its arguments one by one, instead of in a list that it empties, may run again, too."""

    def plain(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return graph_module

    net, x = network(), torch.linspace(-1, 1, 64).reshape(4, 16)
    fn = compile_with_fallback(lambda x: net(x).sum(), backend=aot_autograd(fw_compiler=plain, bw_compiler=plain))
    torch.testing.assert_close(gradients(net, fn(x), 2), gradients(net, net(x).sum(), 2))
    assert fn.state is CompileState.COMPILED
