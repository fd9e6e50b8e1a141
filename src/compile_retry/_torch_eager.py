"""The non-public parts of eager PyTorch that the library uses: like `_torch_internals`, but without Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def in_backward() -> bool:
    """Whether this thread is inside a backward pass. Since 2.0. Essential.

    What runs there runs again what ran forward, under activation checkpointing, and must do so in the same way.
    """
    return torch._C._current_graph_task_id() != -1


def call_of(module: torch.nn.Module) -> Callable[..., Any]:
    """What ``module.compile()`` compiles: the call with its hooks. Since 2.2. Essential."""
    call: Callable[..., Any] = module._call_impl
    return call


def compiled_call_of(module: torch.nn.Module) -> object:
    """What runs instead of it, or None; set by ``module.compile()`` too. Since 2.2. Essential."""
    return module.__dict__.get("_compiled_call_impl")


def set_compiled_call(module: torch.nn.Module, call: object) -> None:
    """Have this run when the module is called; not through ``setattr``, which a half-made copy does not survive."""
    module.__dict__["_compiled_call_impl"] = call


def is_from_torch_compile(module: torch.nn.Module) -> bool:
    """Whether this is what ``torch.compile(module)`` returns: another module round it. Since 2.0.

    By the name of its class: the class itself is Dynamo's. Without it such a module would be compiled twice over.
    """
    return type(module).__name__ == "OptimizedModule"
