"""Running programs eagerly, under stock torch.compile and under the library, and comparing the results."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from compile_retry import (
    CompiledFunction,
    CompileState,
    CompileStats,
    RetryPolicy,
    compile_with_fallback,
    compiled_function,
)
from programs.program import Call, Function, Program
from support import full_disk

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)


class Backend:
    """A backend that counts the graphs that it compiles and runs, and fails in one attempt."""

    def __init__(self, kind: str, failing: int | None = None) -> None:
        self.failing = failing
        self.asked = 0
        self.ran = 0
        self._compile = self._aot if kind == "aot" else self._whole
        self._inner = torch._dynamo.lookup_backend("inductor") if kind == "inductor" else None

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Function:
        return self._compile(graph, inputs)

    def _whole(self, graph: GraphModule, inputs: list[Tensor]) -> Function:
        self._attempt()
        return self._counted(self._inner(graph, inputs) if self._inner else graph.forward)

    def _aot(self, graph: GraphModule, inputs: list[Tensor]) -> Function:
        compiled: Function = aot_autograd(fw_compiler=self._part, bw_compiler=self._part)(graph, inputs)
        return compiled

    def _part(self, graph: GraphModule, inputs: list[Tensor]) -> Function:
        self._attempt()
        boxed: Function = make_boxed_func(self._counted(graph.forward))
        return boxed

    def _attempt(self) -> None:
        self.asked += 1
        if self.asked == self.failing:
            raise full_disk()

    def _counted(self, code: Function) -> Function:
        def run(*args: Any) -> Any:
            self.ran += 1
            return code(*args)

        return run


class Raised(NamedTuple):
    """An exception that reached the caller, and the type of its cause."""

    error_type: str
    args: object
    cause: str


class Generators(NamedTuple):
    """Hashes of the states of the random generators."""

    torch: int
    random: int
    numpy: int


class Seen(NamedTuple):
    """A user's view of one call."""

    result: object
    watched: object
    log: object
    generators: Generators
    modes: object


class Work(NamedTuple):
    """The compiler's part in one call: attempts, graphs run and graph breaks."""

    asked: int
    ran: int
    breaks: int


class Run(NamedTuple):
    """All calls of a program in one run of several rounds."""

    seen: list[Seen]
    work: list[Work]
    ran_as: list[str]
    state: CompileState = CompileState.PENDING
    failures: int = 0
    last_failure: str = ""


ROUNDS = 3


def eagerly(program: Program) -> Run:
    """Run a program without a compiler."""
    return _run(program, lambda fn: fn, None)


def stock(program: Program) -> Run:
    """Run a program under torch.compile."""
    backend = Backend(program.backend)
    options: dict[str, Any] = {**program.options, "backend": backend}

    def compile_it(fn: Function) -> Function:
        if isinstance(fn, torch.nn.Module):
            fn.compile(**options)
            return fn
        return torch.compile(fn, **options)

    return _run(program, compile_it, backend)


def ours(program: Program, *, failing: int | None = None) -> Run:
    """Run a program under compile_with_fallback. Attempt number `failing`, from 1, hits a full disk."""
    backend = Backend(program.backend, failing)
    options: dict[str, Any] = {**program.options, "backend": backend, "policy": EVERY_CALL}
    compiled: list[CompiledFunction[..., Any]] = []

    def compile_it(fn: Function) -> Function:
        decorated: Function = compile_with_fallback(fn, **options)
        compiled.append(compiled_function(decorated))
        return decorated

    run = _run(program, compile_it, backend, lambda: compiled[0].stats)
    (fn,) = compiled
    return run._replace(state=fn.state, failures=fn.stats.failures, last_failure=str(fn.last_failure))


