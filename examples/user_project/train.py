"""A small project that uses compile-retry to fit a linear model. Run its tests with `pytest` in this folder."""

from __future__ import annotations

import torch

from compile_retry import RetryPolicy, compile_with_fallback


@compile_with_fallback(policy=RetryPolicy.every(calls=2))
def train_step(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(inputs), targets)


def train(steps: int) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        inputs = torch.randn(8, 4)
        loss = train_step(model, inputs, inputs.sum(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train(steps=50)[-1], train_step)
