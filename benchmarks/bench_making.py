"""What it costs to import the library and to decorate functions."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from contextlib import closing
from types import FunctionType
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from child import Child

LAPS = range(5)
FUNCTIONS = 1000


def import_torch(kept: dict[str, Any]) -> None:
    import torch  # noqa: F401


def import_compile_retry(kept: dict[str, Any]) -> None:
    import compile_retry  # noqa: F401

    assert "torch._dynamo" not in sys.modules


def import_nothing(kept: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize("what", ["import torch", "import compile_retry", "nothing"])
@pytest.mark.parametrize("lap", LAPS)
def test_importing(benchmark: BenchmarkFixture, what: str, lap: int) -> None:
    """In a fresh process; `compile_retry` after torch. "nothing" is what asking the process costs."""
    commands = {"import torch": import_torch, "import compile_retry": import_compile_retry, "nothing": import_nothing}
    with closing(Child()) as child:
        if what != "import torch":
            child.do(import_torch)
        benchmark.extra_info.update(table="import", row="a fresh process", column=what, lap=lap)
        benchmark.pedantic(child.do, args=(commands[what],), rounds=1)


def functions() -> list[FunctionType]:
    def step(x: Any) -> Any:
        return x

    return [FunctionType(step.__code__.replace(), step.__globals__, f"step_{number}") for number in range(FUNCTIONS)]


@pytest.mark.parametrize("what", ["bare `torch.compile`", "`compile_with_fallback`"])
@pytest.mark.parametrize("lap", LAPS)
def test_decorating(benchmark: BenchmarkFixture, what: str, lap: int) -> None:
    """A thousand functions, with default options. Stock torch imports Dynamo at the first: not counted."""
    import torch

    from compile_retry import compile_with_fallback

    decorate = torch.compile if what.startswith("bare") else compile_with_fallback
    decorate(functions()[0])
    benchmark.extra_info.update(table="decorating", row="1,000 functions", column=what, lap=lap)
    benchmark.pedantic(lambda fns: [decorate(fn) for fn in fns], setup=lambda: ((functions(),), {}), rounds=1)


@pytest.mark.parametrize("what", ["bare `torch.compile`", "`compile_with_fallback`"])
def test_memory_of_decorated_functions(benchmark: BenchmarkFixture, what: str) -> None:
    """Bytes of Python objects per function, before its first call; not a time."""
    import torch

    from compile_retry import compile_with_fallback

    decorate = torch.compile if what.startswith("bare") else compile_with_fallback
    fns = functions()
    decorate(fns[0])
    gc.collect()
    tracemalloc.start()
    try:
        kept = [decorate(fn) for fn in fns]
        gc.collect()
        memory, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept
    benchmark.extra_info.update(table="decorating", row="bytes per function", column=what, value=memory / FUNCTIONS)
    benchmark.pedantic(lambda: None)
