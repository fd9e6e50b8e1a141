"""The compiler that ``torch.compile`` passes captured graphs to.

Importing this module imports ``torch._dynamo``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
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

# Makes an autograd function of a forward and a backward graph; see `_spare_donated_buffers`.
from torch._functorch._aot_autograd import runtime_wrappers
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
    _spare_donated_buffers()
    patch: AbstractContextManager[object] = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    return patch


@functools.cache
def _spare_donated_buffers() -> None:
    """Let backwards compiled ahead of time run with ``retain_graph=True``.

    A backward graph may reuse the memory of saved tensors that are no graph output, the *donated buffers*; since 2.5.
    Stock torch compiles the backward when it first runs. If that retains the graph, none are donated; otherwise, a
    later ``backward(retain_graph=True)`` raises. Here it is not known yet how the backward will run. So the donated
    buffers are copied in each backward that retains the graph.

    Compiling without donated buffers would not do: a train step would take more memory than with stock, and the graph
    may come from Inductor's cache, whose keys do not say whether a graph has donated buffers.

    This wraps the function that makes an autograd function of both graphs. Other compiles are not affected. Without it,
    ``backward(retain_graph=True)`` raises, as in stock after a first backward that did not retain the graph.
    """
    make = getattr(runtime_wrappers.AOTDispatchAutograd, "post_compile", None)
    if make is None:  # pragma: no cover  # exists in the torch version that the tests use
        return
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_with_copies(*args: Any, **kwargs: Any) -> Any:
        if not torch._functorch.config.force_non_lazy_backward_lowering:
            return make(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        spec = call.arguments.get("spec")  # before 2.13, its fields are arguments
        found = call.arguments if spec is None else vars(spec)
        backward, metadata = found.get("compiled_bw_func"), found.get("fw_metadata")
        donated = getattr(metadata, "bw_donated_idxs", None)
        if backward is not None and donated:
            changes: dict[str, Any] = {"compiled_bw_func": _with_copies(backward, donated)}
            changes["fw_metadata"] = copy.copy(metadata)
            changes["fw_metadata"].bw_donated_idxs = []  # otherwise the autograd function raises by itself
            if spec is None:  # pragma: no cover  # the torch version that the tests use has it
                call.arguments.update(changes)
            else:
                call.arguments["spec"] = dataclasses.replace(spec, **changes)
        return make(*call.args, **call.kwargs)

    where: Any = runtime_wrappers.AOTDispatchAutograd
    where.post_compile = staticmethod(make_with_copies)


def _with_copies(backward: Callable[..., Any], donated: list[int]) -> Callable[..., Any]:
    """Return a backward graph that copies these arguments if the saved tensors will be used again."""
    backward = innermost(backward)
    is_boxed = getattr(backward, "_boxed_call", False)

    def call(*args: Any) -> Any:
        arguments = args[0] if is_boxed else list(args)  # a boxed call empties the list
        if torch._C._autograd._get_current_graph_task_keep_graph():
            for index in donated:
                arguments[index] = _copied(arguments[index])
        return backward(arguments) if is_boxed else backward(*arguments)

    disabled: Any = torch._dynamo.disable(call, reason="a compiled backward")
    disabled._boxed_call = is_boxed
    result: Callable[..., Any] = disabled
    return result


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor with its strides, which a compiled graph relies on."""
    if tensor.numel() == 0:
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride())
