"""One captured graph: an attempt to compile it, and what counts how often its code runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule

from compile_retry._torch import dynamo as internals
from compile_retry._torch.distributed import collectives_in
from compile_retry._torch.inductor import spare_other_threads

from .call import Attempt, Calls, Conversion, Tally
from .control import Control
from .frameless import FramelessGraph
from .healing import find_vector_instructions, heal, working_cache

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
        conversion = tally.conversion
        if conversion is None:
            return self._for_nobodys_frame(graph_module, example_inputs)
        if not control.may_attempt(tally, conversion.key):
            conversion.gave_way = True  # an attempt has failed since, in a call that was made while Dynamo traced
            raise HeldOffError(control.name)
        conversion.runner = self._compile(graph_module, example_inputs, conversion, tally)
        return conversion.runner

    def _for_nobodys_frame(self, graph_module: GraphModule, example_inputs: list[Any]) -> Code:
        graph = FramelessGraph(graph_module, self._compile, self._control)
        return graph.first_attempt(graph_module, example_inputs) or graph.__call__

    def _compile(
        self, graph_module: GraphModule, example_inputs: list[Any], conversion: Conversion, tally: Tally
    ) -> Code:
        """Run the compiler, with what it takes to succeed after a failure. What it raises leaves as it is.

        Dynamo makes graph breaks of some exceptions; the frame callback answers the others.
        """
        control = self._control
        if control.breaker.episode is not None or control.interrupted:
            heal()
            control.interrupted = False
        tally.attempts += 1
        conversion.graph, conversion.stage = tally.graphs_before + 1, "backend"
        conversion.is_dynamic |= internals.has_dynamic_shapes(graph_module)
        control.has_seen(collectives_in(graph_module))
        which = Attempt(control.name, conversion.graph)
        try:
            with (
                control.journal.attempt_started(tally, conversion.graph),
                working_cache(damaged=control.suspects_cache) as damaged,
            ):
                if self._is_for_this_processor(example_inputs):
                    find_vector_instructions()
                code = attempt(self._compiler, graph_module, example_inputs, which)
        except Exception:
            raise
        except BaseException:
            control.interrupted = True
            raise
        conversion.stage = "trace"  # if anything fails now, it is Dynamo
        control.succeeded(conversion, tally)
        if damaged is not None:
            control.journal.moved(tally, damaged)
        return _counted(code, control.calls)

    def abandon(self) -> None:
        """The decorated function is gone. Dynamo keeps its backends, and what they compiled: make that little."""
        internals.abandon(self._control.entries)
        del self._control

    def _is_for_this_processor(self, example_inputs: list[Any]) -> bool:
        """Whether inductor needs to know the processor's vector instructions."""
        on_cpu = (isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in example_inputs)
        return self.__name__ == "inductor" and any(on_cpu)


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


def _counted(code: Code, calls: Calls) -> Code:
    def run_compiled(*args: Any) -> Any:
        outer = internals.set_eval_frame(None)  # see `run_directly`
        try:
            calls.tally.compiled += 1
            return code(*args)
        finally:
            internals.set_eval_frame(outer)

    return run_compiled
