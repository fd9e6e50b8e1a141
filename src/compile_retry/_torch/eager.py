"""The non-public parts of eager PyTorch that the library uses: like `dynamo`, but without Dynamo."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

# Asked in every call that is held off, see `may_run_again`.
saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
has_forward_gradients = torch._C._is_fwd_grad_enabled

# Under it, reading a tensor's metadata runs neither a subclass's `__torch_function__` nor the user's modes. Since 1.0,
# and for modes since 2.0. Essential: looking at arguments must not run anybody's code.
without_torch_function = torch._C.DisableTorchFunction


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


def path_of_part(part: object, models: Iterable[weakref.ref[Any]]) -> str:
    """Name a part of one of these models the way ``named_modules()`` does, as in ``layers.3``; empty if it is in none.

    Args:
        part: Anything.
        models: In which to look, the first one first.
    """
    with suppress(Exception):  # it is in none, or a model is gone or has ideas of its own
        trees = (torch.nn.Module.named_modules(model()) for model in models)  # type: ignore[arg-type]
        return next(str(name) for tree in trees for name, module in tree if module is part)
    return ""


def may_run_again() -> bool:
    """Whether a backward pass may run again what runs here, as activation checkpointing does.

    It does so with saved-tensor hooks (others use those too, ``save_on_cpu`` for one: taking them for checkpointing
    only delays a retry), or from inside an ``autograd.Function``, whose ``forward`` is the only place where
    forward-mode gradients are off and inference mode is not on. Both since 2.0. Essential.
    """
    if saved_tensors_hooks(True) is not None:
        return True
    return not has_forward_gradients() and not torch.is_inference_mode_enabled()


def repeater() -> weakref.ref[Any] | None:
    """What lives as long as a backward pass may run again what runs here; None if that cannot be known.

    The function that unpacks saved tensors, and on the way has the checkpointed region run again: autograd's graph
    drops it when it drops the tensors. Since 2.0; without it a retry waits for an optimizer's step.
    """
    hooks = saved_tensors_hooks(True)
    try:
        return weakref.ref(hooks[1]) if hooks is not None else None
    except TypeError:  # a callable that cannot be referred to weakly
        return None


def on_optimizer_step(hook: Callable[..., None]) -> RemovableHandle:
    """Have this called after each step of any optimizer. Public, though not named in ``torch.optim``; since 2.1."""
    return register_optimizer_step_post_hook(hook)
