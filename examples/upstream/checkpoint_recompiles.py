"""A non-reentrant checkpoint can recompute a compiled function with another graph: CheckpointError.

(a) Inside `save_on_cpu()` the recomputation receives a plain tensor instead of the `nn.Parameter`. Dynamo recompiles,
and the new graph saves other tensors. (b) Two checkpointed layers of different widths share a compiled function. The
second makes Dynamo compile a dynamic graph, and the recomputation of the first runs that one.

Expected: the recomputation runs the same graph as the forward, or at least saves the same tensors. Both cases work in
eager. Seen on 2.13.0, CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

Layer = Callable[[Tensor, Tensor], Tensor]


def gated(x: Tensor, weight: Tensor) -> Tensor:
    h = torch.tanh(x @ weight) * torch.sigmoid(x)
    return torch.tanh(h @ weight) + h.sin() * h.cos()


def normed(x: Tensor, weight: Tensor) -> Tensor:
    h = x @ weight
    centered = h - h.mean(-1, keepdim=True)
    return torch.tanh(centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + 1e-5))


def parameter_in_save_on_cpu(layer: Layer) -> None:
    x, weight = torch.randn(7, 4, requires_grad=True), torch.nn.Parameter(torch.randn(4, 4))
    with torch.autograd.graph.save_on_cpu():
        y = checkpoint(layer, x, weight, use_reentrant=False)
        (y * y).sum().backward()


def two_widths(layer: Layer) -> None:
    total = torch.zeros(())
    for width in (4, 64):
        x, weight = torch.randn(7, width, requires_grad=True), torch.randn(width, width, requires_grad=True)
        total = total + checkpoint(layer, x, weight, use_reentrant=False).sum()
    total.backward()


def fails(scenario: Callable[[Layer], None], layer: Layer) -> bool:
    torch._dynamo.reset()
    scenario(layer)  # in eager
    try:
        scenario(torch.compile(layer, backend="aot_eager"))
    except CheckpointError as error:
        print(f"{scenario.__name__}: CheckpointError: {str(error).strip().partition(': ')[2].splitlines()[0]}")
        return True
    print(f"{scenario.__name__}: not reproduced")
    return False


if __name__ == "__main__":
    sys.exit(not all([fails(parameter_in_save_on_cpu, gated), fails(two_widths, normed)]))
