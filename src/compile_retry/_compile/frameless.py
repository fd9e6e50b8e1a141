"""Graphs that Dynamo compiles without the frame callback, so that there is no frame to run instead.

Under the stances that compile later, and with compiled autograd, Dynamo calls the backend directly. A failure there
must not reach the training loop, so the graph itself runs eagerly. This is the only place where that happens. Dynamo
keeps the graph in its cache, and the graph retries when an attempt is due.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from types import CodeType
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, GraphModule

from compile_retry._failures import is_fatal
from compile_retry._torch import compilers
from compile_retry._torch import frames as torch_frames

from .admission import Admission
from .call import Calls, Conversion, Tally
from .frame_key import FrameKey
from .outcomes import Outcomes

Code: TypeAlias = Callable[..., Any]
# Runs the compiler and returns the function that runs its code.
Compile: TypeAlias = Callable[[GraphModule, list[Any], Conversion, Tally], Code]


class FramelessGraph:
    """A graph that runs eagerly until an attempt for it succeeds.

    A retry compiles for the arguments at hand, not for all arguments that Dynamo's guards accept. So its code is used
    only for arguments with equal metadata, and a graph that takes a size or another number as an argument is never
    retried.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        compile_graph: Compile,
        calls: Calls,
        admission: Admission,
        outcomes: Outcomes,
    ) -> None:
        self._kept = KeptGraph(graph_module)
        self._module = self._kept.module()
        self._has_numbers = any(
            isinstance(node.meta.get("example_value"), (torch.SymInt, torch.SymFloat, torch.SymBool))
            for node in graph_module.graph.find_nodes(op="placeholder")
        )
        self._compile = compile_graph
        self._calls, self._admission, self._outcomes = calls, admission, outcomes
        code: CodeType = type(self._module).forward.__code__  # unique: generated for this graph
        self._key = FrameKey(code)
        self._codes: dict[Hashable, Code] = {}
        weakref.finalize(self, admission.forget_code, code).atexit = False

    def first_attempt(self, graph_module: GraphModule, example_inputs: list[Any]) -> Code | None:
        """Compile the graph. Return None if that fails or is held off; raise what Dynamo turns into a graph break."""
        return self._attempt(graph_module, example_inputs)

    def __call__(self, *args: Any) -> Any:
        """Run the graph, compiled if a retry has succeeded. Retry first if an attempt is due."""
        tally = self._calls.tally
        metadata = torch.is_grad_enabled(), _metadata(args)
        if metadata not in self._codes and self._is_due(tally):
            with torch_frames.compile_lock():
                if self._is_due(tally) and (code := self._attempt(self._kept.module(), _unboxed(args))) is not None:
                    self._codes[metadata] = code
            self._outcomes.tell()
        code = self._codes.get(metadata)
        if code is not None:
            return code(*args)
        self._admission.ran_eagerly(self._key.code)
        tally.eager += 1
        if self._admission.is_given_up(self._key):
            tally.given_up += 1
        elif self._has_numbers:
            tally.at_end.append(partial(self._outcomes.no_retry_will_come, self._key, tally))
        return self._module.forward(*args)

    def _is_due(self, tally: Tally) -> bool:
        return not self._has_numbers and self._admission.admits(tally, self._key)

    def _attempt(self, graph_module: GraphModule, example_inputs: list[Any]) -> Code | None:
        outcomes, tally = self._outcomes, self._calls.tally
        conversion = outcomes.begin(self._key)
        if not self._admission.may_attempt(tally, self._key):
            self._admission.refused(tally, self._key)
            outcomes.postponed(tally)
            return None
        compile_graph = partial(self._compile, graph_module, example_inputs, conversion, tally)
        if (agreement := outcomes.agreement) is not None:
            together = outcomes.attempt_together(
                agreement,
                compile_graph,
                conversion,
                tally,
                raises=_must_be_raised,
                can_be_retried=not self._has_numbers,
            )
            if together is not None:
                outcomes.compiled(conversion, tally)
            return together
        try:
            code = compile_graph()
        except Exception as exc:
            if _must_be_raised(exc):
                raise
            outcomes.doubt(exc, conversion, tally, can_be_retried=not self._has_numbers)
            # Outside a call nothing else would settle it.
            if not tally.call:  # pragma: no cover  # today torch calls the backend within calls only
                outcomes.settle(tally, program_raised=False)
            return None
        outcomes.compiled(conversion, tally)
        outcomes.retuning.compiled(conversion, tally, None, outcomes.seconds_since(conversion))
        return code


def _must_be_raised(exc: Exception) -> bool:
    return is_fatal(exc) or compilers.is_for_dynamo(exc)


def _metadata(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, (tuple, list)):  # compiled autograd passes its inputs in a list
        return type(value), *map(_metadata, value)
    return type(value), value


def _unboxed(args: tuple[Any, ...]) -> list[Any]:
    """Copy the lists among the arguments, because the compiler may empty them."""
    return [list(value) if isinstance(value, list) else value for value in args]


# Node metadata to keep: whether this argument is a list to be emptied (compiled autograd; since 2.3).
_KEPT_META = ("steal_arg",)


class KeptGraph:
    """A copy of a graph as Dynamo captured it, because a compiler may modify its input before it fails.

    Nodes are copied, but the attributes and tensors that they refer to are shared.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph: Graph = copy.deepcopy(graph_module.graph)
        self._referred: dict[str, Any] = {}
        for node in self._graph.nodes:
            # Drop the fake tensors, which would keep Dynamo's whole shape environment alive.
            node.meta = {key: value for key, value in node.meta.items() if key in _KEPT_META}
            if node.op in ("get_attr", "call_module"):
                value = _resolve(graph_module, str(node.target))
                self._referred[str(node.target)] = KeptGraph(value) if isinstance(value, GraphModule) else value

    def module(self) -> GraphModule:
        """Return a new graph module, to run or to pass to a compiler."""
        referred = {
            name: value.module() if isinstance(value, KeptGraph) else value for name, value in self._referred.items()
        }
        return GraphModule(referred, copy.deepcopy(self._graph))


def _resolve(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
