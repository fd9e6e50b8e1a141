"""A bad day: the compiler is broken for the first part of a training run.

Measures the time to finish, compared with an ideal that knows the moment of the repair: it runs eagerly until then,
without attempts, and then compiles once. Long runs are simulated: the library, Dynamo and the alternatives are real,
but a fake clock sets how long a step, a compile or a failed attempt takes. The short run is real, with a really broken
compiler.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.compile_fx  # so that no child imports it while being timed
from pytest_benchmark.fixture import BenchmarkFixture
from tenacity import wait_exponential
from torch import Tensor, nn
from torch.fx import GraphModule

from children import Child, ChildError, child, has_compiler
from compile_retry import CompiledFunction, RetryPolicy
from compile_retry.testing import FakeClock
from subjects import BARE, EAGER, LATCH, OURS, RETRY, SUPPRESS, Step, Subject

DIES = "dies"


@dataclass(frozen=True)
class Contestant:
    """A row: a subject and, if it is the library, the differences from the default policy, also in words."""

    subject: Subject
    policy: dict[str, Any] = field(default_factory=dict)
    words: str = ""

    def __str__(self) -> str:
        return f"{self.subject}, {self.words}" if self.words else str(self.subject)

    def make(self, step: Step, clock: Callable[[], float] = time.monotonic, **options: Any) -> Step:
        if self.subject == OURS:  # equal but not identical in a child
            options["policy"] = RetryPolicy(**self.policy, clock=clock)
        return self.subject.make(step, **options)


OFTEN = Contestant(OURS, {"wait": 30}, "`wait=30`")
FORMER_DEFAULT = Contestant(
    OURS,
    {"wait": wait_exponential(multiplier=30, min=30, max=3600), "max_overhead": 0.05},
    "30 s doubling, `max_overhead=0.05`",
)
ALTERNATIVES = [Contestant(subject) for subject in (BARE, LATCH, RETRY, SUPPRESS, EAGER)]


# --- Long runs, in simulated time. ------------------------------------------------------------------------------------

# Seconds. A run of 8 h has up to 18,720 steps.
COMPILED_STEP, EAGER_STEP = 1.5, 3.0
COMPILE = 30.0

LENGTHS = {"10 min": 600.0, "1 h": 3600.0, "8 h": 28800.0}


@dataclass(frozen=True)
class Day:
    """The fault in a run.

    Attributes:
        length: Length of the ideal run: one of `LENGTHS`.
        share: Share of it during which the compiler is broken; 1 if it is never repaired.
        attempt: Seconds until an attempt fails.
    """

    length: str
    share: float
    attempt: float

    def __str__(self) -> str:
        broken = "never repaired" if self.share == 1 else f"broken {self.share:.0%}"
        return f"{broken}, {self.attempt:g} s to fail"

    @property
    def repair(self) -> float:
        return math.inf if self.share == 1 else self.share * LENGTHS[self.length]

    def ideal(self) -> tuple[int, float]:
        """Return the number of steps of the run, and when the ideal finishes them."""
        steps, now, has_compiled = 0, 0.0, False
        while now < LENGTHS[self.length]:
            if now < self.repair:
                now += EAGER_STEP
            else:
                now += COMPILED_STEP if has_compiled else COMPILE + COMPILED_STEP
                has_compiled = True
            steps += 1
        return steps, now


class World:
    """A clock, a compiler that is broken until the repair, and a step."""

    def __init__(self, day: Day) -> None:
        self._day = day
        self.clock = FakeClock()
        self._compiled = False  # what ran last

    def compiler(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if self.clock() < self._day.repair:
            self.clock.advance(self._day.attempt)
            raise OSError(28, "No space left on device")
        self.clock.advance(COMPILE)

        def run(*args: Any) -> Any:
            self._compiled = True
            return graph.forward(*args)

        return run

    def run(self, step: Step, steps: int) -> float:
        """Return the time at which that many steps are done."""
        x = torch.ones(2)
        for _ in range(steps):
            self._compiled = False
            step(x)
            self.clock.advance(COMPILED_STEP if self._compiled else EAGER_STEP)
        return self.clock()


def double(x: Tensor) -> Tensor:
    return 2 * x


def simulate(contestant: Contestant, day: Day) -> float | str:
    """Return the time to finish divided by the ideal's."""
    world = World(day)
    steps, ideal = day.ideal()
    with contestant.subject.setting():
        step = contestant.make(double, clock=world.clock, backend=world.compiler)
        try:
            return world.run(step, steps) / ideal
        except Exception:
            return DIES


