"""Speed and memory beside stock, on the same card in one run. Writes `docs/gpu-table.md`; asserts on results only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import nn

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import fail_compiles

TABLE = Path(__file__).parents[2] / "docs" / "gpu-table.md"
Step: TypeAlias = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + y


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        loss: torch.Tensor = model(x).square().mean()
    loss.backward()
    return loss.detach()


def measure(fn: Step) -> dict[str, float]:
    """Return the first step's seconds, the median milliseconds of a step, and the peak memory in MiB."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(6))).cuda()
    x = torch.randn(16, 256, 768, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    fn(model, x)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    for _ in range(5):
        fn(model, x)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(50):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fn(model, x)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return {"first": first, "step": statistics.median(times), "memory": torch.cuda.max_memory_allocated() / 2**20}


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, dict[str, float]]]:
    """Collect the measurements, and write the table at the end."""
    rows: dict[str, dict[str, float]] = {}
    yield rows
    bare = rows["bare `torch.compile`"]
    lines = [
        "<!-- Written by `make gpu`. Do not edit. -->",
        "",
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}.",
        "",
        "| six blocks, forward and backward, bf16 | first step | step | peak memory | step against bare |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {row['first']:.1f} s | {row['step']:.2f} ms | {row['memory']:.0f} MiB "
            f"| {row['step'] / bare['step']:.3f}x |"
            for name, row in rows.items()
        ),
    ]
    TABLE.write_text("\n".join(lines) + "\n")


def fresh(cache: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    patch.setenv("TRITON_CACHE_DIR", str(cache / "triton"))
    torch._dynamo.reset()
    torch._inductor.utils.clear_caches()


def recovered() -> Any:
    fn = compile_with_fallback(step, policy=RetryPolicy(wait=None, wait_calls=1))

    def first_fails(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not fn.stats.calls:
            with fail_compiles(MemoryError, times=1):
                fn(model, x)
        return fn(model, x)

    first_fails.fn = fn  # type: ignore[attr-defined]
    return first_fails


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("bare `torch.compile`", lambda: torch.compile(step)),
        ("`compile_with_fallback`", lambda: compile_with_fallback(step)),
        ("the same, after a failure and its recovery", recovered),
        ("eager", lambda: step),
    ],
)
def test_a_training_step(
    name: str, make: Callable[[], Step], rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variant is measured with an empty cache."""
    fresh(tmp_path, monkeypatch)
    fn = make()
    rows[name] = measure(fn)
    ours = getattr(fn, "fn", fn)
    assert getattr(ours, "state", CompileState.COMPILED) is CompileState.COMPILED
