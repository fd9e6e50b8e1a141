"""The memory of a healthy train step, forward and backward: its peak over what the process holds between steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from children import RETURNS_MEMORY, child
from subjects import BARE, OURS, Subject

VOCABULARY = 32_000


def perceptron() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(4)))
    inputs = torch.rand(32_768, 512)
    return model, lambda: model(inputs).square().mean()


def convolutions() -> tuple[nn.Module, Callable[[], Tensor]]:
    widths = (3, 32, 32)
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in itertools.pairwise(widths)
    ]
    model = nn.Sequential(*layers, nn.Conv2d(32, 8, 3, padding=1))
    inputs = torch.rand(16, 3, 224, 224)
    return model, lambda: model(inputs).square().mean()


def language_model() -> tuple[nn.Module, Callable[[], Tensor]]:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 128), layer, nn.Linear(128, VOCABULARY))
    tokens, targets = torch.randint(VOCABULARY, (8, 256)), torch.randint(VOCABULARY, (8 * 256,))
    return model, lambda: nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets)


def capped_logits() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Linear(128, VOCABULARY, bias=False)
    inputs, targets = torch.rand(2048, 128), torch.randint(VOCABULARY, (2048,))
    return model, lambda: nn.functional.cross_entropy(30 * torch.tanh(model(inputs) / 30), targets)


MODELS = {
    "four linear layers": perceptron,
    "three convolutions": convolutions,
    "a transformer layer, 32,000 logits": language_model,
    "32,000 capped logits": capped_logits,
}


class Trainer:
    """A process that trains one of the models."""

    def __init__(self, folder: Path, subject: Subject, name: str) -> None:
        torch.manual_seed(0)
        self._model, loss = MODELS[name]()
        self._loss = subject.make(loss)

    def step(self) -> None:
        self._loss().backward()
        for parameter in self._model.parameters():
            parameter.grad = None

    def peak(self) -> int:
        """Return by how much the process grows during a step, in bytes."""
        for _ in range(3):
            self.step()
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
        before = _status("VmRSS")
        for _ in range(3):
            self.step()
        return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.parametrize("subject", [BARE, OURS], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_memory_of_a_step(benchmark: BenchmarkFixture, tmp_path: Path, name: str, subject: Subject) -> None:
    """Ignore the timer: the value is in `extra_info`."""
    with child(Trainer, tmp_path, subject, name, memory=RETURNS_MEMORY) as trainer:
        peak = benchmark.pedantic(trainer.ask, args=("peak",), rounds=1)
        benchmark.extra_info.update(table="step memory", row=name, column=str(subject), lap=0, value=peak)
