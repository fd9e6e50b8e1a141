"""Tensor parallelism with DTensor: two processes on Gloo, where one has a broken compiler at first.

    .venv-recipes/bin/python examples/recipes/tensor_parallel.py

The recipe starts itself with torchrun. `make recipes` creates that environment, although this recipe needs only torch.

The compiled code contains collectives, which eager code may issue in another order. So `group=` makes both ranks run
the model eagerly as soon as one of them cannot compile it, and both try again in the same step.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from compile_retry import RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.testing import broken_compiler

RANKS, STEPS, REPAIRED_AFTER = 2, 6, 3


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    network = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    eager_losses = train(shard(deepcopy(network), mesh))

    model = shard(network, mesh)
    compile_with_fallback(model, name="mlp", group=mesh["tp"], policy=RetryPolicy.every(calls=2))
    losses = train(model, compiler_breaks=dist.get_rank() == 1)

    compiled = compiled_function(model)
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, (compiled.state.value, compiled.stats.as_dict(), compiled.last_failure))
    if dist.get_rank() == 0:
        check(everyone)
    torch.testing.assert_close(losses, eager_losses)
    dist.barrier()
    os._exit(0)  # Gloo's threads may abort Python's shutdown (PyTorch 2.13)


def shard(model: nn.Sequential, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})


def train(model: nn.Module, *, compiler_breaks: bool = False) -> torch.Tensor:
    """Train for a few steps, all ranks with the same inputs. Return the losses."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(1, STEPS + 1):
        inputs = torch.randn(4, 8, generator=generator)
        with broken_compiler() if compiler_breaks and step <= REPAIRED_AFTER else nullcontext():
            outputs = model(inputs)
        loss = nn.functional.mse_loss(outputs, inputs.sum(dim=1, keepdim=True))
        assert not isinstance(loss, DTensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def check(everyone: list[Any]) -> None:
    for rank, (state, stats, failure) in enumerate(everyone):
        print(f"rank {rank}: {state}, {stats['eager_calls']} eager and {stats['compiled_calls']} compiled calls")
        assert failure.rank == 1, "both ranks know which one has failed"
    one, other = [stats for _, stats, _ in everyone]
    for count in ("eager_calls", "compiled_calls", "failures", "recoveries"):
        assert one[count] == other[count], "both ranks fell back, and both came back"
    assert one["eager_calls"] >= REPAIRED_AFTER, "as long as the compiler was broken"
    assert one["recoveries"] == 1, "both run compiled code in the end"


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        with tempfile.TemporaryDirectory() as folder:
            # An empty cache, so that the broken compiler is needed.
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
            subprocess.run([*torchrun, __file__], env=environment, check=True)  # noqa: S603  # itself
