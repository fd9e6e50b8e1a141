"""One captured graph: an attempt to compile it, or the graph itself run eagerly, and what counts which of them ran."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, GraphModule

from . import _torch_internals as internals
from ._call import Attempt, Calls, Conversion, Tally
from ._control import Control
from ._failures import is_fatal
from ._fallbacks import Fallback
from ._healing import find_vector_instructions, heal, working_cache
from ._strict import is_strict
from ._torch_inductor import spare_other_threads

Code: TypeAlias = Callable[..., Any]

# Called before each run of a compiler; may raise what the compiler would have raised. For `compile_retry.testing`.
faults: list[Callable[[Attempt], None]] = []


class HeldOffError(Exception):
    """No attempt may be made now; the frame is to be run eagerly."""


class GraphBackend:
    """The backend that ``torch.compile`` is given: wraps the user's own for one decorated function."""

    def __init__(self, compiler: internals.Compiler, control: Control) -> None:
        self._compiler = compiler
        self._control = control
        self.__name__ = getattr(compiler, "compiler_name", "compile_retry")
        for attribute in ("get_compiler_config", "reset"):  # torch calls them where a backend has them
            if hasattr(compiler, attribute):
                setattr(self, attribute, getattr(compiler, attribute))

    def __call__(self, graph_module: GraphModule, example_inputs: list[Any], **from_torch: Any) -> Code:
        # `mode` and `options`, which torch hands back to a callable backend, are in the compiler already.
        control = self._control
        tally = control.calls.tally
        # Under the stances "eager_then_compile" and "aot_eager_then_compile" torch asks the backend behind the frame
        # callback's back. Then nobody is there to give way to, nor to remember a fallback.
        conversion = tally.conversion or Conversion(control.location, (), (), (), began=control.policy.clock())
        if not control.may_attempt(tally, conversion.fingerprint):
            if tally.conversion is None:
                return _counted_eager(graph_module.forward, control.calls)
            conversion.gave_way = True  # an attempt has failed since, in a call that was made while Dynamo traced
            raise HeldOffError(control.name)
        if control.breaker.episode is not None or control.interrupted:
            heal()
            control.interrupted = False
        kept = KeptGraph(graph_module)
        conversion.attempted = True
        tally.attempts += 1
        conversion.graph = tally.graphs_before + 1
        which = Attempt(control.name, conversion.graph)
        try:
            with (
                control.journal.attempt_started(tally, conversion.graph),
                working_cache(damaged=control.suspects_cache) as damaged,
            ):
                if self._is_for_this_processor(example_inputs):
                    find_vector_instructions()
                code = attempt(self._compiler, graph_module, example_inputs, which)
        except internals.CONTROL_FLOW:
            raise
        except Exception as exc:
            if not self._falls_back(exc, conversion, tally):
                raise
            return _counted_eager(kept.runner(), control.calls)
        except BaseException:
            control.interrupted = True
            raise
        control.succeeded(conversion, tally)
        if damaged is not None:
            control.journal.moved(tally, damaged)
        conversion.runner = _counted_compiled(code, control.calls)
        return conversion.runner

    def abandon(self) -> None:
        """The decorated function is gone. Dynamo keeps its backends, and what they compiled: make that little."""
        internals.abandon(self._control.entries)
        del self._control

    def _is_for_this_processor(self, example_inputs: list[Any]) -> bool:
        """Whether inductor needs to know the processor's vector instructions."""
        on_cpu = (isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in example_inputs)
        return self.__name__ == "inductor" and any(on_cpu)

    def _falls_back(self, exc: Exception, conversion: Conversion, tally: Tally) -> bool:
        """Book a failed attempt. Whether the graph is to run eagerly now, or the exception to leave the backend."""
        if is_fatal(exc):
            return False
        control = self._control
        failure = control.failed(exc, "backend", conversion, tally)
        if is_strict():
            conversion.raised = True
            return False
        if conversion.retrying is not None:
            control.fell_back(Fallback(conversion.fingerprint, conversion.retrying), failure.kind, tally)
        if conversion.retrying is not None or control.compiles(conversion.fingerprint) > conversion.compiles:
            # Dynamo still has the fallback that was to be replaced, or by now another thread's code for such a frame.
            control.fallbacks.remove(None, conversion.fingerprint)
            conversion.gave_way = True
            return False
        if conversion is not tally.conversion:
            control.fell_back(Fallback(conversion.fingerprint), "permanent", tally)
            control.journal.tell(tally)
        else:
            control.step.ran_eagerly(conversion.repeated, plainly=False)
            conversion.fallback = Fallback(conversion.fingerprint)
            control.fell_back(conversion.fallback, failure.kind, tally)
        return True


def attempt(compiler: internals.Compiler, graph_module: GraphModule, example_inputs: list[Any], which: Attempt) -> Code:
    """One run of the compiler: forward and backward of one graph.

    Everything that decides how an attempt is carried out belongs here: where it runs, and who takes part in it.
    """
    for fault in tuple(faults):
        fault(which)
    spare_other_threads()
    with internals.compiling_backward_too():
        code = internals.innermost(compiler(graph_module, example_inputs))
    # Generates the graph's own code, for a backend that runs the graph as it is. Otherwise it would be generated when
    # it is first run, maybe by two threads at once; and a `forward` taken before that takes a detour for good.
    graph_module.code  # noqa: B018
    return graph_module.forward if getattr(code, "__self__", None) is graph_module else code


class KeptGraph:
    """A graph as Dynamo captured it. A compiler may change the one it is given before it fails.

    Copies nodes and shares what they refer to: no tensor is copied.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph: Graph = copy.deepcopy(graph_module.graph)
        self._referred: dict[str, Any] = {}
        for node in self._graph.nodes:
            node.meta = {}  # fake tensors, and through them the whole of Dynamo's shape reasoning
            if node.op in ("get_attr", "call_module"):
                value = _resolve(graph_module, str(node.target))
                self._referred[str(node.target)] = KeptGraph(value) if isinstance(value, GraphModule) else value

    def module(self) -> GraphModule:
        referred = {
            name: value.module() if isinstance(value, KeptGraph) else value for name, value in self._referred.items()
        }
        return GraphModule(referred, self._graph)

    def runner(self) -> Code:
        """What runs this graph eagerly, operation by operation."""
        return self.module().forward


def _resolve(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _counted_compiled(code: Code, calls: Calls) -> Code:
    lane = calls.lane

    def run_compiled(*args: Any) -> Any:
        outer = internals.set_eval_frame(None)  # see `run_directly`
        try:
            if lane.left:
                lane.graphs += 1
            else:
                calls.tally.compiled += 1
            return code(*args)
        finally:
            internals.set_eval_frame(outer)

    return run_compiled


def _counted_eager(code: Code, calls: Calls) -> Code:
    def run_eager(*args: Any) -> Any:
        calls.tally.eager += 1
        return code(*args)

    return run_eager
