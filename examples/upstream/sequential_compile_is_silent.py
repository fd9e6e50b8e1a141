"""`nn.Sequential.compile()` silently compiles nothing.

It compiles `Module._call_impl`, whose frame Dynamo skips like all frames in torch.nn's own files, and the `forward`
below it is torch.nn's own as well.

Expected: it behaves like `torch.compile(module)`, which wraps the call in this case. Seen on 2.13.0, CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

graphs: list[GraphModule] = []


def backend(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    graphs.append(graph)
    return graph.forward


def main() -> bool:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    torch.compile(module, backend=backend)(torch.ones(2, 4))
    by_function = len(graphs)
    graphs.clear()
    module.compile(backend=backend)
    module(torch.ones(2, 4))
    print(f"graphs compiled: {by_function} by torch.compile(module), {len(graphs)} by module.compile()")
    return by_function > 0 and not graphs


if __name__ == "__main__":
    if not main():
        print("not reproduced")
        sys.exit(1)
