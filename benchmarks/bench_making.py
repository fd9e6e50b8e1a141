"""The cost of importing the library and of decorating functions."""

from __future__ import annotations

import compileall
import gc
import sys
import tracemalloc
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from children import child

LAPS = range(5)
FUNCTIONS = 1000


class Importer:
    """Imports the library in a fresh process with torch already imported."""

    def __init__(self, folder: Path) -> None:
        assert "torch" in sys.modules

    def nothing(self) -> None:
        """Do nothing, to measure the cost of a request to the process."""

    def compile_retry(self) -> None:
        import compile_retry  # noqa: F401  # the import is what is measured

        assert "torch._dynamo" not in sys.modules


@pytest.fixture(scope="module")
def bytecode() -> None:
    """Precompile the bytecode, as pip does. Otherwise Python would write it at the first import, or never."""
    import compile_retry

    assert compileall.compile_dir(Path(compile_retry.__file__).parent, quiet=1)


@pytest.mark.usefixtures("bytecode")
@pytest.mark.parametrize("what", ["nothing", "compile_retry"])
@pytest.mark.parametrize("lap", LAPS)
def test_importing(benchmark: BenchmarkFixture, tmp_path: Path, what: str, lap: int) -> None:
    with child(Importer, tmp_path) as importer:
        importer.ask("nothing")  # the process is ready when this returns
        benchmark.extra_info.update(table="import", row="a fresh process", column=what, lap=lap)
        benchmark.pedantic(importer.ask, args=(what,), rounds=1)


def functions() -> list[FunctionType]:
    def step(x: Any) -> Any:
        return x

    return [FunctionType(step.__code__.replace(), step.__globals__, f"step_{number}") for number in range(FUNCTIONS)]


@pytest.mark.parametrize("what", ["bare `torch.compile`", "`compile_with_fallback`"])
@pytest.mark.parametrize("lap", LAPS)
def test_decorating(benchmark: BenchmarkFixture, what: str, lap: int) -> None:
    """Decorate a thousand functions with default options. Dynamo's import by stock torch is not counted."""
    import torch

    from compile_retry import compile_with_fallback

    decorate = torch.compile if what.startswith("bare") else compile_with_fallback
    decorate(functions()[0])
    benchmark.extra_info.update(table="decorating", row="1,000 functions", column=what, lap=lap)
    benchmark.pedantic(lambda fns: [decorate(fn) for fn in fns], setup=lambda: ((functions(),), {}), rounds=1)


@pytest.mark.parametrize("what", ["bare `torch.compile`", "`compile_with_fallback`"])
def test_memory_of_decorated_functions(benchmark: BenchmarkFixture, what: str) -> None:
    """Bytes of Python objects per function before its first call, not a time."""
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
