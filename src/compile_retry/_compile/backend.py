"""The backend: compile one captured graph, and count each run of its code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from torch.fx import GraphModule

from compile_retry._torch import compilers
from compile_retry._torch import frames as torch_frames
from compile_retry._torch.autotuning import watching_autotuning
from compile_retry._torch.distributed import collectives_in
from compile_retry._torch.inductor import isolate_first_trace

from .admission import Admission
from .call import Attempt, Calls, Conversion, Tally
from .frameless import FramelessGraph
from .healing import heal, reliable_probes, working_cache
from .outcomes import Outcomes

Code: TypeAlias = Callable[..., Any]

# Called before each run of a compiler; may raise in the compiler's place. For `compile_retry.testing`.
faults: list[Callable[[Attempt], None]] = []


class HeldOffError(Exception):
    """Raised by the backend if no attempt may be made now, so the frame must run eagerly."""


class GraphBackend:
    """The backend passed to ``torch.compile`` for one decorated function. Wraps the user's backend."""

    def __init__(self, compiler: compilers.Compiler, calls: Calls, admission: Admission, outcomes: Outcomes) -> None:
        self._compiler = compiler
        self._calls, self._admission, self._outcomes = calls, admission, outcomes
        self._interrupted = False
        self.__name__ = getattr(compiler, "compiler_name", "compile_retry")
        if hasattr(compiler, "get_compiler_config"):  # torch calls it if a backend has it
            self.get_compiler_config = compiler.get_compiler_config
        self.was_reset = False

    def __call__(self, graph_module: GraphModule, example_inputs: list[Any], **from_torch: Any) -> Code:
        # torch passes `mode` and `options` to a callable backend; the compiler already has them.
        tally = self._calls.tally
        conversion = tally.conversion
        if conversion is None:
            return self._for_graph_without_frame(graph_module, example_inputs)
        if not self._admission.may_attempt(tally, conversion.key):
            conversion.gave_way = True  # an attempt has failed since, in a call made while Dynamo traced
            raise HeldOffError(self._outcomes.name)
        conversion.runner = self._compile(graph_module, example_inputs, conversion, tally)
        return conversion.runner

    def _for_graph_without_frame(self, graph_module: GraphModule, example_inputs: list[Any]) -> Code:
        graph = FramelessGraph(graph_module, self._compile, self._calls, self._admission, self._outcomes)
        return graph.first_attempt(graph_module, example_inputs) or graph.__call__

    def _compile(
        self, graph_module: GraphModule, example_inputs: list[Any], conversion: Conversion, tally: Tally
    ) -> Code:
        """Run the compiler, after clearing what PyTorch remembers of an earlier failure.

        Exceptions are not changed: Dynamo turns some into graph breaks, and the frame callback handles the others.
        """
        outcomes = self._outcomes
        if outcomes.is_held_off or self._interrupted or conversion.is_retuning:
            heal()
            self._interrupted = False
        conversion.is_dynamic |= compilers.has_dynamic_shapes(graph_module)
        outcomes.saw_collectives(collectives_in(graph_module))
        compiler_runs = outcomes.compiler_runs(tally, conversion)
        which = Attempt(self._outcomes.name, conversion.graph)
        try:
            with (
                compiler_runs,
                working_cache(damaged=outcomes.suspects_cache) as usual,
                reliable_probes(),
                watching_autotuning(conversion.tuning, uses_inductor=self.__name__ == "inductor"),
            ):
                code = attempt(self._compiler, graph_module, example_inputs, which)
        except Exception:
            raise
        except BaseException:
            self._interrupted = True  # what the attempt has left may need healing too
            raise
        succeeded = partial(outcomes.succeeded, conversion, tally, left=usual)
        if outcomes.agreement is None:
            succeeded()
        else:
            conversion.once_agreed = succeeded
        return _counted(code, self._calls)

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset()``."""
        self.was_reset = True
        getattr(self._compiler, "reset", lambda: None)()

    def abandon(self) -> None:
        """Release most references: the function is gone, but Dynamo keeps its backends and their code."""
        del self._admission, self._outcomes


def attempt(compiler: compilers.Compiler, graph_module: GraphModule, example_inputs: list[Any], which: Attempt) -> Code:
    """Run the compiler once, for the forward and backward of one graph.

    Everything that determines how an attempt is carried out belongs here: where it runs, and who takes part in it.
    """
    for fault in tuple(faults):
        fault(which)
    isolate_first_trace()
    with compilers.compiling_backward_too():
        code = compilers.innermost(compiler(graph_module, example_inputs))
    # Generate the graph module's code now, for a backend that returns the graph unchanged. Otherwise the first run
    # would generate it, possibly in two threads at once, and a `forward` read before that would stay slower for good.
    graph_module.code  # noqa: B018  # a property
    return graph_module.forward if getattr(code, "__self__", None) is graph_module else code


def _counted(code: Code, calls: Calls) -> Code:
    def run_compiled(*args: Any) -> Any:
        outer = torch_frames.set_eval_frame(None)  # see `run_directly`
        try:
            calls.tally.compiled += 1
            return code(*args)
        finally:
            torch_frames.set_eval_frame(outer)

    return run_compiled
