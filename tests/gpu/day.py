"""A day of training on a GPU, in a process of its own, beside an eager twin with the same seed and the same data.

The tests run `Day` in fresh processes, because what breaks is cached there: by torch, by Triton, and by the driver.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compile_retry import CompiledFunction, CompileState, RetryPolicy, compile_with_fallback

# For trying the programs out without a GPU.
DEVICE = os.environ.get("COMPILE_RETRY_TEST_DEVICE", "cuda")
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 256),
            nn.BatchNorm1d(256),
            nn.GELU(),
            nn.Linear(256, 256),
            nn.LayerNorm(256),
            nn.Linear(256, 8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x)
        return result


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), y)


class Day:
    """Trains a network with the library, and its twin eagerly, and compares them after each step."""

    def __init__(self, policy: RetryPolicy = EVERY_CALL, *, tolerance: float = 1e-3, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Network().to(DEVICE)
        self.twin = copy.deepcopy(self.model)
        self.step: CompiledFunction[..., torch.Tensor] = compile_with_fallback(step, policy=policy, **options)
        self._optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (self.model, self.twin)]
        self._generator = torch.Generator().manual_seed(1)
        self._tolerance = tolerance

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            x = torch.randn(128, 64, generator=self._generator).to(DEVICE)
            y = torch.randint(8, (128,), generator=self._generator).to(DEVICE)
            ours, theirs = self.step(self.model, x, y), step(self.twin, x, y)
            for loss, optimizer in zip((ours, theirs), self._optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            close: Callable[..., None] = torch.testing.assert_close
            close(ours.detach(), theirs.detach(), rtol=self._tolerance, atol=self._tolerance)
            close(self.model.state_dict(), self.twin.state_dict(), rtol=self._tolerance, atol=self._tolerance)

    def assert_fell_back(self) -> None:
        assert self.step.state is CompileState.FALLBACK, self.step.state
        assert self.step.last_failure is not None
        assert self.step.last_failure.kind == "transient", self.step.last_failure

    def assert_recovered(self) -> None:
        """The state is COMPILED, and a step runs Triton's kernels again."""
        stats = self.step.stats
        assert self.step.state is CompileState.COMPILED, (self.step.state, self.step.last_failure)
        assert stats.recoveries == 1, stats
        assert stats.failures >= 1, stats
        if DEVICE == "cuda":
            assert any(name.startswith("triton_") for name in self.kernels()), self.kernels()

    def kernels(self) -> set[str]:
        """Train one more step, and return the names of the kernels that it ran on the device."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self.train()
            torch.cuda.synchronize()
        return {event.key for event in profile.key_averages()}
