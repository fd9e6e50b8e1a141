"""Train with a broken C++ compiler, and repair it during the run.

    python examples/demo.py            about a minute on two idle cores
    python examples/demo.py --smoke    a shorter version

A small convolutional network learns the handwritten digits that come with scikit-learn. Its train step is decorated
with `@compile_with_fallback`. When training starts, the C++ compiler is really broken: CXX names a script that fails
while a certain file exists. Some steps later that file is removed, without notifying the train step. The step runs
eagerly, retries when its policy says so, and runs compiled code after the first attempt that succeeds.

A second process then does the same training with a working compiler, and the two runs are compared. At the end, a plot
of the first run is saved; `--plot PATH` sets the path.

The exit status is 0 if all checks pass and 1 otherwise; speed does not affect it. On a machine without a C++ compiler
everything runs eagerly, and the demo says so. It needs a POSIX shell.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from sklearn.datasets import load_digits
from tenacity import wait_exponential
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from compile_retry import CompileState, CompileStats, RetryPolicy, compile_with_fallback, set_strict
from compile_retry.plotting import plot_timeline

BATCH = 128
CHANNELS = 16
TEST_IMAGES = 360
PICTURE = Path(__file__).parent.parent / "build" / "timeline.png"
WARM_UP = 3  # steps ignored when measuring a speed


# --- User code: a decorated train step and a policy. ------------------------------------------------------------------

# Retry after 10 calls, then after 20, 40 and so on. In calls, not seconds, so that every machine behaves the same.
POLICY = RetryPolicy(wait=None, wait_calls=wait_exponential(multiplier=10))


@compile_with_fallback(policy=POLICY)
def train_step(
    model: nn.Module, inputs: Tensor, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    outputs = model(inputs)
    return criterion(outputs, targets), outputs


# --- The network and its data. ----------------------------------------------------------------------------------------


class Snake(nn.Module):
    """The activation x + sin(ax)^2 / a (Ziyin, Hartwig and Ueda, 2020), with one a per channel.

    PyTorch has no kernel for it: eager runs it one operation at a time; a compiler fuses it into one loop.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.a * x).square() / (self.a + 1e-6)


def network() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, CHANNELS, kernel_size=3, padding=1)]
    for _ in range(2):
        layers += [
            nn.Conv2d(CHANNELS, CHANNELS, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
            Snake(CHANNELS),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))


class Digits:
    """1797 images of 8 by 8 pixels, with their digits."""

    def __init__(self) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        targets = torch.tensor(digits.target)
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


# --- A timed training run. --------------------------------------------------------------------------------------------

StepKind = Literal["eager", "compiled", "attempt"]


class Training:
    """A network, its optimizer, and the duration of each step."""

    def __init__(self, steps: int) -> None:
        torch.set_num_threads(1)  # on images this small more threads wait for each other, and timings vary
        torch.manual_seed(0)
        self.digits = Digits()
        self.batches = self.digits.batches()
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=steps)
        self.criterion = nn.CrossEntropyLoss()
        self.steps = steps
        self.took = 0.0  # total seconds
        self.seconds: dict[StepKind, list[float]] = {"eager": [], "compiled": [], "attempt": []}

    def run(self, name: str, before_step: Callable[[int], None] = lambda step: None) -> None:
        """Train with a progress bar. Log lines appear above it."""
        began = time.perf_counter()
        seldom = 0.1 if sys.stderr.isatty() else 10.0  # do not fill a file with progress bars
        with logging_redirect_tqdm(), tqdm(range(1, self.steps + 1), name, unit="step", mininterval=seldom) as bar:
            for step in bar:
                before_step(step)
                before = train_step.stats
                seconds, loss = self.step()
                kind = _kind_of_step(before, train_step.stats)
                self.seconds[kind].append(seconds)
                speed = "" if math.isnan(rate := _rate(self.seconds[kind])) else f" {rate:.0f} steps/s"
                bar.set_postfix_str(f"loss {loss:.3f}, {kind}{speed}", refresh=False)
        self.took = time.perf_counter() - began

    def step(self) -> tuple[float, float]:
        """Run forward, backward and the optimizer step. Returns the duration in seconds and the loss."""
        inputs, targets = next(self.batches)
        started = time.perf_counter()
        loss, _ = train_step(self.model, inputs, targets, self.criterion)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return time.perf_counter() - started, loss.item()

    def heat(self) -> float:
        """Time a few more steps. Returns steps per second."""
        return _rate([self.step()[0] for _ in range(WARM_UP + 15)])

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
        return max(
            int(value) for name, value in self.model.state_dict().items() if name.endswith("num_batches_tracked")
        )


