"""A program of the shape of timm's training script, which needs torchvision.

A task compiles the model of a train step, which runs under autocast and accumulates gradients. The optimizer compiles
its update, as timm's Kron does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

STEPS = 20


class ClassificationTask(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trainable_module = model
        self.criterion = nn.CrossEntropyLoss()

    def compile(self, backend: str = "inductor", mode: str | None = None, **options: Any) -> None:
        compiled = torch.compile(self.trainable_module, backend=backend, mode=mode, **options)
        self.trainable_module = cast("nn.Module", compiled)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return cast("Tensor", self.criterion(self.trainable_module(images), target))


def update(weights: list[Tensor], gradients: list[Tensor]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.sub_(0.05 * gradient.clamp(-1, 1))


class Clipped(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self._update = torch.compile(update, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # stock returns a loss with a closure
        weights = self.param_groups[0]["params"]
        self._update(weights, [weight.grad for weight in weights])


def main() -> None:
    task = ClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.GELU(), nn.Linear(16, 10)))
    names = list(task.trainable_module.state_dict())
    task.compile()
    optimizer = Clipped(task.parameters())
    for step in range(2 * STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = task(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))
        (loss / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert [name.removeprefix("_orig_mod.") for name in task.trainable_module.state_dict()] == names
    print(f"took {STEPS} steps")


if __name__ == "__main__":
    main()
