"""Recovered code compared with code that never failed, side by side.

Two processes train the same network with the same decorator. In one, the first attempt fails and a later one succeeds;
in the other, nothing fails. Then both take steps in turns, so that other load on the machine affects both alike. With
the fault "nothing", the table shows how much two healthy processes differ.
"""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional as F

from children import Child, child, has_compiler
from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import fail_compiles

LAPS = 15

# The first call fails, the second is held off, the third recovers.
POLICY = RetryPolicy(wait=None, wait_calls=2)
CALLS_DURING, CALLS_AFTER = 2, 6


# --- Three networks, each with a batch: steps of 5 to 50 ms on one thread. --------------------------------------------

Work = tuple[nn.Module, Tensor, Tensor]


def mlp() -> Work:
    layers = [nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(256, 256), torch.randint(10, (256,))


def cnn() -> Work:
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((3, 16), (16, 32), (32, 32)):
        convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(channels_out), nn.GELU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))
    return model, torch.randn(64, 3, 16, 16), torch.randint(10, (64,))


class Block(nn.Module):
    """Causal attention and an MLP, each with a LayerNorm and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        layers = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time, width))
        y: Tensor = x + self.mlp(x)
        return y


class GPT(nn.Module):
    """Two blocks, with the head tied to the embedding."""

    def __init__(self, vocabulary: int = 256, context: int = 64, width: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.token.weight)


def gpt() -> Work:
    tokens = torch.randint(256, (8, 65))
    return GPT(), tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True)
class Network:
    name: str
    make: Callable[[], Work]
    steps: int  # per lap: about half a second


NETWORKS = (Network("MLP", mlp, 40), Network("CNN", cnn, 40), Network("GPT", gpt, 20))


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


# --- The faults, each repaired at the end of its block. ---------------------------------------------------------------


def injected(folder: Path) -> AbstractContextManager[object]:
    return fail_compiles(OSError(28, "No space left on device"))


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Fill up the folder, which must be a tmpfs."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    yield
    filler.unlink()


@contextmanager
def broken_compiler(folder: Path) -> Iterator[None]:
    """Point CXX to a script that fails."""
    flag = folder / "broken"
    flag.touch()
    yield
    flag.unlink()


@dataclass(frozen=True)
class Fault:
    name: str
    make: Callable[[Path], AbstractContextManager[object]]
    tmpfs: bool = False


NOTHING = Fault("nothing", nullcontext)
FAULTS = (
    NOTHING,
    Fault("injected failure", injected),
    Fault("full disk", full_disk, tmpfs=True),
    Fault("broken compiler", broken_compiler),
)


# --- A training run in a separate process. ----------------------------------------------------------------------------


class Trainee:
    """A network and its optimizer."""

    def __init__(self, model: nn.Module, loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        self._model, self._loss_of = model, loss_of
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(self, *batch: Tensor) -> Tensor:
        loss = self._loss_of(self._model, *batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


class Training:
    """A training run in a child process: hits the fault, recovers, and takes more steps on request."""

    def __init__(self, folder: Path, network: Network, fault: Fault) -> None:
        torch.manual_seed(0)
        model, *self._batch = network.make()
        self._function = compile_with_fallback(loss_of, policy=POLICY)
        self._twin = Trainee(copy.deepcopy(model), loss_of)
        self._trainee = Trainee(model, self._function)
        self._folder, self._fault = folder, fault

    def recover(self) -> None:
        """Train next to an eager twin; the losses must be equal before, during and after the failure."""
        with self._fault.make(self._folder):
            self._beside_twin(CALLS_DURING)
        self._beside_twin(CALLS_AFTER)
        self.check()

    def check(self) -> None:
        """Assert that the function runs compiled code, after one failure and recovery, or none without a fault."""
        stats, state = self._function.stats, self._function.state
        failures = int(self._fault.name != NOTHING.name)
        assert state is CompileState.COMPILED, state
        assert stats.failures == stats.recoveries == failures, stats
        held_off = CALLS_DURING if failures else 0
        assert stats.eager_calls == held_off, stats

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._trainee.step(*self._batch)

    def _beside_twin(self, steps: int) -> None:
        for _ in range(steps):
            losses = self._trainee.step(*self._batch), self._twin.step(*self._batch)
            torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@contextmanager
def tmpfs(folder: Path) -> Iterator[None]:
    """Mount a small tmpfs there."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own needs root, and the right to mount it")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def training(folder: Path, network: Network, fault: Fault) -> Iterator[Child]:
    """A warmed-up process that has recovered from the fault."""
    with ExitStack() as stack:
        if fault.tmpfs:
            stack.enter_context(tmpfs(folder))
        process = stack.enter_context(child(Training, folder, network, fault))
        process.ask("recover")
        process.ask("run", network.steps)
        yield process
        process.ask("check")


class Stage:
    """The live processes: one network's reference, and one that recovered from one fault."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder
        self._reference, self._recovered = ExitStack(), ExitStack()
        self._alive: dict[str, tuple[object, Child]] = {}

    def process(self, turn: Turn) -> Child:
        """Return the process whose turn it is. Both are started before either is timed."""
        self._start(self._reference, "never failed", turn.network, NOTHING)
        self._start(self._recovered, "recovered", turn.network, turn.fault)
        return self._alive[turn.who][1]

    def close(self) -> None:
        with self._reference, self._recovered:
            pass

    def _start(self, stack: ExitStack, who: str, network: Network, fault: Fault) -> None:
        case = network, fault
        if who not in self._alive or self._alive[who][0] != case:
            self._alive.pop(who, None)
            stack.close()
            folder = self._make_folder(fault.name.replace(" ", "-"))
            self._alive[who] = case, stack.enter_context(training(folder, network, fault))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Not parametrized fixtures, because pytest would restart the processes for each turn."""
    stage = Stage(tmp_path_factory.mktemp)
    yield stage
    stage.close()


@dataclass(frozen=True)
class Turn:
    """One process's lap. The two processes take turns going first."""

    network: Network
    fault: Fault
    lap: int
    who: str

    def __str__(self) -> str:
        return f"{self.network.name}, {self.fault.name}, lap {self.lap}, {self.who}"


WHO = ("never failed", "recovered")
TURNS = [
    Turn(network, fault, lap, who)
    for network in NETWORKS
    for fault in FAULTS
    for lap in range(LAPS)
    for who in (WHO if lap % 2 else reversed(WHO))
]


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_recovered(benchmark: BenchmarkFixture, stage: Stage, turn: Turn) -> None:
    train = partial(stage.process(turn).ask, "run", turn.network.steps)
    benchmark.pedantic(train, rounds=1, iterations=1)
    row = f"{turn.network.name}, {turn.fault.name}"
    benchmark.extra_info.update(table="recovered", row=row, column=turn.who, lap=turn.lap)
