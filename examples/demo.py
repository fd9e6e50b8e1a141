"""Train with a broken C++ compiler, repair it during the run, and compare with eager training.

    python examples/demo.py            one to two minutes
    python examples/demo.py --smoke    a shorter version

A small classifier learns the handwritten digits that come with scikit-learn. Its train step is decorated with
`@compile_with_fallback`. When training starts, the C++ compiler is really broken: CXX names a script that fails while
a certain file exists. Some steps later that file is removed, without notifying the train step. The step runs eagerly,
retries when its policy says so, and runs compiled code after the first attempt that succeeds.

A twin does the same training eagerly from start to end, as the reference for the results. Then both train on in turns,
to compare their speeds on whatever else this machine is doing. At the end, a plot of the train step's calls is saved;
`--plot PATH` sets the path.

The exit status is 0 if all checks pass and 1 otherwise; speed does not affect it. On a machine without a C++ compiler
everything runs eagerly, and the demo says so. It needs a POSIX shell.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from sklearn.datasets import load_digits
from tenacity import wait_exponential
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, set_strict
from compile_retry.plotting import plot_timeline

PICTURE = Path(__file__).parent.parent / "build" / "timeline.png"


# --- User code: a decorated train step and a policy. ------------------------------------------------------------------

# Retry after 10 calls, then after 20, 40 and so on. In calls, not seconds, so that every machine behaves the same.
POLICY = RetryPolicy(wait=None, wait_calls=wait_exponential(multiplier=10))


@compile_with_fallback(policy=POLICY)
def train_step(
    model: nn.Module, inputs: Tensor, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    outputs = model(inputs)
    return criterion(outputs, targets), outputs


# --- The model and its data. ------------------------------------------------------------------------------------------

BATCH = 128
PIXELS = 64
PROTOTYPES = 8
TEST_IMAGES = 360


class Prototypes(nn.Module):
    """A mixture of eight prototypes for each digit. Outputs the log-likelihood of each digit.

    A pixel differs from the prototype's by Student's t distribution with two degrees of freedom. Its tails are heavy,
    so that a few odd pixels do not rule a prototype out (Peel and McLachlan, 2000).

    There is no matrix product in it, only pointwise operations and sums over a tensor with one element for each image,
    prototype and pixel. Eager writes that tensor to memory once per operation; a compiler fuses them into one loop.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(PIXELS)
        self.means = nn.Parameter(torch.randn(10, PROTOTYPES, PIXELS))
        self.log_scales = nn.Parameter(torch.zeros(10, PROTOTYPES, PIXELS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)[:, None, None, :]
        z = (x - self.means) * torch.exp(-self.log_scales)
        log_density = -self.log_scales - 1.5 * torch.log1p(z.square() / 2)
        return log_density.sum(dim=-1).logsumexp(dim=-1)


class Digits:
    """1797 images of 8 by 8 pixels, with their digits."""

    def __init__(self) -> None:
        digits = load_digits()
        images, targets = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        test, train = _shuffled(len(images), seed=0).tensor_split([TEST_IMAGES])
        self.train = images[train], targets[train]
        self.test = images[test], targets[test]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches forever, in the same order every time."""
        images, targets = self.train
        epoch = 1
        while True:
            for batch in _shuffled(len(images), seed=epoch).split(BATCH)[:-1]:
                yield images[batch], targets[batch]
            epoch += 1


def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# --- Training. --------------------------------------------------------------------------------------------------------

TrainStep: TypeAlias = Callable[
    [nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]],
    tuple[Tensor, Tensor],
]


class Training:
    """A model and its optimizer. All trainings begin alike and see the same batches."""

    def __init__(self, train_step: TrainStep) -> None:
        torch.manual_seed(0)
        self.train_step = train_step
        self.digits = Digits()
        self.batches = self.digits.batches()
        self.model = Prototypes()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.criterion = nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def step(self) -> float:
        """Run forward, backward and the optimizer step. Return the duration in seconds."""
        inputs, targets = next(self.batches)
        began = time.perf_counter()
        loss, _ = self.train_step(self.model, inputs, targets, self.criterion)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - began
        self.losses.append(loss.item())
        return seconds

    def run(self, name: str, steps: int, before_step: Callable[[int], None] = lambda step: None) -> None:
        """Train with a progress bar. Log lines appear above it."""
        seldom = 0.1 if sys.stderr.isatty() else 10.0  # do not fill a file with progress bars
        with logging_redirect_tqdm(), tqdm(range(1, steps + 1), name, unit="step", mininterval=seldom) as bar:
            for step in bar:
                before_step(step)
                self.step()
                bar.set_postfix_str(f"loss {self.losses[-1]:.3f}", refresh=False)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the share of test images classified correctly."""
        images, targets = self.digits.test
        self.model.eval()
        right = self.model(images).argmax(dim=1) == targets
        self.model.train()
        return int(right.sum()) / len(targets)

    def batches_seen(self) -> int:
        """Return BatchNorm's batch count, which exceeds the number of steps if part of a step ran twice."""
        return int(self.model.state_dict()["norm.num_batches_tracked"])


# --- A compiler that is broken and can be repaired. -------------------------------------------------------------------

SCRIPT = """\
#!/bin/sh
if [ -e {flag} ] && [ "$1" != --version ]; then
    echo "virtual memory exhausted: Cannot allocate memory" >&2
    exit 1
fi
exec {real} "$@"
"""


class Compiler:
    """A wrapper script around the real compiler. While broken it still prints its version, but compiles nothing.

    This is how a machine without memory or disk space behaves. It is worse than a missing compiler: torch finds one
    and concludes from its failures that the processor has no vector instructions.
    """

    def __init__(self, real: str, folder: Path) -> None:
        self._flag = folder / "broken"
        self._flag.touch()
        self.path = folder / Path(real).name  # torch identifies the compiler by name
        self.path.write_text(SCRIPT.format(flag=shlex.quote(str(self._flag)), real=shlex.quote(real)))
        self.path.chmod(0o755)

    def repair(self) -> None:
        self._flag.unlink()


def real_compiler() -> str | None:
    """Return the path of this machine's C++ compiler, if any."""
    candidates = map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "c++", "clang++"))
    return next(filter(None, candidates), None)