def _kind_of_step(before: CompileStats, after: CompileStats) -> StepKind:
    if after.attempts > before.attempts:
        return "attempt"
    return "compiled" if after.compiled_calls > before.compiled_calls else "eager"


def _rate(seconds: list[float]) -> float:
    """Steps per second."""
    return 1 / statistics.median(seconds[WARM_UP:]) if len(seconds) > WARM_UP else math.nan


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
def environment(cache: Path, cxx: str | Path | None) -> Iterator[None]:
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


# --- The same training without failures, in a separate process with its own cache. ------------------------------------


@dataclass(frozen=True)
class Report:
    accuracy: float
    stats: CompileStats


@contextlib.contextmanager
def another_process(steps: int, cache: Path, cxx: str) -> Iterator[Connection]:
    """Start a process that trains and sends its report, then answers each message with `Training.heat()`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=never_fail, args=(steps, theirs))
    with environment(cache, cxx):
        process.start()
    theirs.close()  # so that we notice if the process ends
    try:
        yield ours
    finally:
        ours.close()  # ends the process, unless it is still training
        process.join(timeout=5)
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGINT)  # so that it stops the compilers it has started
            process.join(timeout=30)
        process.kill()


def never_fail(steps: int, connection: Connection) -> None:
    """Train in that process."""
    with contextlib.suppress(EOFError, KeyboardInterrupt), set_strict(True):
        training = Training(steps)
        training.run("never failed")
        connection.send(Report(training.accuracy(), train_step.stats))
        while True:
            connection.recv()
            connection.send(training.heat())


# --- The demo. --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    steps: int
    repair_at: int
    heats: int


WHOLE = Plan(steps=600, repair_at=100, heats=40)
SMOKE = Plan(steps=150, repair_at=5, heats=5)


class Heat(NamedTuple):
    """Steps per second of both processes, measured in direct succession."""

    never_failed: float
    recovered: float


def tell(plan: Plan, folder: Path, picture: Path) -> bool:
    """Run the demo. Returns True if all checks pass."""
    real = real_compiler()
    compiler = None if real is None else Compiler(real, folder)
    with environment(folder / "cache", compiler.path if compiler else None):
        training = train(plan, compiler)
        accuracy, stats = training.accuracy(), train_step.stats
        tell_books(training, stats, accuracy)
        claims = {
            "each step happened exactly once": training.batches_seen() == stats.calls == plan.steps,
            "attempts failed, and training continued eagerly": stats.failures > 0 and stats.eager_calls > 0,
        }
        if real is None:
            tell_nothing_compiled(stats)
            claims["nothing was compiled"] = stats.eager_calls == plan.steps
        else:
            report, heats = compare(plan, training, folder / "healthy-cache", real)
            tell_comparison(heats, accuracy, report.accuracy)
            recovered = train_step.state is CompileState.COMPILED and stats.recoveries == 1
            claims["it recovered without help, and has run compiled code since"] = recovered
            claims["the other run never failed"] = report.stats.compiled_calls == plan.steps
            claims["both reach the same test accuracy, within noise"] = within_noise(accuracy, report.accuracy)
    draw(picture, training.took)
    return verdict(claims)


def train(plan: Plan, compiler: Compiler | None) -> Training:
    """Run the training that starts with a broken compiler."""
    training = Training(plan.steps)

    def before_step(step: int) -> None:
        if compiler is not None and step == plan.repair_at:
            compiler.repair()
            say(f">>> step {step}: compiler repaired; train_step is not notified, next attempt {train_step.next_retry}")

    say(f">>> {plan.steps} steps, {'the C++ compiler is broken' if compiler else 'there is no C++ compiler'}")
    training.run("training", before_step)
    return training


def compare(plan: Plan, ours: Training, cache: Path, cxx: str) -> tuple[Report, list[Heat]]:
    """Repeat the training without failures. Then time more steps of both processes, in turns."""
    say("\n>>> the same training in another process, with a compiler that was never broken")
    with another_process(plan.steps, cache, cxx) as other:
        report: Report = other.recv()
        heats = []
        for _ in range(plan.heats):  # many and short, so that other load on the machine affects both alike
            other.send("go")
            heats.append(Heat(never_failed=other.recv(), recovered=ours.heat()))
    return report, heats


def draw(path: Path, seconds: float) -> None:
    """Save a plot of the training, without the heats after it, and one for dark pages."""
    # Imported after the heats, because importing it slows the same steps down by a fifth. Not pyplot, because there may
    # be no display.
    from matplotlib.figure import Figure
    from matplotlib.style import context

    path.parent.mkdir(parents=True, exist_ok=True)
    for style, place in (("default", path), ("dark_background", path.with_stem(f"{path.stem}-dark"))):
        with context(style):
            figure = Figure(figsize=(9, 3.8), layout="constrained")
            plot_timeline(train_step, figure.subplots()).set_xlim(right=1.03 * seconds)
            figure.savefig(place, dpi=110)
    say(f"\n>>> plot of the training: {path}, and beside it one for dark pages")


def within_noise(a: float, b: float) -> bool:
    """Return True if two shares of the test images differ by at most three standard errors."""
    p = (a + b) / 2
    return abs(a - b) <= 3 * math.sqrt(2 * p * (1 - p) / TEST_IMAGES)


# --- Output. ----------------------------------------------------------------------------------------------------------


def say(text: str = "") -> None:
    tqdm.write(text, file=sys.stdout)


def tell_books(training: Training, stats: CompileStats, accuracy: float) -> None:
    say("\n>>> statistics: train_step.stats\n")
    for name, value in stats.as_dict().items():
        say(f"    {name:<18} {value:>8}" if isinstance(value, int) else f"    {name:<18} {value:>8.2f}")
    say("\n>>> timings\n")
    for kind in ("eager", "compiled"):
        if seconds := training.seconds[kind]:
            say(f"    {len(seconds):>4} steps {kind}, {_rate(seconds):.1f} steps/s")
    attempts = training.seconds["attempt"]
    say(f"    {len(attempts):>4} steps that ran the compiler, {sum(attempts):.1f} s in total")
    say(f"\n    test accuracy {accuracy:.1%}")


def tell_nothing_compiled(stats: CompileStats) -> None:
    say("\n>>> This machine has no C++ compiler, so nothing was compiled and nothing could recover.")
    say(f">>> The whole training ran eagerly; {stats.failures} attempts failed. There is nothing to compare.")


def tell_comparison(heats: list[Heat], recovered: float, never_failed: float) -> None:
    say(f"\n>>> side by side: {len(heats)} heats of compiled steps\n")
    say(f"    {'':<16} {'recovered':>12} {'never failed':>12} {'ratio':>8}")
    for name, choose in (("median", statistics.median), ("fastest", max)):
        ours, theirs = choose(heat.recovered for heat in heats), choose(heat.never_failed for heat in heats)
        say(f"    {name + ' steps/s':<16} {ours:>12.1f} {theirs:>12.1f} {ours / theirs:>8.2f}")
    say(f"    {'test accuracy':<16} {recovered:>12.1%} {never_failed:>12.1%}")


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
    except EOFError:
        say("\n>>> the other process ended early: see above")
        return 1
    except KeyboardInterrupt:
        say("\n>>> interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
