"""CUDA graphs (`mode="reduce-overhead"`) behave as with stock, also if a compile fails or a retry comes in between."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import fail_compiles

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
MODE = "reduce-overhead"


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(64, 64, device="cuda")


def graphs(fn: Any, *args: Any) -> int:
    """Return the number of CUDA graphs that warmed-up calls replay."""
    from torch._inductor.cudagraph_trees import get_container

    fn(*args)
    manager = get_container(torch.cuda.current_device()).tree_manager
    return sum(map(len, manager.roots.values())) if manager is not None else 0


def work(x: torch.Tensor) -> torch.Tensor:
    return (x @ x).relu().sum(-1)


def test_as_many_graphs_as_stock(x: torch.Tensor) -> None:
    """Inference records as many graphs as stock, and outputs of different calls do not alias unless stock's do."""
    counts = []
    for fn in (torch.compile(work, mode=MODE), compile_with_fallback(work, mode=MODE)):
        torch._dynamo.reset()
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(fn(x).clone(), work(x), rtol=1e-3, atol=1e-3)
        counts.append(graphs(fn, x))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("good_calls", [0, 1, 2, 4], ids=["at first", "warming up", "capturing", "replaying"])
def test_another_shape_fails(x: torch.Tensor, good_calls: int) -> None:
    """A failing compile of another shape disturbs neither warm-up, nor capture, nor replay."""
    fn = compile_with_fallback(work, mode=MODE, policy=RetryPolicy(wait=None, wait_calls=3), dynamic=False)
    other = torch.randn(32, 32, device="cuda")

    def call(argument: torch.Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(fn(argument).clone(), work(argument), rtol=1e-3, atol=1e-3)

    for _ in range(good_calls):
        call(x)
    with fail_compiles(MemoryError, times=1):
        call(other if good_calls else x)
    assert fn.state is CompileState.FALLBACK
    for _ in range(8):  # the retry comes between replays
        call(x)
        call(other)
    assert (fn.state, fn.stats.recoveries) == (CompileState.COMPILED, 1)


def test_training() -> None:
    """Training with CUDA graphs, through a failure and its recovery, equals the eager twin."""
    from gpu.day import Day

    day = Day(mode=MODE)
    with fail_compiles(MemoryError, times=1):
        day.train()
    day.assert_fell_back()
    day.train(6)
    assert (day.step.state, day.step.stats.recoveries) == (CompileState.COMPILED, 1)


def test_two_threads(x: torch.Tensor) -> None:
    """Two threads, each with its own stream, call one function while it fails and recovers."""
    fn = compile_with_fallback(work, mode=MODE, policy=EVERY_CALL)
    errors: list[BaseException] = []

    def loop() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                mine = x.clone()
                for _ in range(8):
                    torch.compiler.cudagraph_mark_step_begin()
                    torch.testing.assert_close(fn(mine).clone(), work(mine), rtol=1e-3, atol=1e-3)
        except BaseException as exc:
            errors.append(exc)

    with fail_compiles(MemoryError, times=1):
        threads = [threading.Thread(target=loop) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors
    assert fn.state is CompileState.COMPILED
