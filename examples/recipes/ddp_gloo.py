"""DistributedDataParallel: two processes on Gloo, where one hits a full disk at first.

    .venv-recipes/bin/python examples/recipes/ddp_gloo.py

`make recipes` creates that environment, although this recipe needs only torch. The model is compiled in place, before
DDP wraps it. The compiled code contains no communication, and DDP's gradient hooks run as in eager, so eager and
compiled ranks meet in the same all-reduces.

Each rank has its own statistics; rank 0 gathers them to log them all.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from compile_retry import RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.testing import fail_compiles

RANKS, STEPS = 2, 10


def work(rank: int, folder: str) -> None:
    """Train in one process."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=Path(folder, "rendezvous").as_uri(), rank=rank, world_size=RANKS)
    full_disk = OSError(28, "No space left on device")
    with fail_compiles(full_disk, times=2) if rank == 1 else nullcontext():
        model = train(rank)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    everyones = [torch.empty_like(weights) for _ in range(RANKS)]
    dist.all_gather(everyones, weights)
    assert torch.equal(*everyones), "all ranks have the same weights"
    statistics = gather(rank, model)
    if rank == 0:
        check(statistics)
    dist.destroy_process_group()
    # Gloo's threads outlive the group after DDP, and abort Python's shutdown if they are still busy (PyTorch 2.13).
    time.sleep(1)


def train(rank: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    compile_with_fallback(model, name=f"rank {rank}", policy=RetryPolicy.every(calls=2))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for _ in range(STEPS):
        inputs = torch.randn(4, 8)
        loss = nn.functional.mse_loss(ddp(inputs), inputs.sum(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def gather(rank: int, model: nn.Module) -> list[dict[str, Any]]:
    """Gather the statistics of all ranks, on every rank."""
    compiled = compiled_function(model)
    statistics: list[Any] = [None] * RANKS
    dist.all_gather_object(statistics, {"rank": rank, "state": compiled.state.value, **compiled.stats.as_dict()})
    return statistics


def check(statistics: list[dict[str, Any]]) -> None:
    for row in statistics:
        print("rank {rank}: {state}, {eager_calls} eager and {compiled_calls} compiled calls".format_map(row))
    healthy, failed = statistics
    assert (healthy["failures"], failed["failures"]) == (0, 2), "only rank 1 had failures"
    assert healthy["compiled_calls"] == STEPS, "rank 0 always ran compiled code"
    assert failed["calls"] == STEPS, "rank 1 took every step, once"
    assert (failed["state"], failed["recoveries"]) == ("compiled", 1), "rank 1 recovered"


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        spawn(work, (folder,), nprocs=RANKS)  # raises if a process does


if __name__ == "__main__":
    main()
