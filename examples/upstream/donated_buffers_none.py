"""`backward(retain_graph=True)` is refused because of donated buffers although none were donated.

A graph compiled with `donated_buffer=False` has `bw_donated_idxs = None`. The check before its backward reads the
current setting and compares `None != []`, so outside the patch it raises "compiled with non-empty donated buffers".

Expected: the backward runs. Seen on 2.13.0, CPU.
"""

from __future__ import annotations

import sys

import torch
import torch._functorch.config


def main() -> bool:
    compiled = torch.compile(lambda x: torch.tanh(x.sin() * x).exp().sum(), backend="aot_eager")
    x = torch.randn(4, 4, requires_grad=True)
    with torch._functorch.config.patch(donated_buffer=False, force_non_lazy_backward_lowering=True):
        y = compiled(x)  # forward and backward are both compiled here
    try:
        y.backward(retain_graph=True)
    except RuntimeError as error:
        print(f"no buffer was donated, yet: {error}")
        return "non-empty donated buffers" in str(error)
    return False


if __name__ == "__main__":
    if not main():
        print("not reproduced")
        sys.exit(1)
