"""Private names of eager PyTorch. Importing this module does not import Dynamo."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import CodeType
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

# Read in every call that is held off; see `may_run_again`.
saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
has_forward_gradients = torch._C._is_fwd_grad_enabled

# Within it, reading a tensor's metadata runs neither a subclass's `__torch_function__` nor the user's modes. Since 1.0,
# and for modes since 2.0. Essential: inspecting arguments must not run user code.
without_torch_function = torch._C.DisableTorchFunction

F = TypeVar("F", bound=Callable[..., Any])

_FOLDER = os.path.dirname(torch.__file__) + os.sep  # noqa: PTH120  # as a string, to compare with code's file names


def in_backward() -> bool:
    """Return True if this thread is inside a backward pass. Since 2.0. Essential.

    Activation checkpointing repeats part of the forward pass there, and must run it in the same way as before.
    """
    return torch._C._current_graph_task_id() != -1


def call_of(module: torch.nn.Module) -> Callable[..., Any]:
    """Return the method that ``module.compile()`` compiles: the call with its hooks. Since 2.2. Essential."""
    call: Callable[..., Any] = module._call_impl
    return call


def compiled_call_of(module: torch.nn.Module) -> object:
    """Return the function that replaces `call_of`, or None. Set by ``module.compile()`` too. Since 2.2. Essential."""
    return module.__dict__.get("_compiled_call_impl")


def set_compiled_call(module: torch.nn.Module, call: object) -> None:
    """Set the function that runs when the module is called. Avoids ``setattr``, which fails on a half-made copy."""
    module.__dict__["_compiled_call_impl"] = call


# The hooks that a module's call runs; since 2.0. Other names are private to other uses.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: torch.nn.Module) -> bool:
    """Return True if calling the module runs hooks. Without these attributes it seems to have none."""
    return any(module.__dict__.get(name) for name in _HOOKS)


def is_from_torch_compile(module: torch.nn.Module) -> bool:
    """Return True if the module is the wrapper module that ``torch.compile(module)`` returns. Since 2.0.

    It compares the name of the class, because importing the class would import Dynamo. Without this check such a module
    would be compiled twice.
    """
    return type(module).__name__ == "OptimizedModule"


def optimized_call_of(module: torch.nn.Module) -> object:
    """Return the compiled call of a module that ``torch.compile(module)`` returned. Since 2.0.

    For a lazy module, ``forward`` is a check that calls it; since 2.1.
    """
    return vars(module).get("_forward", vars(module)["forward"])


def replace_context(module: Any, wrap: Callable[[Any], Any]) -> None:
    """Wrap what a module that ``torch.compile(module)`` returned compiles its call with, and compile the call again.

    Its deep copies and Lightning compile with it too. Since 2.0. Essential: no other object takes part in both.
    """
    module.dynamo_ctx = wrap(module.dynamo_ctx)
    module._initialize()


def original_of_inline_wrapper(fn: Any) -> Any:
    """Return the call of the module whose call an ``OptimizedModule`` wraps; other functions as they are.

    It wraps the call if ``forward`` is torch.nn's own, as `visible` does. Since 2.1. Without it, all such modules would
    share their code and their name.
    """
    module = getattr(fn, "__wrapped__", None)
    if isinstance(module, torch.nn.Module) and is_from_torch(fn.__code__):
        return module.__call__
    return fn


def mark_as_compiled(fn: Any, like: Any) -> None:
    """Complete the attributes of a function that has been given those of one from ``torch.compile``.

    The number tells Dynamo that the attributes belong to this function, and were not copied by ``functools.wraps``.
    Since 2.12; without it a function that is compiled twice is not unwrapped.
    """
    fn.__wrapped__ = like.__wrapped__
    if hasattr(like, "_torchdynamo_wrapper_id"):  # pragma: no branch  # as of 2.12
        fn._torchdynamo_wrapper_id = id(fn)


def run_while_tracing(fn: F) -> F:
    """Make Dynamo run a function when it meets a call of it, and treat the result as a constant.

    The same as ``torch.compiler.assume_constant_result``, which would import Dynamo. Since 2.0. Essential: with another
    mark, Dynamo would trace the function.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take any attribute
    return fn


def path_of_part(part: object, models: Iterable[weakref.ref[Any]]) -> str:
    """Return the path of a submodule as in ``named_modules()``, such as ``layers.3``; empty if it is in no model.

    Args:
        part: Any object.
        models: The models to search, in this order.
    """
    with suppress(Exception):  # not found, or a model is gone or overrides something
        trees = (torch.nn.Module.named_modules(model()) for model in models)  # type: ignore[arg-type]  # None raises
        return next(str(name) for tree in trees for name, module in tree if module is part)
    return ""


def is_from_torch(code: CodeType) -> bool:
    """Return True for code from PyTorch's own files."""
    return code.co_filename.startswith(_FOLDER)


def may_run_again() -> bool:
    """Return True if a backward pass may run the current code again, as activation checkpointing does.

    Checkpointing uses saved-tensor hooks, or runs the code inside an ``autograd.Function``. Other users of such hooks,
    for example ``save_on_cpu``, are mistaken for checkpointing, which only delays a retry. The ``forward`` of an
    ``autograd.Function`` is the only place where forward-mode gradients are off and inference mode is not on. Both
    since 2.0. Essential.
    """
    if saved_tensors_hooks(True) is not None:
        return True
    return not has_forward_gradients() and not torch.is_inference_mode_enabled()


def repeater() -> weakref.ref[Any] | None:
    """Return an object that lives as long as a backward pass may run the current code again; None if unknown.

    It is the hook that unpacks saved tensors, which makes checkpointing run the region again. Autograd's graph drops it
    together with the tensors. Since 2.0; without it a retry waits for an optimizer step.
    """
    hooks = saved_tensors_hooks(True)
    try:
        return weakref.ref(hooks[1]) if hooks is not None else None
    except TypeError:  # a callable without weak references
        return None


def on_optimizer_step(hook: Callable[..., None]) -> RemovableHandle:
    """Register a hook on the steps of all optimizers. Public, though not exported by ``torch.optim``; since 2.1."""
    return register_optimizer_step_post_hook(hook)
