"""G1 on many ranks: recognising graphs with collectives, and the default process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from compile_retry._torch.distributed import collectives_in, world


@pytest.fixture
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    """A group whose other ranks do not exist. Its backend's name is hidden from the library."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def one_rank() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore(), timeout=timedelta(seconds=40))
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


X = torch.ones(4, 8, requires_grad=True)


def seen(fn: Callable[..., object], *args: object) -> list[tuple[str, ...]]:
    """Return the names of the collectives found in each graph that Dynamo captures."""
    found = []

    def backend(graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(collectives_in(graph_module))
        return graph_module.forward

    torch.compile(fn, backend=backend)(*args)
    return found


def all_reduce(x: torch.Tensor, group: Any = None) -> torch.Tensor:
    everyone: Any = dist.group.WORLD
    reduced: torch.Tensor = functional.all_reduce(x, "sum", group or everyone)
    return reduced


def all_gather(x: torch.Tensor) -> torch.Tensor:
    everyone: Any = dist.group.WORLD
    gathered: torch.Tensor = functional.all_gather_tensor_autograd(x, 0, everyone)
    return gathered


def reduce_gradient(x: torch.Tensor) -> object:
    return ReducedGradient.apply(x)  # type: ignore[no-untyped-call]  # torch has no annotations here


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x.detach() * 2
    dist.all_reduce(y)
    gathered = torch.empty(16, 8)
    dist.all_gather_into_tensor(gathered, y)
    return gathered + 1


class ReducedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return all_reduce(grads[0])


def between_graphs(x: torch.Tensor) -> torch.Tensor:
    """Call collectives at which Dynamo breaks the graph, so they always run eagerly."""
    y = x.detach() * 2
    dist.broadcast(y, 0)
    y = y + 1
    dist.barrier()
    return y.sin()


def from_local(x: torch.Tensor, mesh: Any) -> torch.Tensor:
    return DTensor.from_local(x, mesh, [Shard(0)]).redistribute(placements=[Replicate()]).to_local()


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (all_reduce, [("all_reduce",)]),
        (all_gather, [("all_gather_into_tensor",)]),
        (lambda x: all_reduce(all_reduce(x)), [("all_reduce",)]),
        (in_place, [("all_reduce", "all_gather_into_tensor")]),
        (reduce_gradient, [("all_reduce",)]),
        (lambda x: checkpoint(lambda y: all_reduce(y).sin(), x, use_reentrant=False), [("all_reduce",)]),
        (lambda x: x * dist.get_rank() + dist.get_world_size(), [()]),
        (between_graphs, [(), (), ()]),
        (nn.Linear(8, 8), [()]),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:Dynamo does not know how to trace:UserWarning",
    "ignore:.* should not be instantiated:DeprecationWarning",  # Dynamo instantiates autograd functions
)
def test_collectives(four_ranks: dist.ProcessGroup, fn: Callable[..., object], expected: list[tuple[str, ...]]) -> None:
    """Functional and in-place collectives are found, also in nested and backward graphs, but not at graph breaks."""
    assert seen(fn, X) == expected


def test_groups_of_one_rank(four_ranks: dist.ProcessGroup) -> None:
    """A collective in a group with one rank does not count."""
    alone = dist.new_group([0])
    assert seen(lambda x: all_reduce(x, alone), X) == [()]


def test_dtensor(four_ranks: dist.ProcessGroup) -> None:
    """Every graph with a DTensor counts, because Dynamo does not know what a DTensor will send to other ranks."""
    mesh, alone = (
        init_device_mesh("cpu", (4,)),
        init_device_mesh("cpu", (4, 1), mesh_dim_names=("data", "model"))["model"],
    )
    assert seen(lambda x: x * 2, distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)])) == [("DTensor",)]
    assert seen(lambda x: from_local(x, mesh), X) == [("DTensor",)]
    assert seen(lambda x: x * 2, distribute_tensor(torch.ones(8, 8), alone, [Shard(0)])) == [()]


def test_other_kinds_of_nodes(four_ranks: dist.ProcessGroup) -> None:
    """Overloads, unknown groups and untraced Python functions are handled."""
    graph = Graph()
    x = graph.placeholder("x")
    x = graph.call_function(torch.ops._c10d_functional.broadcast.default, (x, 0, "no such group"))
    x = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (x,))
    x = graph.call_function(dist.reduce_scatter_tensor, (x, x))
    pair = graph.call_function(torch.split, (x, 2))
    pair.meta["example_value"] = (torch.ones(2), torch.ones(2))
    graph.output(graph.call_module("sin", (pair,)))
    assert collectives_in(GraphModule({"sin": nn.Identity()}, graph)) == ("broadcast", "reduce_scatter_tensor")


def test_one_rank(one_rank: dist.ProcessGroup) -> None:
    """In a run with one rank, no collective counts."""
    assert seen(all_reduce, X) == [()]


def test_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process group, or without torch.distributed, there are no collectives."""
    graph_module = symbolic_trace(nn.Linear(8, 8))
    assert collectives_in(graph_module) == ()
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert collectives_in(graph_module) == ()


def test_the_fake_backend() -> None:
    """A process group with the "fake" backend has no other ranks."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        assert seen(all_reduce, X) == [()]
    finally:
        dist.destroy_process_group()


def test_the_default_group(one_rank: dist.ProcessGroup) -> None:
    """The default group's rank, size, timeout, counts and store are available."""
    default = world()
    assert (default.rank, default.size, default.timeout) == (0, 1, 40)
    before = default.issued()
    dist.all_reduce(torch.ones(1)), dist.barrier()
    after = default.issued()
    assert before is not None
    assert after == {name: count + 2 for name, count in before.items()}
    default.substore("compile_retry").set("key", "value")
    assert default.store.get("compile_retry/key") == b"value"


def test_a_backend_without_options_and_counts(four_ranks: dist.ProcessGroup) -> None:
    """Without options and counts in the backend, the shortest default timeout applies, and ranks cannot agree."""
    default = world()
    assert default.timeout == 600
    assert default.issued() is None
