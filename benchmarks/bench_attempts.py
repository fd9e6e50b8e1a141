"""The cost of an attempt: a retry compared with a first compile, and the first step of equal blocks."""

from __future__ import annotations

import resource
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from children import child
from compile_retry import RetryPolicy, compile_with_fallback, instrumentation
from compile_retry.testing import fail_compiles
from subjects import BARE, OURS, Subject

LAPS = range(3)


def network() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(4)))


def step(model: nn.Module, inputs: Tensor) -> Tensor:
    loss: Tensor = model(inputs).square().mean()
    return loss


class Trainer:
    """A fresh process before its first compile. Dynamo has compiled something, so everything is imported."""

    def __init__(self, folder: Path) -> None:
        import torch._inductor.compile_fx  # imported by the first compile

        torch.compile(torch.sin, backend="eager")(torch.ones(2))
        self._broken = folder / "broken"
        self._model, self._inputs = network(), torch.rand(32, 64)
        self._bare = torch.compile(step)
        self._ours = compile_with_fallback(step, policy=RetryPolicy(wait=None, wait_calls=1))

    def ready(self) -> None:
        """Return when all of this exists."""

    def fail(self, injected: bool) -> None:
        injection: AbstractContextManager[object] = nullcontext()
        if injected:
            injection = fail_compiles(OSError(28, "No space left on device"))
        else:
            self._broken.touch()
        with injection:
            self._ours(self._model, self._inputs)
        assert self._ours.stats.failures == 1
        self._broken.unlink(missing_ok=True)

    def bare(self) -> None:
        self._bare(self._model, self._inputs).backward()

    def ours(self) -> None:
        self._ours(self._model, self._inputs).backward()
        assert self._ours.stats.compiled_calls == 1


@pytest.mark.parametrize("what", [BARE.name, "first compile", "retry", "retry, compiler was broken"])
@pytest.mark.parametrize("lap", LAPS)
def test_an_attempt(benchmark: BenchmarkFixture, tmp_path: Path, what: str, lap: int) -> None:
    """Forward and backward, in a fresh process with an empty cache, including the compiler probes."""
    with child(Trainer, tmp_path) as trainer:
        trainer.ask("ready")
        if what.startswith("retry"):
            trainer.ask("fail", what == "retry")
        benchmark.extra_info.update(table="attempt", row="four layers, forward and backward", column=what, lap=lap)
        benchmark.pedantic(trainer.ask, args=("bare" if what == BARE.name else "ours",), rounds=1)


BLOCKS = 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
        return y


class Stack:
    """A fresh process with a model of equal blocks, compiled one by one, before its first step."""

    def __init__(self, folder: Path, subject: Subject) -> None:
        import torch._inductor.compile_fx

        instrumentation.disable()  # otherwise the first event imports the metrics clients that are installed
        torch.compile(torch.sin, backend="eager")(torch.ones(2))
        self._inputs = torch.rand(32, 64)
        self._blocks = [Block() for _ in range(BLOCKS)]
        for block in self._blocks:
            block.forward = subject.make(block.forward)  # type: ignore[method-assign]  # a function for both subjects

    def ready(self) -> None:
        """Return when all of this exists."""

    def step(self) -> None:
        x = self._inputs
        for block in self._blocks:
            x = block(x)
        x.square().mean().backward()

    def peak(self) -> int:
        """Return the largest size that the process has had in memory, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("subject", [BARE, OURS], ids=str)
@pytest.mark.parametrize("lap", LAPS)
def test_the_first_step_of_equal_blocks(
    benchmark: BenchmarkFixture, tmp_path: Path, subject: Subject, lap: int
) -> None:
    """Forward and backward of blocks wrapped one by one, in a fresh process with an empty cache."""
    with child(Stack, tmp_path, subject) as stack:
        stack.ask("ready")
        benchmark.extra_info.update(
            table="equal blocks", row=f"{BLOCKS} blocks, forward and backward", column=str(subject), lap=lap
        )
        benchmark.pedantic(stack.ask, args=("step",), rounds=1)


@pytest.mark.parametrize("subject", [BARE, OURS], ids=str)
def test_the_memory_of_equal_blocks(benchmark: BenchmarkFixture, tmp_path: Path, subject: Subject) -> None:
    """Ignore the timer: the value is in `extra_info`."""
    with child(Stack, tmp_path, subject) as stack:
        benchmark.pedantic(stack.ask, args=("step",), rounds=4)
        row = f"{BLOCKS} blocks, after four steps"
        benchmark.extra_info.update(table="peak memory", row=row, column=str(subject), lap=0, value=stack.ask("peak"))
