"""The cost of a call: compiled, held off, with many graphs, with many parameters."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import tracemalloc
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from compile_retry import CompileState, RetryPolicy
from subjects import BARE, EAGER, LATCH, OURS, RETRY, SUBJECTS, SUPPRESS, Step, Subject

# Each subject is measured once per lap, so that a slow phase of the machine affects all of them.
LAPS = range(35)

# Copies of one function differ by 0.2 us, depending on their location in memory, so each lap uses the next copy.
COPIES = 7


class Work(NamedTuple):
    """A step, and how often to call it in one measurement.

    Attributes:
        step: The function.
        arguments: Its arguments.
        calls: Calls per round; a round yields their mean.
        rounds: Number of rounds.
        options: Options for ``torch.compile``.
    """

    step: Step
    arguments: tuple[Any, ...]
    calls: int
    rounds: int
    options: dict[str, Any]


def elementwise(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sin() + x * y.cos()


@functools.cache  # all subjects read and write the same memory
def small() -> Work:
    """Takes about 15 us when compiled."""
    return Work(elementwise, (torch.rand(2048), torch.rand(2048)), calls=1000, rounds=4, options={})


@functools.cache
def medium() -> Work:
    """The forward and backward pass of a small network: about 5 ms."""
    network = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(4)))
    inputs = torch.rand(864, 256)

    def loss(x: Tensor) -> Tensor:
        result: Tensor = network(x).square().mean()
        return result

    return Work(loss, (inputs,), calls=1, rounds=30, options={})


def many_graphs(graphs: int) -> Work:
    """Unrolled, because Dynamo runs a frame eagerly if its graph breaks inside a loop."""
    lines = ["x = x + 1; torch._dynamo.graph_break()"] * (graphs - 1)
    namespace: dict[str, Any] = {"torch": torch}
    source = "\n    ".join(["def step(x):", *lines, "return x + 1"])
    exec(source, namespace)
    return Work(namespace["step"], (torch.ones(8),), calls=200, rounds=3, options={"backend": "eager"})


def many_parameters(parameters: int) -> Work:
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(parameters // 2))

    def step(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return Work(step, (torch.ones(2, 4),), calls=5, rounds=10, options={"backend": "eager"})


def held_off_shape() -> Work:
    """Thirty layers and three arguments. The shape in `arguments` is held off; another one is compiled."""
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(30))

    def step(model: nn.ModuleList, x: Tensor, target: Tensor) -> Tensor:
        for layer in model:
            x = layer(x)
        return (x - target).sum()

    return Work(step, (layers, torch.ones(5, 4), torch.ones(4)), calls=40, rounds=5, options={"dynamic": False})


def fails_for_five_rows(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> Step:
    if any(isinstance(value, Tensor) and value.shape[:1] == (5,) for value in inputs):
        raise OSError(28, "No space left on device")
    return graph_module.forward


def answers_at_once(step: Step, **options: Any) -> Step:
    """The floor: a stateless frame callback that runs every frame eagerly except the first."""
    from compile_retry._torch import frames as torch_frames
    from compile_retry._torch import functions

    compiled = torch.compile(step, **options)
    asked = itertools.count()

    def wrap(inner: torch_frames.FrameCallback) -> torch_frames.FrameCallback:
        def answer(
            frame: torch_frames.Frame, cache_entry: object, frame_state: torch_frames.FrameState
        ) -> torch_frames.ConvertFrameReturn:
            if next(asked) == 0:
                return inner(frame, cache_entry, frame_state)
            return torch_frames.run_eagerly(inner_frames=None)

        return answer

    functions.interpose(compiled, wrap)
    return compiled


FLOOR = Subject("callback that answers at once", answers_at_once)


@functools.cache
def beside_compiled_code(subject: Subject) -> tuple[Step, Work]:
    """A subject with compiled code for three rows, and five rows held off."""
    torch.manual_seed(0)
    work = held_off_shape()
    model, inputs, target = work.arguments
    options: dict[str, Any] = {**work.options, "backend": fails_for_five_rows}
    if subject is OURS:
        options["policy"] = RetryPolicy(wait=1e9)
    step = subject.make(fresh(work.step), **options)
    step(model, inputs[:3], target)
    for _ in range(100):
        step(*work.arguments)
    return step, work


WORKS: dict[str, Callable[[], Work]] = {
    "15 µs function": small,
    "5 ms train step": medium,
    "1 graph": functools.partial(many_graphs, 1),
    "10 graphs": functools.partial(many_graphs, 10),
    "100 graphs": functools.partial(many_graphs, 100),
    "1,000 parameters": functools.partial(many_parameters, 1000),
}


def fresh(step: Step) -> Step:
    """The same function with its own code object, because wrappers of one code object share Dynamo's cache."""
    assert isinstance(step, FunctionType)
    return FunctionType(step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__)


