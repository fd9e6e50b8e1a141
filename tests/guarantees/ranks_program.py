"""One rank of a training run, for test_g01_ranks.py: `python ranks_program.py PORT RANK SIZE TIMEOUT SCENARIO...`.

Each scenario trains weights in a decorated function and in its eager twin, while compiles fail on some ranks. The last
line of the output has the outcomes, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from coverage import Coverage
from functorch.compile import make_boxed_func
from torch import nn
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_group, _get_default_store, _world
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

from compile_retry import CompiledFunction, RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.testing import fail_compiles

D = 16
NEVER_AGAIN = RetryPolicy(wait=None, wait_calls=1000)
Faults = AbstractContextManager[object]


# Compilers


def compile_nothing(graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    return make_boxed_func(graph_module.forward)  # type: ignore[no-any-return]  # not annotated


class BackwardFaults:
    """Makes compiles of the backward graph fail while `left` is positive."""

    left = 0.0

    def __call__(self, graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.left -= 1
        if self.left >= 0:
            raise MemoryError("injected into the backward's compile")
        return compile_nothing(graph_module, inputs)

    @contextmanager
    def fail(self, times: float) -> Iterator[None]:
        self.left = times
        yield
        self.left = 0


backward_faults = BackwardFaults()
# Like Inductor, it removes a collective that is issued twice, so eager and compiled code do not match.
backend = aot_autograd(
    fw_compiler=compile_nothing,
    bw_compiler=backward_faults,
    partition_fn=min_cut_rematerialization_partition,
)


@contextmanager
def fail_in_dynamo(times: int) -> Iterator[None]:
    """Make Dynamo fail before it passes a graph to the backend."""
    from torch._dynamo.output_graph import OutputGraph

    real, left = OutputGraph.compile_and_call_fx_graph, [times]

    def fails(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise MemoryError("injected into Dynamo")
        return real(*args, **kwargs)

    with mock.patch.object(OutputGraph, "compile_and_call_fx_graph", fails):
        yield


# Training


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    everyone: Any = dist.group.WORLD
    reduced: torch.Tensor = functional.all_reduce(x, "sum", everyone)
    return reduced


def body(x: torch.Tensor, w: torch.Tensor, scale: int) -> torch.Tensor:
    """Issue three all-reduces of the same size; compiled code issues only two."""
    a = all_reduce(x @ w[0])
    b = all_reduce(torch.tanh(a) @ w[1])
    c = all_reduce(x @ w[0]) @ w[2]
    return (b + c) * scale


def two_graphs(x: torch.Tensor, w: torch.Tensor, scale: int) -> torch.Tensor:
    """Break the graph before the collectives. If the first frame runs eagerly, so does the rest."""
    y = torch.tanh(x)
    torch._dynamo.graph_break()
    return body(y, w, scale)


class Twins:
    """The same training twice: with a decorated function, and eagerly."""

    def __init__(
        self,
        decorated: Callable[[torch.Tensor, int], torch.Tensor],
        eager: Callable[[torch.Tensor, int], torch.Tensor],
        parameters: list[nn.Parameter],
        twins: list[nn.Parameter],
        function: CompiledFunction[..., Any],
    ) -> None:
        self._steps = decorated, eager
        self._parameters = parameters, twins
        self._optimizers = [torch.optim.SGD(parameters, 0.01), torch.optim.SGD(twins, 0.01)]
        self.function = function
        self.difference = 0.0
        self.calls = ""

    def step(self, rows: int, faults: Faults | None = None, *, scale: int = 1) -> None:
        generator = torch.Generator().manual_seed(100 * len(self.calls) + dist.get_rank())
        x = torch.randn(rows, D, generator=generator)
        before = self.function.stats
        with faults or nullcontext():
            outputs = [self._train(0, x, scale)]
        after = self.function.stats
        outputs.append(self._train(1, x, scale))
        pairs = [outputs, *zip(*self._parameters, strict=True)]
        self.difference = max(self.difference, *((local(a) - local(b)).abs().max().item() for a, b in pairs))
        compiled = after.compiled_calls > before.compiled_calls
        self.calls += "c" if compiled else "m" if after.mixed_calls > before.mixed_calls else "e"

    def _train(self, which: int, x: torch.Tensor, scale: int) -> torch.Tensor:
        y = self._steps[which](x.clone().requires_grad_(), scale)
        (y**2).mean().backward()
        self._optimizers[which].step()
        self._optimizers[which].zero_grad()
        return y.detach()

    def result(self) -> dict[str, Any]:
        return {"difference": self.difference, "calls": self.calls, "state": self.function.state.value}


def local(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def functions(name: str, body: Callable[..., torch.Tensor] = body) -> Twins:
    torch.manual_seed(0)
    w = nn.Parameter(0.1 * torch.randn(3, D, D))
    twin = nn.Parameter(w.detach().clone())
    fn = compile_with_fallback(body, name=name, backend=backend, dynamic=False, policy=NEVER_AGAIN)
    return Twins(lambda x, scale: fn(x, w, scale), lambda x, scale: body(x, twin, scale), [w], [twin], fn)


def modules(name: str, wrap: Callable[[nn.Module], nn.Module]) -> Twins:
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(nn.Sequential(nn.Linear(D, 4 * D), nn.Tanh(), nn.Linear(4 * D, D)))
    model, twin = pair
    decorated, eager = wrap(model), wrap(twin)
    compile_with_fallback(model, name=name, backend=backend, policy=NEVER_AGAIN)
    return Twins(
        lambda x, scale: decorated(x),
        lambda x, scale: eager(x),
        [*model.parameters()],
        [*twin.parameters()],
        compiled_function(model),
    )


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"0": ColwiseParallel(input_layouts=Shard(0)), "2": RowwiseParallel(output_layouts=Shard(0))}
    return parallelize_module(model, mesh, plan)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x)) + x


def fsdp2(name: str) -> Twins:
    """Compile each block, and shard each block."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(nn.Sequential(Block(), Block()))
    model, twin = pair
    for block in model:
        compile_with_fallback(block, name=name, backend=backend, policy=NEVER_AGAIN)
    for each in pair:
        for part in (*each, each):
            fully_shard(part)
    return Twins(
        lambda x, scale: model(x),
        lambda x, scale: twin(x),
        [*model.parameters()],
        [*twin.parameters()],
        compiled_function(model[0]),
    )


