"""The compiler that ``torch.compile`` hands captured graphs to, and graphs as it gets them.

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

# The way in which an analysis is started again, and the way in which a backend asks for a frame to be skipped. Both
# leave a backend as exceptions without being failures. Since 2.0. Essential.
from torch._dynamo.exc import RestartAnalysis, SkipFrame

# Where forward and backward graphs are made from a captured one; see `compiling_backward_too`.
from torch._functorch._aot_autograd import graph_compile
from torch.fx import GraphModule

_GRAPH_BREAKS: tuple[type[Exception], ...] = getattr(torch._dynamo.exc, "exceptions_allowed_to_be_fallback", ())


Compiler: TypeAlias = Callable[..., Callable[..., Any]]


def make_compiler(backend: object, mode: str | None, options: dict[str, Any] | None, dynamic: bool | None) -> Compiler:
    """The compiler that ``torch.compile`` would hand captured graphs to, built by the classes it uses itself.

    Private because ``torch.compile`` keeps what it builds to itself. Since 2.0 (``use_aoti``: 2.8). Essential: only
    these give ``mode`` and ``options`` their meaning.
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
    """Names of the backends that can be given as a string."""
    names: list[str] = torch._dynamo.list_backends(None)
    return names


def inductor_modes() -> list[str]:
    """Names of inductor's modes. Since 2.0."""
    return list(torch._inductor.list_mode_options())


def inductor_options() -> list[str]:
    """Names of inductor's options, and of those that ``torch.compile`` takes for itself. Since 2.0."""
    return [*torch._inductor.list_options(), "guard_filter_fn", "use_aoti"]


def innermost(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function below ``torch.compile`` or ``torch.compiler.disable``. Since 2.0.

    Dynamo itself unwraps what it compiles a second time, and what a backend returns. Behind our wrapper it could not
    see that the latter is disabled already, and each graph would be switched off twice in each call.
    """
    inner: Callable[..., Any] = torch._dynamo.eval_frame.innermost_fn(fn)
    return inner


def has_dynamic_shapes(graph_module: GraphModule) -> bool:
    """True if a graph takes sizes as arguments, so that it fits more than its example inputs."""
    inputs = graph_module.graph.find_nodes(op="placeholder")
    return any(isinstance(node.meta.get("example_value"), torch.SymInt) for node in inputs)


def is_for_dynamo(exc: BaseException) -> bool:
    """True if Dynamo makes a graph break of this, or restarts its analysis, when a backend raises it. Since 2.1."""
    return isinstance(exc, (RestartAnalysis, SkipFrame, *_GRAPH_BREAKS))


def compiling_backward_too() -> AbstractContextManager[object]:
    """Make the backward graph's compile part of the forward's, where a failure of it can still be answered.

    Where no gradient is wanted there is no backward graph, and nothing changes. Since 2.10. Essential: otherwise a
    failing backward compile would surface in ``backward()``.
    """
    _donate_only_what_is_compiled_lazily()
    patch: AbstractContextManager[object] = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    return patch


@functools.cache
def _donate_only_what_is_compiled_lazily() -> None:
    """Keep a backward that is compiled before it is known how it will be called from overwriting its saved tensors.

    Such donated buffers are chosen since 2.5, and a graph that has them raises in ``backward(retain_graph=True)``;
    stock torch has seen by then that it must not choose any. To switch them off by `config.donated_buffer` does not
    help: then the graph keeps no list of them, and torch 2.13 takes that for a list that is not empty. So this is put
    in front of what chooses. For compiles that are not ours it changes nothing; without it that kind of call raises.
    """
    choose = getattr(graph_compile, "collect_bw_donated_buffer_idxs", None)
    if choose is not None:  # pragma: no branch  # it is there in the torch that the tests run on

        @functools.wraps(choose)
        def choose_unless_ours(*args: Any, **kwargs: Any) -> Any:
            return [] if torch._functorch.config.force_non_lazy_backward_lowering else choose(*args, **kwargs)

        graph_compile.collect_bw_donated_buffer_idxs = choose_unless_ours
