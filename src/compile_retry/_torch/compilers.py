"""The compiler that ``torch.compile`` passes captured graphs to.

Importing this module imports ``torch._dynamo``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from . import first_import  # noqa: F401  # before anything else imports Dynamo

# isort: split
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor

# A backend raises these to restart Dynamo's analysis or to skip the frame. They are not failures. Since 2.0. Essential.
from torch._dynamo.exc import RestartAnalysis, SkipFrame

# Makes forward and backward graphs from a captured graph; see `compiling_backward_too`.
from torch._functorch._aot_autograd import graph_compile
from torch.fx import GraphModule

_GRAPH_BREAKS: tuple[type[Exception], ...] = getattr(torch._dynamo.exc, "exceptions_allowed_to_be_fallback", ())


Compiler: TypeAlias = Callable[..., Callable[..., Any]]


def make_compiler(backend: object, mode: str | None, options: dict[str, Any] | None, dynamic: bool | None) -> Compiler:
    """Return the compiler that ``torch.compile`` would pass captured graphs to, built from torch's own classes.

    These are private, and ``torch.compile`` does not expose the object it builds. Since 2.0 (``use_aoti``: 2.8).
    Essential: only these classes implement ``mode`` and ``options``.
    """
    options = dict(options) if options else {}
    options.pop("guard_filter_fn", None)  # for Dynamo, not for the compiler
    use_aoti = options.pop("use_aoti", False)
    if backend is None:
        default = getattr(torch._dynamo.backends.registry, "get_default_backend", None)  # 2.12
        backend = default() if default is not None else "inductor"
    if backend != "inductor":
        wrapper: Compiler = torch._TorchCompileWrapper(backend, mode, options, dynamic)
    elif use_aoti:
        wrapper = torch._TorchCompileAOTInductorWrapper(mode, options, dynamic)
    else:
        wrapper = torch._TorchCompileInductorWrapper(mode, options, dynamic)
    return wrapper


def backends() -> list[str]:
    """Return the names of all registered backends."""
    names: list[str] = torch._dynamo.list_backends(None)
    return names


def inductor_modes() -> list[str]:
    """Return the names of Inductor's modes. Since 2.0."""
    return list(torch._inductor.list_mode_options())


def inductor_options() -> list[str]:
    """Return the names of Inductor's options and of those that ``torch.compile`` handles itself. Since 2.0."""
    return [*torch._inductor.list_options(), "guard_filter_fn", "use_aoti"]


def innermost(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function wrapped by ``torch.compile`` or ``torch.compiler.disable``. Since 2.0.

    Dynamo unwraps functions that are compiled twice, and functions that a backend returns. It could not see through our
    wrapper that the latter is already disabled, so each graph would disable Dynamo twice on every call.
    """
    inner: Callable[..., Any] = torch._dynamo.eval_frame.innermost_fn(fn)
    return inner


def has_dynamic_shapes(graph_module: GraphModule) -> bool:
    """Return True if a graph takes sizes as arguments, so that it fits other sizes than those of its example inputs."""
    inputs = graph_module.graph.find_nodes(op="placeholder")
    return any(isinstance(node.meta.get("example_value"), torch.SymInt) for node in inputs)


def is_for_dynamo(exc: BaseException) -> bool:
    """Return True if Dynamo handles this by a graph break, a skip or a restart when a backend raises it. Since 2.1."""
    return isinstance(exc, (RestartAnalysis, SkipFrame, *_GRAPH_BREAKS))


def compiling_backward_too() -> AbstractContextManager[object]:
    """Compile the backward graph together with the forward graph, while a failure can still be handled.

    If no gradient is needed there is no backward graph, and nothing changes. Since 2.10. Essential: otherwise a failing
    backward compile would raise in ``backward()``.
    """
    _disable_donated_buffers()
    patch: AbstractContextManager[object] = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    return patch


@functools.cache
def _disable_donated_buffers() -> None:
    """Disable donated buffers for backwards compiled ahead of time.

    Donated buffers exist since 2.5: a backward graph overwrites its saved tensors, and raises in
    ``backward(retain_graph=True)``. Stock torch compiles the backward when it runs, so it can disable them in that
    case. Setting `config.donated_buffer` to False does not help: the graph then has no list of donated buffers, which
    torch 2.13 treats like a list that is not empty. So this wraps the function that selects them. Other compiles are
    not affected. Without it, ``backward(retain_graph=True)`` raises.
    """
    choose = getattr(graph_compile, "collect_bw_donated_buffer_idxs", None)
    if choose is not None:  # pragma: no branch  # exists in the torch version that the tests use

        @functools.wraps(choose)
        def choose_unless_ours(*args: Any, **kwargs: Any) -> Any:
            return [] if torch._functorch.config.force_non_lazy_backward_lowering else choose(*args, **kwargs)

        graph_compile.collect_bw_donated_buffer_idxs = choose_unless_ours