def on_last_rank(faults: Faults) -> Faults:
    return faults if dist.get_rank() == dist.get_world_size() - 1 else nullcontext()


def broken(name: str, times: int | None = None, graph: int | None = None) -> Faults:
    return fail_compiles(MemoryError, times=times, function=name, graph=graph)


# Scenarios


def healthy(name: str) -> Twins:
    """Without a failure, the store is not used."""
    twins = functions(name)
    twins.step(8)
    keys = _get_default_store().num_keys()
    twins.step(9)
    twins.step(8)
    assert _get_default_store().num_keys() == keys
    return twins


def shared_then_uneven(name: str) -> Twins:
    """In the last step, rank 0 gets a value that it has compiled before, and the others a new one."""
    twins = functions(name)
    twins.step(8, scale=1)
    twins.step(8, broken(name), scale=2)
    twins.step(8, scale=1 if dist.get_rank() == 0 else 3)
    return twins


def train(twins: Twins, rows: tuple[int, ...], faults: Faults, *, in_step: int = 1) -> Twins:
    """Train one step for each of these numbers of rows, one of them with faults."""
    for step, n in enumerate(rows, 1):
        twins.step(n, faults if step == in_step else None)
    return twins


SCENARIOS: dict[str, Callable[[str], Twins]] = {
    "healthy": healthy,
    "first_attempt_passes": lambda name: train(functions(name), (8, 8), on_last_rank(broken(name, 2))),
    "recompile_passes": lambda name: train(functions(name), (8, 9, 8, 9), on_last_rank(broken(name, 2)), in_step=2),
    "recompile_passes_inside_dynamo": lambda name: train(
        functions(name), (8, 9, 9), on_last_rank(fail_in_dynamo(2)), in_step=2
    ),
    "recompile_before_a_graph_break_passes": lambda name: train(
        functions(name, two_graphs), (8, 9, 9), on_last_rank(broken(name, 2, graph=1)), in_step=2
    ),
    "backward_passes": lambda name: train(functions(name), (8, 8), on_last_rank(backward_faults.fail(2))),
    "dtensor_passes": lambda name: train(modules(name, tensor_parallel), (8, 8), on_last_rank(broken(name, 2))),
    "first_attempt_shared": lambda name: train(functions(name), (8, 8, 9), broken(name)),
    "recompile_shared": lambda name: train(functions(name), (8, 9, 8, 9, 10, 8), broken(name), in_step=2),
    "recompile_shared_then_uneven": shared_then_uneven,
    "backward_shared": lambda name: train(functions(name), (8, 8), backward_faults.fail(1000)),
    "plain_module": lambda name: train(modules(name, lambda model: model), (8, 8), on_last_rank(broken(name, 1))),
    "ddp": lambda name: train(modules(name, DistributedDataParallel), (8, 8), on_last_rank(broken(name, 1))),
    "fsdp2": lambda name: train(fsdp2(name), (8, 8), on_last_rank(broken(name, 1))),
    "first_attempt_stays": lambda name: train(functions(name), (8,), on_last_rank(broken(name))),
    "recompile_stays": lambda name: train(functions(name), (8, 9), on_last_rank(broken(name)), in_step=2),
}


def main(
    port: str,
    rank: str,
    size: str,
    timeout: str,
    *names: str,
    scenarios: dict[str, Callable[[str], Twins]] = SCENARIOS,
) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    limit = timedelta(seconds=float(timeout))
    store = TCPStore("127.0.0.1", int(port), is_master=False)
    # After a restart, Gloo would find addresses of the earlier life and connect to those. Nothing else may be misled.
    of_gloo = PrefixStore(os.environ.get("LIFE", "0"), store)
    dist.init_process_group("gloo", store=of_gloo, rank=int(rank), world_size=int(size), timeout=limit)
    _world.pg_map[_get_default_group()] = ("gloo", PrefixStore("default_pg", store))
    results: dict[str, Any] = {}
    for name in names:
        began = time.monotonic()
        try:
            results[name] = scenarios[name](name).result()
            if not results[name].get("is_over"):  # another rank is gone
                dist.barrier()
        except Exception as exc:
            results[name] = {"raised": type(exc).__name__, "message": str(exc)}
        results[name]["seconds"] = time.monotonic() - began
        if "raised" in results[name]:
            break
    sys.stdout.write(f"{json.dumps(results)}\n")
    sys.stdout.flush()
    if (measured := Coverage.current()) is not None:
        measured.stop()
        measured.save()
    os._exit(0)  # gloo's threads may abort a regular exit (PyTorch 2.13)


if __name__ == "__main__":
    main(*sys.argv[1:])