def broken(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> Step:
    raise OSError(28, "No space left on device")


@functools.cache
def prepared(subject: Subject, name: str, copy: int = 0, *, is_broken: bool = False) -> tuple[Step, Work]:
    """A subject after its first calls: compiled, or failed and held off for good. Created once per `copy`."""
    torch.manual_seed(0)
    work = WORKS[name]()
    options = dict(work.options)
    if is_broken:
        options["backend"] = broken
    if subject is OURS:
        options["policy"] = RetryPolicy(wait=1e9)
    with subject.setting():
        step = subject.make(fresh(work.step), **options)
        for _ in range(100 if is_broken else 3):
            step(*work.arguments)
    if subject is OURS:
        assert step.state is (CompileState.FALLBACK if is_broken else CompileState.COMPILED)  # type: ignore[attr-defined]  # a CompiledFunction
    return step, work


def measure(benchmark: BenchmarkFixture, step: Step, work: Work, **info: object) -> None:
    arguments, with_backward = work.arguments, work.step(*work.arguments).requires_grad and work.calls == 1

    def run() -> None:
        result = step(*arguments)
        if with_backward:
            result.backward()

    benchmark.extra_info.update(info)
    benchmark.pedantic(run, rounds=work.rounds, iterations=work.calls, warmup_rounds=1)


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
@pytest.mark.parametrize("work", ["15 µs function", "5 ms train step"])
@pytest.mark.parametrize("lap", LAPS)
def test_a_compiled_call(benchmark: BenchmarkFixture, subject: Subject, work: str, lap: int) -> None:
    measure(benchmark, *prepared(subject, work, lap % COPIES), table="compiled", row=work, column=subject.name, lap=lap)


@pytest.mark.parametrize("subject", [EAGER, OURS, LATCH, SUPPRESS, RETRY], ids=str)
@pytest.mark.parametrize("lap", LAPS)
def test_a_call_with_a_broken_compiler(benchmark: BenchmarkFixture, subject: Subject, lap: int) -> None:
    step, work = prepared(subject, "15 µs function", lap % COPIES, is_broken=True)
    if subject is RETRY:  # each call is an attempt
        work = work._replace(calls=5, rounds=1)
    with subject.setting():
        measure(benchmark, step, work, table="held off", row="15 µs function", column=subject.name, lap=lap)


@pytest.mark.parametrize("subject", [EAGER, FLOOR, OURS], ids=str)
@pytest.mark.parametrize("lap", LAPS)
def test_a_held_off_shape_beside_compiled_ones(benchmark: BenchmarkFixture, subject: Subject, lap: int) -> None:
    step, work = beside_compiled_code(subject)
    row = "30 layers, three arguments"
    measure(benchmark, step, work, table="held off beside compiled", row=row, column=subject.name, lap=lap)


@pytest.mark.parametrize("subject", [BARE, OURS], ids=str)
@pytest.mark.parametrize("work", ["1 graph", "10 graphs", "100 graphs", "1,000 parameters"])
@pytest.mark.parametrize("lap", LAPS)
def test_a_large_step(benchmark: BenchmarkFixture, subject: Subject, work: str, lap: int) -> None:
    measure(benchmark, *prepared(subject, work), table="scale", row=work, column=subject.name, lap=lap)


@pytest.mark.parametrize("subject", [BARE, OURS], ids=str)
@pytest.mark.parametrize("graphs", [1, 10, 100])
@pytest.mark.parametrize("is_broken", [False, True], ids=["compiled", "held off"])
def test_memory_kept(benchmark: BenchmarkFixture, subject: Subject, graphs: int, is_broken: bool) -> None:
    """Bytes of Python objects after the first calls, not a time."""
    if is_broken and subject is BARE:
        subject = EAGER
    logging.getLogger("compile_retry").setLevel(logging.CRITICAL)
    name = "1 graph" if graphs == 1 else f"{graphs} graphs"
    prepared.cache_clear()
    before = prepared(subject, name, is_broken=is_broken)  # one-time imports and caches
    prepared.cache_clear()
    gc.collect()
    tracemalloc.start()
    try:
        kept = prepared(subject, name, is_broken=is_broken)
        gc.collect()
        memory, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept is not before
    benchmark.extra_info.update(
        table="memory", row=f"{name}, {'held off' if is_broken else 'compiled'}", column=subject.name, value=memory
    )
    benchmark.pedantic(lambda: None)