@pytest.fixture
def quiet() -> Iterator[None]:
    """Silence torch and the library; drop all compiled code afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "compile_retry")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch._dynamo.reset()


ATTEMPTS = (1.0, 10.0, 60.0)
DAYS = [Day(*values) for values in itertools.product(LENGTHS, (0.1, 0.5), ATTEMPTS)]
DAYS += [Day("8 h", 1.0, attempt) for attempt in ATTEMPTS]
SIMULATED = [Contestant(OURS), FORMER_DEFAULT, OFTEN, *ALTERNATIVES]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("contestant", SIMULATED, ids=str)
@pytest.mark.parametrize("day", DAYS, ids=lambda day: f"{day.length} {day}")
def test_simulated(benchmark: BenchmarkFixture, day: Day, contestant: Contestant) -> None:
    """Ignore the timer, which measures the simulation: the value is in `extra_info`."""
    value = benchmark.pedantic(simulate, args=(contestant, day), rounds=1, iterations=1)
    assert (value == DIES) == (contestant.subject is BARE)
    benchmark.extra_info.update(
        table=f"bad day, {day.length}", row=str(contestant), column=str(day), lap=0, value=value
    )


def share_of(contestant: Contestant, functions: int) -> float:
    """Return the share of eight hours that the failed attempts of several functions take, one step after another."""
    world, failed = World(Day("8 h", 1.0, 60.0)), 0.0

    def compiler(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal failed
        failed += 60
        return world.compiler(graph, inputs)

    with contestant.subject.setting():
        copies = [FunctionType(double.__code__.replace(), globals()) for _ in range(functions)]
        steps = [contestant.make(copy, clock=world.clock, backend=compiler) for copy in copies]
        while world.clock() < LENGTHS["8 h"]:
            for step in steps:
                step(torch.ones(2))
            world.clock.advance(EAGER_STEP)
    return failed / world.clock()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("contestant", [Contestant(OURS), OFTEN, Contestant(RETRY)], ids=str)
@pytest.mark.parametrize("functions", [1, 20, 100])
def test_simulated_functions(benchmark: BenchmarkFixture, functions: int, contestant: Contestant) -> None:
    """Ignore the timer, which measures the simulation: the value is in `extra_info`."""
    value = benchmark.pedantic(share_of, args=(contestant, functions), rounds=1, iterations=1)
    column = "1 function" if functions == 1 else f"{functions} functions"
    benchmark.extra_info.update(table="bad day, functions", row=str(contestant), column=column, lap=0, value=value)


# --- A short run, in real time, with a compiler that is really broken. ------------------------------------------------

BROKEN, LENGTH = 20.0, 120.0
LIMIT = 190.0  # for runs that do not finish
POINTS, WIDTH = 8192, 32


class Snake(nn.Module):
    """The activation x + sin(ax)^2 / a. PyTorch has no kernel for it, so compiling pays off even on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.a * x).square() / (self.a + 1e-6)


def network() -> nn.Sequential:
    """A network that maps a point's coordinates to a value."""
    layers: list[nn.Module] = [nn.Linear(2, WIDTH), Snake()]
    for _ in range(2):
        layers += [nn.Linear(WIDTH, WIDTH), Snake()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(inputs), targets)


def ideal(step: Step, broken: Path) -> Step:
    """Run eagerly until the compiler is repaired, then compile."""
    compiled, repaired = torch.compile(step), False

    def run(*args: Any) -> Any:
        nonlocal repaired
        repaired = repaired or not broken.exists()
        return compiled(*args) if repaired else step(*args)

    return run


class Training:
    """A training run in a child process."""

    def __init__(self, folder: Path, contestant: Contestant | None) -> None:
        torch.manual_seed(0)
        self._model = network()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._batch = torch.rand(POINTS, 2), torch.rand(POINTS, 1)
        if contestant is None:
            self._loss_of = ideal(loss_of, folder / "broken")
        else:
            contestant.subject.setting().__enter__()  # for as long as the process lives
            self._loss_of = contestant.make(loss_of)

    def ready(self) -> None:
        """Return when everything is imported."""

    def run(self, steps: int, seconds: float) -> int:
        """Train until this many steps are done, or the time is over. Returns the number of steps done."""
        done, end = 0, time.perf_counter() + seconds
        while done < steps and time.perf_counter() < end:
            self._step()
            done += 1
        return done

    def books(self) -> dict[str, float]:
        """Return the library's statistics, or nothing for the others."""
        return self._loss_of.stats.as_dict() if isinstance(self._loss_of, CompiledFunction) else {}

    def _step(self) -> None:
        loss = self._loss_of(self._model, *self._batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def train_on_a_bad_day(training: Child, folder: Path, steps: int, seconds: float) -> int | str:
    """Train while the compiler is broken at first. Returns the steps done, or the error that ended the run."""
    repair = threading.Timer(BROKEN, (folder / "broken").unlink)
    repair.start()
    try:
        done: int = training.ask("run", steps, seconds)
        return done
    except ChildError as exc:
        return f"{DIES}: {exc}"
    finally:
        repair.cancel()


IDEAL = "ideal"
REAL = [Contestant(OURS), OFTEN, *ALTERNATIVES]


@pytest.fixture(scope="module")
def steps() -> dict[str, int]:
    """The number of steps that the ideal run did, once it has run."""
    return {}


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler to break")
@pytest.mark.parametrize("contestant", [None, *REAL], ids=lambda contestant: str(contestant or IDEAL))
def test_real(
    benchmark: BenchmarkFixture, tmp_path: Path, steps: dict[str, int], contestant: Contestant | None
) -> None:
    """Run the ideal first, for a fixed time; the others do the same number of steps."""
    if contestant is not None and not steps:
        pytest.skip("the ideal has not run")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "broken").touch()
    with child(Training, folder, contestant) as training:
        training.ask("ready")
        train = partial(train_on_a_bad_day, training, folder)
        limits = (sys.maxsize, LENGTH) if contestant is None else (steps[IDEAL], LIMIT)
        answer = benchmark.pedantic(train, args=limits, rounds=1, iterations=1)
        benchmark.extra_info.update(steps=answer, books=training.ask("books"))
    died = isinstance(answer, str)
    assert died == (contestant is not None and contestant.subject is BARE), answer
    benchmark.extra_info.update(table="bad day, for real", row="time to finish", column=str(contestant or IDEAL), lap=0)
    if contestant is None:
        steps[IDEAL] = answer
    elif died:
        benchmark.extra_info.update(value=DIES, error=answer)
    elif answer < steps[IDEAL]:
        benchmark.extra_info.update(value=f"> {LIMIT / LENGTH:.2f}")