def _run(
    program: Program,
    compile_it: Callable[[Function], Function],
    backend: Backend | None,
    stats: Callable[[], CompileStats] | None = None,
) -> Run:
    torch._dynamo.reset()
    torch.manual_seed(0)
    run = Run([], [], [])
    with program.within():
        made = program.make()
        function = compile_it(made.function)
        for number, call in enumerate(itertools.chain.from_iterable([made.calls] * ROUNDS)):
            _seed(number)
            if isinstance(made.log, list):
                made.log.clear()
            worked, booked = _work(backend), stats() if stats else None
            result = _outcome(call, function)
            run.seen.append(Seen(result, frozen(made.watched), frozen(made.log), _generators(), _modes()))
            run.work.append(Work(*(after - before for after, before in zip(_work(backend), worked, strict=True))))
            run.ran_as.append(_ran_as(booked, stats()) if stats and booked else "")
    torch._dynamo.reset()
    return run


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  # programs may use it


def _generators() -> Generators:
    _, key, position, *_ = np.random.get_state()  # noqa: NPY002  # programs may use it
    numpy = hash((np.asarray(key).tobytes(), position))
    return Generators(hash(torch.get_rng_state().numpy().tobytes()), hash(random.getstate()), numpy)


def _work(backend: Backend | None) -> Work:
    breaks = sum(counters["graph_break"].values())
    return Work(backend.asked, backend.ran, breaks) if backend else Work(0, 0, breaks)


def _ran_as(before: CompileStats, after: CompileStats) -> str:
    kinds = {kind for kind in ("compiled", "mixed", "eager") if _calls(after, kind) > _calls(before, kind)}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _calls(stats: CompileStats, kind: str) -> int:
    count: int = getattr(stats, f"{kind}_calls")
    return count


def _outcome(call: Call, function: Function) -> object:
    try:
        return frozen(call(function))
    except Exception as exc:
        return Raised(_type(exc), frozen(exc.args), _type(exc.__cause__))


def _modes() -> object:
    """Return this thread's modes, and reset them for the next call."""
    seen = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._len_torch_function_stack(),
    )
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)
    torch.set_default_dtype(torch.float32)
    return seen


def _type(value: object) -> str:
    """Return the name of a value's type, because programs define their classes anew in each run."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def frozen(value: object) -> object:
    """Return a copy of a value for later comparison: nested tuples of type names, tensors and plain objects."""
    if isinstance(value, Tensor):
        return _frozen_tensor(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return _type(value), str(value.dtype), torch.as_tensor(value.copy())
    parts = _parts(value)
    return value if parts is None else (_type(value), [(key, frozen(part)) for key, part in parts])


def _parts(value: object) -> Iterable[tuple[object, object]] | None:
    """Return the parts of a value, bypassing methods of subclasses, or None if it has none."""
    if isinstance(value, torch.nn.Module):
        return [("training", value.training), *value.named_parameters(), *value.named_buffers()]
    if hasattr(value, "state_dict"):
        return _parts(value.state_dict())
    if isinstance(value, dict):
        return [(key, dict.__getitem__(value, key)) for key in dict.__iter__(value)]
    if isinstance(value, (list, tuple)):
        return enumerate(list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value))
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return None


@torch.no_grad()
def _frozen_tensor(value: Tensor) -> object:
    grad = frozen(value.grad) if value.is_leaf else None
    about = _type(value), str(value.dtype), value.requires_grad, grad
    if isinstance(value, DTensor):
        return *about, str(value.placements), value.to_local().detach().clone()
    if value.is_nested:
        return *about, [part.detach().clone() for part in value.unbind()]
    if is_traceable_wrapper_subclass(value):
        names, context = value.__tensor_flatten__()
        return *about, context, [(name, frozen(getattr(value, name))) for name in names]
    plain = value.detach().as_subclass(Tensor)
    return *about, plain.stride(), plain.clone()


def difference(a: object, b: object, where: str = "") -> str | None:
    """Return the first difference between two frozen values in words, or None if they are equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        try:
            torch.testing.assert_close(a, b, equal_nan=True)
        except AssertionError as exc:
            return f"{where}: {' '.join(str(exc).split())}"
        return None
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if type(a) is not type(b) or len(a) != len(b):
            return f"{where}: {a!r} and {b!r}"
        names: Sequence[object] = getattr(a, "_fields", range(len(a)))
        parts = (difference(x, y, f"{where}.{name}") for name, x, y in zip(names, a, b, strict=True))
        return next((part for part in parts if part), None)
    return None if type(a) is type(b) and a == b else f"{where}: {a!r} and {b!r}"
