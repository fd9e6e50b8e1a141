"""A compiled function inside a non-reentrant checkpoint can be recomputed by another graph: CheckpointError.

(a) Inside `save_on_cpu()` the recompute gets a plain tensor in place of the `nn.Parameter`, so the function is compiled
again, and that graph saves other tensors. (b) Two checkpointed layers of different widths share a compiled function:
the second one makes Dynamo compile a dynamic graph, and the recompute of the first one runs that. One would expect the
recompute to run what the forward ran, or at least to save the same tensors. Seen on 2.13.0, CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint


def layer(x: Tensor, weight: Tensor) -> Tensor:
    h = torch.tanh(x @ weight) * torch.sigmoid(x)
    return torch.tanh(h @ weight) + h.sin() * h.cos()


def a_parameter_in_save_on_cpu() -> None:
    compiled = torch.compile(layer, backend="aot_eager")
    x, weight = torch.randn(7, 4, requires_grad=True), torch.nn.Parameter(torch.randn(4, 4))
    with torch.autograd.graph.save_on_cpu():
        y = checkpoint(compiled, x, weight, use_reentrant=False)
        (y * y).sum().backward()


def b_two_widths() -> None:
    compiled = torch.compile(layer, backend="aot_eager")
    outputs = []
    for width in (4, 6):
        x, weight = torch.randn(7, width, requires_grad=True), torch.randn(width, width, requires_grad=True)
        outputs.append(checkpoint(compiled, x, weight, use_reentrant=False).sum())
    (outputs[0] + outputs[1]).backward()


def fails(scenario: Callable[[], None]) -> bool:
    torch._dynamo.reset()
    try:
        scenario()
    except CheckpointError as error:
        print(f"{scenario.__name__}: CheckpointError: {str(error).strip().splitlines()[0]}")
        return True
    print(f"{scenario.__name__}: not reproduced")
    return False


if __name__ == "__main__":
    sys.exit(not all([fails(a_parameter_in_save_on_cpu), fails(b_two_widths)]))
