"""The function passed to ``torch.compile``, and the one that it returns.

Importing this module imports ``torch._dynamo``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

from . import first_import  # noqa: F401  # before anything else imports Dynamo

# isort: split
import torch

# The C part of Dynamo, since 2.0. Essential.
import torch._C._dynamo.eval_frame as _eval_frame
import torch._dynamo

# Wraps callables that have no frame of their own, as `torch.compile` itself does; since 2.1. Essential.
from torch._dynamo.external_utils import wrap_inline

# Returns True for functions that Dynamo skips; since 2.0. Essential, as in `frames`.
from torch._dynamo.trace_rules import check as _is_skipped_file

from .frames import FrameCallback


class UnsupportedTorchError(RuntimeError):
    """Raised if this PyTorch version has changed a private API that the library needs."""


def visible(fn: Callable[..., Any], code: CodeType | None) -> tuple[Callable[..., Any], CodeType | None]:
    """Return a function in a form that Dynamo can capture.

    Dynamo skips frames from torch.nn's files, so it captures a module's ``forward``, not its call. If ``forward`` is
    torch.nn's own too, as in a Sequential, ``module.compile()`` silently compiles nothing. ``torch.compile(module)``
    adds a frame around the call, and so does this function. Since 2.1. All other callables are left to
    ``torch.compile``, including modules whose ``forward`` was replaced by a partial, a callable object or a compiled
    function.

    Before 2.12, the wrappers of one code object share a recompile limit, so wrappers that do not share compiled code
    get copies of the code. A function that wraps a compiled function gets a copy too, because ``functools.wraps`` has
    copied an attribute that ``torch.compile`` rejects.

    Args:
        fn: The function.
        code: A copy of its code that was made for another function with the same code; None if there is none.

    Returns:
        The function to compile, and the copy of its code that it uses, if any.
    """
    module, name = getattr(fn, "__self__", None), getattr(fn, "__name__", None)
    if isinstance(module, torch.nn.Module) and name in _MODULE_CALLS and _is_from_torch(module.forward):
        wrapped: Callable[..., Any] = wrap_inline(fn)
        return wrapped, code
    if isinstance(fn, FunctionType) and (hasattr(fn, "get_compiler_config") or not isolates_recompiles()):
        code = code or fn.__code__.replace()
        return _with_code(fn, code), code
    return fn, code


# Module methods that `torch.compile` never adds a frame around; since 2.1.
_MODULE_CALLS = ("_call_impl", "_wrapped_call_impl", "_lazy_forward")


def _is_from_torch(forward: object) -> bool:
    """Return True for a plain method from a file that Dynamo skips. Other kinds of ``forward`` may have no file."""
    if not isinstance(forward, MethodType) or not isinstance(forward.__func__, FunctionType):
        return False
    return not hasattr(forward, "_torchdynamo_orig_callable") and bool(_is_skipped_file(forward))


def _with_code(fn: FunctionType, code: CodeType) -> FunctionType:
    """Copy the function with another code object, because Dynamo's cache and recompile limit belong to that."""
    twin = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__kwdefaults__ = fn.__kwdefaults__
    return twin


def is_inline_wrapper(code: CodeType) -> bool:
    """Return True for the frame that torch adds around callables without a frame of their own."""
    return code.co_filename == wrap_inline.__code__.co_filename


def isolates_recompiles() -> bool:
    """Return True if ``isolate_recompiles`` exists; since 2.12. Without it, `visible` copies code objects."""
    return hasattr(_eval_frame, "set_eval_frame_isolate_recompiles_id")


