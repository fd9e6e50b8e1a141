"""A program of the shape of ultralytics, which needs OpenCV and torchvision.

Its trainer looks for a compiler, compiles the model, and trains it. It keeps an average of the plain model, compiles
that one for validation, and warms it up in inference mode.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler

STEPS = 20
SIZE = 16


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.SiLU())
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.head(self.body(images)))

    def loss(self, predictions: Tensor, boxes: Tensor) -> Tensor:
        return nn.functional.smooth_l1_loss(predictions.mean(dim=(2, 3)), boxes)


def attempt_compile(model: nn.Module, *, warmup: bool = False) -> nn.Module:
    """Compile the model, or return it as it is if that is not possible."""
    try:
        get_cpp_compiler()
        compiled = cast("nn.Module", torch.compile(model, mode="default", backend="inductor"))
    except Exception as exc:
        print(f"continues without a compiled model: {exc}")
        return model
    if warmup:
        with torch.inference_mode():
            compiled(torch.zeros(1, 3, SIZE, SIZE))
    return compiled


def unwrap(model: Any) -> Any:
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model


def main() -> None:
    model = attempt_compile(Detector())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    average = copy.deepcopy(unwrap(model)).eval()
    for _ in range(STEPS):
        predictions = model(torch.rand(2, 3, SIZE, SIZE))
        unwrap(model).loss(predictions, torch.rand(2, 5)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
        optimizer.step()
        optimizer.zero_grad()
        for kept, new in zip(average.state_dict().values(), unwrap(model).state_dict().values(), strict=True):
            kept.lerp_(new, 0.1) if kept.is_floating_point() else kept.copy_(new)
    attempt_compile(average, warmup=True)
    assert list(unwrap(model).state_dict()) == list(Detector().state_dict())
    print(f"took {STEPS} steps")


if __name__ == "__main__":
    main()