@contextlib.contextmanager
def environment(cache: Path, cxx: Path | None) -> Iterator[None]:
    """Set torch's compiler and an empty cache directory. torch reads both at its first compile."""
    cache.mkdir()
    before = dict(os.environ)
    # torch writes precompiled headers, 150 MB of them, to TMPDIR regardless of the cache directory.
    os.environ.update(TORCHINDUCTOR_CACHE_DIR=str(cache), TMPDIR=str(cache))
    if cxx is not None:
        os.environ["CXX"] = str(cxx)
    tempfile.tempdir = None  # forget the cached TMPDIR
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        tempfile.tempdir = None


# --- Speed, compared in turns. ----------------------------------------------------------------------------------------

STEPS_PER_TURN = 10


class Turn(NamedTuple):
    """Steps per second of both trainings, measured in direct succession."""

    eager: float
    compiled: float


def take_turns(turns: int, twin: Training, ours: Training) -> list[Turn]:
    """Train on in turns: many and short ones, so that other load on the machine affects both alike."""

    def speed(training: Training) -> float:
        return 1 / statistics.median(training.step() for _ in range(STEPS_PER_TURN))

    return [Turn(eager=speed(twin), compiled=speed(ours)) for _ in range(turns)]


class Median(NamedTuple):
    """A median and its confidence interval."""

    value: float
    low: float
    high: float


def median(values: list[float]) -> Median:
    """Return the median and its 95 % confidence interval, which assumes nothing about the distribution of the values.

    The bounds are the values whose ranks are 0.98 sqrt(n) below and above the middle (Conover, "Practical Nonparametric
    Statistics", section 3.2).
    """
    ranked = sorted(values)
    rank = max(0, math.floor(len(ranked) / 2 - 0.98 * math.sqrt(len(ranked))))
    return Median(statistics.median(ranked), low=ranked[rank], high=ranked[-1 - rank])


# --- The demo. --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    steps: int
    repair_at: int
    turns: int


WHOLE = Plan(steps=300, repair_at=100, turns=30)
SMOKE = Plan(steps=60, repair_at=5, turns=12)


def tell(plan: Plan, folder: Path, picture: Path) -> bool:
    """Run the demo. Return True if all checks pass."""
    torch.set_num_threads(1)  # with more threads than free cores they wait for each other, and timings vary
    real = real_compiler()
    compiler = None if real is None else Compiler(real, folder)
    with environment(folder / "cache", compiler.path if compiler else None):
        twin, ours = train(plan, compiler)
        if compiler is not None:
            tell_speed(take_turns(plan.turns, twin, ours))
    tell_results(twin, ours)
    tell_books()
    draw(picture)
    return verdict(claims(twin, ours, has_compiler=compiler is not None))


def train(plan: Plan, compiler: Compiler | None) -> tuple[Training, Training]:
    """Train the twin eagerly, then do the same training with a compiler that is broken at first."""
    say(f">>> {plan.steps} steps, eagerly: what the results should be\n")
    twin = Training(train_step.eager)
    twin.run("eager twin", plan.steps)

    def before_step(step: int) -> None:
        if compiler is not None and step == plan.repair_at:
            compiler.repair()
            say(f">>> step {step}: compiler repaired; train_step is not notified, next attempt {train_step.next_retry}")

    broken = "the C++ compiler is broken" if compiler else "there is no C++ compiler"
    say(f"\n>>> the same {plan.steps} steps, decorated with @compile_with_fallback; {broken}\n")
    ours = Training(train_step)
    ours.run("training", plan.steps, before_step)
    return twin, ours


