"""Accelerate compiles the model in `prepare()`."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 20


def main() -> None:
    accelerator = Accelerator(cpu=True, dynamo_backend="inductor")
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    inputs = torch.randn(4 * STEPS, 8)
    data = DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=4)
    prepared, optimizer, data = accelerator.prepare(model, optimizer, data)
    steps = 0
    for batch, targets in data:
        accelerator.backward(nn.functional.mse_loss(prepared(batch), targets))
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    assert accelerator.unwrap_model(prepared, keep_torch_compile=False) is model
    print(f"took {steps} steps")


if __name__ == "__main__":
    main()
