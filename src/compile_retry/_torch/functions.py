"""The function that ``torch.compile`` takes, and the one that it returns.

Importing this module imports ``torch._dynamo``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

from . import first_import  # noqa: F401  # before anything else imports Dynamo

# isort: split
import torch

# The C half of Dynamo, since 2.0. Essential.
import torch._C._dynamo.eval_frame as _eval_frame
import torch._dynamo

# What `torch.compile` itself puts round callables without a frame of their own; since 2.1. Essential.
from torch._dynamo.external_utils import wrap_inline

# Which frames Dynamo leaves alone; since 2.0. Essential, as in `frames`.
from torch._dynamo.trace_rules import check as _is_skipped_file

from .frames import FrameCallback


class UnsupportedTorchError(RuntimeError):
    """This version of PyTorch has changed where the library must reach into it."""


def visible(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function in the form that Dynamo can capture.

    Dynamo skips frames of torch.nn's own files, so of a module's call it captures the module's ``forward``. Where that
    is torch.nn's own too, as in a Sequential, ``module.compile()`` silently compiles nothing; ``torch.compile(module)``
    adds a frame round the call, and so does this. Since 2.1. Anything else is left to ``torch.compile``, also a
    ``forward`` that has been replaced by a partial, a callable object or a compiled function.

    Before 2.12 the wrappers of one code object share a recompile limit, so there each gets a copy of the code. A
    function round a compiled one gets one too: ``functools.wraps`` has copied a mark that ``torch.compile`` refuses.
    """
    module, name = getattr(fn, "__self__", None), getattr(fn, "__name__", None)
    if isinstance(module, torch.nn.Module) and name in _MODULE_CALLS and _is_from_torch(module.forward):
        wrapped: Callable[..., Any] = wrap_inline(fn)
        return wrapped
    if isinstance(fn, FunctionType) and (hasattr(fn, "get_compiler_config") or not isolates_recompiles()):
        return _with_own_code(fn)
    return fn


# The methods of a module that `torch.compile` never adds a frame round; since 2.1.
_MODULE_CALLS = ("_call_impl", "_wrapped_call_impl", "_lazy_forward")


def _is_from_torch(forward: object) -> bool:
    """Check for a plain method from a file that Dynamo skips. Another kind of ``forward`` may have no file."""
    if not isinstance(forward, MethodType) or not isinstance(forward.__func__, FunctionType):
        return False
    return not hasattr(forward, "_torchdynamo_orig_callable") and bool(_is_skipped_file(forward))


def _with_own_code(fn: FunctionType) -> FunctionType:
    """The same function with a code object of its own, to which Dynamo ties its cache and its recompile limit."""
    twin = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__kwdefaults__ = fn.__kwdefaults__
    return twin


def is_inline_wrapper(code: CodeType) -> bool:
    """Whether this is the frame that torch puts round callables that have none of their own."""
    return code.co_filename == wrap_inline.__code__.co_filename


def isolates_recompiles() -> bool:
    """Whether ``isolate_recompiles`` exists; since 2.12. See `visible` for what is done without it."""
    return hasattr(_eval_frame, "set_eval_frame_isolate_recompiles_id")


def interpose(compiled: object, wrap: Callable[[FrameCallback], FrameCallback]) -> bool:
    """Put a callback of ours in front of the one with which a ``torch.compile``d function has its frames compiled.

    Dynamo offers no hook there, and it is the only place where a frame can be run eagerly once, whatever failed, before
    anything of it has run. The callback is a closure variable of the function that ``torch.compile`` returns; so it has
    been since 2.0. Essential.

    Returns:
        False if `compiled` did not come from Dynamo (a disabled or patched ``torch.compile``).

    Raises:
        UnsupportedTorchError: It came from Dynamo, but not in the shape this module knows.
    """
    if not hasattr(compiled, "_torchdynamo_orig_callable"):
        return False
    code, closure = getattr(compiled, "__code__", None), getattr(compiled, "__closure__", None)
    if code is None or closure is None or "callback" not in code.co_freevars:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} keeps its frame callback where compile_retry cannot find it"
        )
    cell = closure[code.co_freevars.index("callback")]
    inner = cell.cell_contents
    outer: Any = wrap(inner)
    # Dynamo walks this chain to the backend, whose identity decides which cache entries belong together.
    outer._torchdynamo_orig_backend = inner._torchdynamo_orig_backend
    cell.cell_contents = outer
    return True


def skips_guards() -> bool:
    """True under `set_stance(skip_guard_eval_unsafe=True)`, which switches guards off. Since 2.6."""
    return bool(getattr(torch._dynamo.eval_frame._stance, "skip_guard_eval_unsafe", False))


def with_guards(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Make a twin of a compiled function whose guards are always evaluated.

    Without guards Dynamo runs code that it has for other arguments, or raises because it has none, where we run
    eagerly. The function that ``torch.compile`` returns asks for the stance in each call, by a global name; so this is
    the same function with another answer there. Where it is another function or name, the stance stays as it is.
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
