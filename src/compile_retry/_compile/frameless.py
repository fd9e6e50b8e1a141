"""Graphs that torch has compiled behind the frame callback's back, so that there is no frame to run in their place.

Under the stances that compile later, and for compiled autograd, Dynamo asks the backend itself. A failure must not
reach the loop there, so the graph is run eagerly: the one place where that is done. It stays in Dynamo's cache, and
tries again by itself when the policy says so.
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
# Runs the compiler, and returns what runs its code.
Compile: TypeAlias = Callable[[GraphModule, list[Any], Conversion, Tally], Code]


class FramelessGraph:
    """A graph that is run eagerly until an attempt for it succeeds.

    Code from a retry is made for arguments that are there, not for all that Dynamo's guards let through. So it is used
    for those that look the same, and never made where a size or another number is an argument.
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
        code: CodeType = type(self._module).forward.__code__  # its own: it was generated for this graph
        self._key = FrameKey(code)
        self._codes: dict[Hashable, Code] = {}
        weakref.finalize(self, admission.strike_out, code).atexit = False

    def first_attempt(self, graph_module: GraphModule, example_inputs: list[Any]) -> Code | None:
        """Compile it; None if that fails or may not be done now. Raises what Dynamo makes a graph break of."""
        return self._attempt(graph_module, example_inputs)

    def __call__(self, *args: Any) -> Any:
        """Run the graph, compiled if a retry has succeeded, and retry if that is due."""
        tally = self._calls.tally
        looks = torch.is_grad_enabled(), _looks(args)
        if looks not in self._codes and self._is_due(tally):
            with torch_frames.compile_lock():
                if self._is_due(tally) and (code := self._attempt(self._kept.module(), _unboxed(args))) is not None:
                    self._codes[looks] = code
            self._outcomes.tell()
        code = self._codes.get(looks)
        if code is not None:
            return code(*args)
        self._admission.ran_eagerly(self._key.code)
        tally.eager += 1
        if self._has_numbers:
            tally.at_end.append(partial(self._outcomes.no_retry_will_come, self._key, tally))
        return self._module.forward(*args)

    def _is_due(self, tally: Tally) -> bool:
        return not self._has_numbers and self._admission.admits(tally, self._key)

    def _attempt(self, graph_module: GraphModule, example_inputs: list[Any]) -> Code | None:
        outcomes, tally = self._outcomes, self._calls.tally
        conversion = outcomes.begin(self._key)
        if not self._admission.may_attempt(tally, self._key):
            self._admission.refused(tally, self._key)
            return None
        try:
            code = self._compile(graph_module, example_inputs, conversion, tally)
        except Exception as exc:
            if is_fatal(exc) or compilers.is_for_dynamo(exc):
                raise
            outcomes.doubt(exc, conversion, tally, can_be_retried=not self._has_numbers)
            if not tally.call:  # pragma: no cover  # torch asks within calls only, today; nothing else would settle it
                outcomes.settle(tally, program_raised=False)
            return None
        outcomes.compiled(conversion)
        return code


def _looks(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, (tuple, list)):  # compiled autograd passes its inputs on in a list
        return type(value), *map(_looks, value)
    return type(value), value


def _unboxed(args: tuple[Any, ...]) -> list[Any]:
    """The arguments for a compiler, which may empty a list of them."""
    return [list(value) if isinstance(value, list) else value for value in args]


# Of what Dynamo notes beside a node: whether this argument is a list that is to be emptied (compiled autograd; 2.3).
_KEPT_META = ("steal_arg",)


class KeptGraph:
    """A graph as Dynamo captured it. A compiler may change the one it is given before it fails.

    Copies nodes and shares what they refer to: no tensor is copied.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph: Graph = copy.deepcopy(graph_module.graph)
        self._referred: dict[str, Any] = {}
        for node in self._graph.nodes:
            # Not the fake tensors, and through them the whole of Dynamo's shape reasoning.
            node.meta = {key: value for key, value in node.meta.items() if key in _KEPT_META}
            if node.op in ("get_attr", "call_module"):
                value = _resolve(graph_module, str(node.target))
                self._referred[str(node.target)] = KeptGraph(value) if isinstance(value, GraphModule) else value

    def module(self) -> GraphModule:
        """A graph module of its own, to be run or to be given to a compiler."""
        referred = {
            name: value.module() if isinstance(value, KeptGraph) else value for name, value in self._referred.items()
        }
        return GraphModule(referred, copy.deepcopy(self._graph))


def _resolve(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