def claims(twin: Training, ours: Training, *, has_compiler: bool) -> dict[str, bool]:
    """Return the checks, and for each of them if it is true."""
    stats, steps = train_step.stats, len(ours.losses)
    # The first compiled step ends the eager ones, because all its calls have the same shapes.
    pairs = list(zip(twin.losses, ours.losses, strict=True))
    found = {
        "each step happened exactly once": ours.batches_seen() == stats.calls == steps,
        "attempts failed, and training continued eagerly": stats.failures > 0 and stats.eager_calls > 0,
        "up to the recovery, each loss is the eager twin's": all(a == b for a, b in pairs[: stats.eager_calls]),
    }
    if not has_compiler:
        found["nothing was compiled"] = stats.eager_calls == steps
        return found
    recovered = train_step.state is CompileState.COMPILED and stats.recoveries == 1
    found["it recovered without help, and has run compiled code since"] = recovered
    found["after it, each loss is the twin's within 0.1 %"] = all(math.isclose(a, b, rel_tol=1e-3) for a, b in pairs)
    return found


def draw(path: Path) -> None:
    """Save a plot of the train step's calls, and one for dark pages."""
    # Imported only after the speeds were measured, so that it cannot affect them. No pyplot: there may be no display.
    from matplotlib.figure import Figure
    from matplotlib.style import context

    path.parent.mkdir(parents=True, exist_ok=True)
    for style, place in (("default", path), ("dark_background", path.with_stem(f"{path.stem}-dark"))):
        with context(style):
            figure = Figure(figsize=(9, 3.8), layout="constrained")
            plot_timeline(train_step, figure.subplots())
            figure.savefig(place, dpi=110)
    say(f"\n>>> plot of the calls: {path}, and beside it one for dark pages")


# --- Output. ----------------------------------------------------------------------------------------------------------


def say(text: str = "") -> None:
    tqdm.write(text, file=sys.stdout)


def tell_books() -> None:
    say("\n>>> statistics: train_step.stats\n")
    for name, value in train_step.stats.as_dict().items():
        say(f"    {name:<18} {value:>8}" if isinstance(value, int) else f"    {name:<18} {value:>8.2f}")


def tell_speed(turns: list[Turn]) -> None:
    ratio = median([turn.compiled / turn.eager for turn in turns])
    say(f"\n>>> speed: {len(turns)} turns of {STEPS_PER_TURN} eager and {STEPS_PER_TURN} compiled steps\n")
    say(f"    eager     {statistics.median(turn.eager for turn in turns):>8.1f} steps/s")
    say(f"    compiled  {statistics.median(turn.compiled for turn in turns):>8.1f} steps/s")
    say(f"    ratio     {ratio.value:>8.2f} (95 % confidence: {ratio.low:.2f} to {ratio.high:.2f})\n")
    if ratio.low <= 1 <= ratio.high:
        say("    This machine was too busy to tell which of them is faster.")
    else:
        say(f"    On this machine, a compiled step is {'faster' if ratio.low > 1 else 'slower'} than an eager one.")


def tell_results(twin: Training, ours: Training) -> None:
    say(f"\n>>> results after {len(ours.losses)} steps\n")
    say(f"    {'':<16} {'eager twin':>12} {'train_step':>12}")
    say(f"    {'last loss':<16} {twin.losses[-1]:>12.6f} {ours.losses[-1]:>12.6f}")
    say(f"    {'test accuracy':<16} {twin.accuracy():>12.1%} {ours.accuracy():>12.1%}")


def verdict(claims: dict[str, bool]) -> bool:
    say("\n>>> checks\n")
    for claim, is_true in claims.items():
        say(f"    {'yes' if is_true else 'NO ':<4} {claim}")
    return all(claims.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="run a shorter version")
    parser.add_argument("--plot", type=Path, default=PICTURE, metavar="PATH", help="where to save the plot")
    arguments = parser.parse_args()
    plan = SMOKE if arguments.smoke else WHOLE
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    try:
        # Turn strict mode off even if the environment turns it on: the demo is about the fallback.
        with (
            set_strict(False),
            tempfile.TemporaryDirectory(prefix="compile-retry-demo-", ignore_cleanup_errors=True) as folder,
        ):
            return 0 if tell(plan, Path(folder), arguments.plot.absolute()) else 1
    except KeyboardInterrupt:
        say("\n>>> interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