def interpose(compiled: object, wrap: Callable[[FrameCallback], FrameCallback]) -> bool:
    """Wrap the frame callback of a function that ``torch.compile`` returned.

    This is the only place from which a frame can be run eagerly, once, after any failure and before any of it has run.
    Dynamo has no hook for it. The callback is a closure variable of the function that ``torch.compile`` returns, since
    2.0. Essential.

    Returns:
        False if `compiled` did not come from Dynamo (a disabled or patched ``torch.compile``).

    Raises:
        UnsupportedTorchError: `compiled` came from Dynamo, but its callback was not found.
    """
    if not hasattr(compiled, "_torchdynamo_orig_callable"):
        return False
    code, closure = getattr(compiled, "__code__", None), getattr(compiled, "__closure__", None)
    if code is None or closure is None or "callback" not in code.co_freevars:
        raise UnsupportedTorchError(f"compile_retry cannot find Dynamo's frame callback in torch {torch.__version__}")
    cell = closure[code.co_freevars.index("callback")]
    inner = cell.cell_contents
    outer: Any = wrap(inner)
    # Dynamo follows this chain to the backend. The backend's identity determines which cache entries belong together.
    outer._torchdynamo_orig_backend = inner._torchdynamo_orig_backend
    cell.cell_contents = outer
    return True


def join_region(compiled: object, number: int | None) -> int | None:
    """Make a function that ``torch.compile`` returned use the cache entries of others.

    The function reads its region's number from its context, a closure variable, on each call; since 2.12. If it does
    not, or if torch has no regions, the functions share their entries unless they were isolated from each other.

    Args:
        compiled: The function.
        number: The number of the others' region; None for the first function.

    Returns:
        The number of the function's region; None if it has none.
    """
    code, closure = getattr(compiled, "__code__", None), getattr(compiled, "__closure__", None)
    if code is None or closure is None or "self" not in code.co_freevars:
        return number
    context = closure[code.co_freevars.index("self")].cell_contents
    if number is not None and hasattr(context, "_isolate_recompiles_id"):
        context._isolate_recompiles_id = number
    return getattr(context, "_isolate_recompiles_id", None)


def skips_guards() -> bool:
    """Return True under `set_stance(skip_guard_eval_unsafe=True)`, which disables guards. Since 2.6."""
    return bool(getattr(torch._dynamo.eval_frame._stance, "skip_guard_eval_unsafe", False))


def compiles_nothing_because() -> str:
    """Return, in words, which setting of torch makes it compile nothing; empty if there is none.

    Reads the stance, since 2.6, and Dynamo's config, since 2.0.
    """
    stance = getattr(getattr(torch._dynamo.eval_frame, "_stance", None), "stance", "default")
    if stance in ("force_eager", "eager_on_recompile"):
        return f"calls run eagerly under torch.compiler.set_stance({stance!r})"
    if torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE=1 or torch._dynamo.config.disable is set, so calls run eagerly"
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1 is set, so calls run eagerly"
    return ""


def recompiles_freely() -> bool:
    """Return True if Dynamo compiles a frame without fitting code: no stance, since 2.6, and no config forbids it."""
    config, stance = torch._dynamo.config, getattr(torch._dynamo.eval_frame, "_stance", None)
    return getattr(stance, "stance", "default") == "default" and not (config.error_on_recompile or config.disable)


def with_guards(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a compiled function that always evaluates guards.

    Without guards, Dynamo runs code compiled for other arguments, or raises if there is none, although the frame should
    run eagerly. The function that ``torch.compile`` returns checks the stance on each call, through a global name. The
    copy has another value for that name. If torch uses another function or name, the stance keeps its effect.
    """
    if not isinstance(compiled, FunctionType):
        return compiled
    names = dict(compiled.__globals__)
    twin = FunctionType(compiled.__code__, names, compiled.__name__, compiled.__defaults__, compiled.__closure__)
    twin.__kwdefaults__ = compiled.__kwdefaults__

    def run_with_guards(*args: Any, **kwargs: Any) -> Any:
        names.update(compiled.__globals__)  # the stance is one of them
        names["_is_skip_guard_eval_unsafe_stance"] = bool
        return twin(*args, **kwargs)

    return run_with_guards
