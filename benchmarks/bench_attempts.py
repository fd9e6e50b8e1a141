"""What an attempt costs: a retry against a first compile, and what keeping a graph's eager copy adds to it."""

from __future__ import annotations

import copy
from contextlib import closing
from typing import Any

import pytest
import torch
import torch._dynamo
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.fx import GraphModule

from child import Child
from compile_retry import RetryPolicy, compile_with_fallback
from compile_retry._backend import KeptGraph
from compile_retry.testing import fail_compiles

LAPS = range(3)


def network() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(4)))


def step(model: nn.Module, inputs: Tensor) -> Tensor:
    loss: Tensor = model(inputs).square().mean()
    return loss


def prepare(kept: dict[str, Any]) -> None:
    """Everything but the first compile. Dynamo has compiled something, so it is all imported."""
    import torch._inductor.compile_fx  # imported by the first compile

    torch.set_num_threads(1)
    torch.compile(torch.sin, backend="eager")(torch.ones(2))
    kept["model"], kept["inputs"] = network(), torch.rand(32, 64)
    kept["bare"] = torch.compile(step)
    kept["ours"] = compile_with_fallback(step, policy=RetryPolicy(wait=None, wait_calls=1))


def fail(kept: dict[str, Any]) -> None:
    with fail_compiles(OSError(28, "No space left on device")):
        kept["ours"](kept["model"], kept["inputs"])
    assert kept["ours"].stats.failures == 1


def call_bare(kept: dict[str, Any]) -> None:
    kept["bare"](kept["model"], kept["inputs"]).backward()


def call_ours(kept: dict[str, Any]) -> None:
    kept["ours"](kept["model"], kept["inputs"]).backward()
    assert kept["ours"].stats.compiled_calls == 1


@pytest.mark.parametrize("what", ["bare `torch.compile`", "first compile", "retry"])
@pytest.mark.parametrize("lap", LAPS)
def test_an_attempt(benchmark: BenchmarkFixture, what: str, lap: int) -> None:
    """Forward and backward, in a fresh process with an empty cache. All but the first probe the compiler too."""
    with closing(Child()) as child:
        child.do(prepare)
        if what == "retry":
            child.do(fail)
        benchmark.extra_info.update(table="attempt", row="four layers, forward and backward", column=what, lap=lap)
        command = call_bare if what == "bare `torch.compile`" else call_ours
        benchmark.pedantic(child.do, args=(command,), rounds=1)


@pytest.mark.parametrize("layers", [4, 500])
def test_keeping_a_graph(benchmark: BenchmarkFixture, layers: int) -> None:
    """A graph's eager copy, against what even the cheapest compiler takes: Dynamo and a backend that does nothing."""
    graphs: list[GraphModule] = []

    def backend(graph_module: GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(copy.deepcopy(graph_module))
        return graph_module.forward

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    step = torch.compile(lambda x: model(x).sum(), backend=backend)
    benchmark.extra_info.update(table="kept graph", row=f"{2 * layers} parameters", column="eager copy")
    step(torch.ones(2, 4))
    benchmark.pedantic(KeptGraph, setup=lambda: ((copy.deepcopy(graphs[0]),), {}), rounds=20)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("layers", [4, 500])
def test_compiling_a_graph(benchmark: BenchmarkFixture, layers: int, backend: str) -> None:
    """What the copy is to be compared with."""
    if (layers, backend) == (500, "inductor"):
        pytest.skip("takes minutes, and the copy is small change against less")
    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    step = torch.compile(lambda x: model(x).sum(), backend=backend)
    benchmark.extra_info.update(table="kept graph", row=f"{2 * layers} parameters", column=f"compile, {backend}")
    benchmark.pedantic(step, args=(torch.ones(2, 4),), rounds=1)
