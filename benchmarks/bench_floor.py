"""The cost of the parts of a call: wrappers that each do a little more, up to the minimum that the library must do.

None of them is the library, and none would be correct. They show the cost of being called like a function, of counting
calls, and of knowing whether a call ran compiled code. The library costs less than their sum, because its graphs bypass
the wrapper that Dynamo puts around them.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from bench_calls import COPIES, LAPS, elementwise, fresh, measure, small
from compile_retry._torch.eager import may_run_again
from subjects import BARE, EAGER, OURS, Step


class PassesOn:
    """Called like a function; forwards its arguments."""

    def __init__(self, step: Step, **options: Any) -> None:
        self.step = self.prepared(step, **options)
        self.begun, self.ended = itertools.count(), itertools.count()
        self.clock, self.due = time.monotonic, float("inf")

    def prepared(self, step: Step, **options: Any) -> Step:
        return torch.compile(step, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.step(*args, **kwargs)


class AsksDynamo(PassesOn):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return None
        return self.step(*args, **kwargs)


class IsAlone(PassesOn):
    """Checks whether another call is running, whose counts must not be mixed with its own."""

    graphs, left = 0, 1 << 62

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or self.graphs or not self.left:
            return None
        self.graphs = 1
        result = self.step(*args, **kwargs)
        self.left -= 1
        self.graphs = 0
        return result


class CountsGraphs(IsAlone):
    """Counts graphs, to tell whether a call ran compiled code."""

    def prepared(self, step: Step, **options: Any) -> Step:
        from torch._inductor.compile_fx import compile_fx

        def backend(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            code: Any = compile_fx(graph_module, inputs)
            code = torch._dynamo.eval_frame.innermost_fn(code)

            def run(*args: Any) -> Any:
                self.graphs += 1
                return code(*args)

            return run

        return torch.compile(step, backend=backend, **options)


class Eager(PassesOn):
    def prepared(self, step: Step, **options: Any) -> Step:
        return step


class EagerCounts(Eager):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return None
        next(self.begun)
        next(self.ended)
        return self.step(*args, **kwargs)


class EagerAsksTheClock(Eager):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return None
        next(self.begun)
        if self.clock() >= self.due:
            return None
        next(self.ended)
        return self.step(*args, **kwargs)


class EagerAsksAutograd(Eager):
    """Checks whether activation checkpointing may rerun the call, which must then run eagerly as well."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return None
        next(self.begun)
        if self.clock() >= self.due or may_run_again():
            return None
        next(self.ended)
        return self.step(*args, **kwargs)


RUNGS: dict[str, dict[str, Callable[..., Step]]] = {
    "compiled": {
        BARE.name: BARE.make,
        "passes arguments on": PassesOn,
        "and asks whether Dynamo traces": AsksDynamo,
        "and sees that it is alone": IsAlone,
        "and counts graphs": CountsGraphs,
        OURS.name: OURS.make,
    },
    "held off": {
        EAGER.name: EAGER.make,
        "passes arguments on": Eager,
        "and counts calls": EagerCounts,
        "and asks the clock": EagerAsksTheClock,
        "and asks autograd": EagerAsksAutograd,
        OURS.name: OURS.make,
    },
}


@functools.cache
def prepared(table: str, rung: str, copy: int) -> Step:
    from bench_calls import prepared as subject
    from bench_calls import small as work

    if rung == OURS.name:
        return subject(OURS, "15 µs function", copy, is_broken=table == "held off")[0]
    step = RUNGS[table][rung](fresh(elementwise))
    for _ in range(3):
        step(*work().arguments)
    return step


@pytest.mark.parametrize(("table", "rung"), [(table, rung) for table, rungs in RUNGS.items() for rung in rungs])
@pytest.mark.parametrize("lap", LAPS)
def test_the_floor(benchmark: BenchmarkFixture, table: str, rung: str, lap: int) -> None:
    measure(
        benchmark,
        prepared(table, rung, lap % COPIES),
        small(),
        table=f"floor, {table}",
        row="15 µs function",
        column=rung,
        lap=lap,
    )
