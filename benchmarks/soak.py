"""Soak tests: leaks after many held-off calls and failed attempts, and eight threads while faults come and go.

Prints the figures quoted in docs/reliability.md; test_g04_g10_g11_soak.py runs shorter versions of the same soaks.
Run it as `python benchmarks/soak.py [--seconds 60]`.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch._dynamo
from torch._dynamo.callback import callback_handler
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.optim import optimizer

from compile_retry import CompiledFunction, CompileState, CompileStats, RetryPolicy, compile_with_fallback
from compile_retry.events import AttemptFailed, Event
from compile_retry.testing import record_events

Regime = Literal["nothing compiled", "one shape held off"]
Position = Literal["first graph", "second graph", "inside Dynamo"]
POSITIONS: tuple[Position, ...] = ("first graph", "second graph", "inside Dynamo")
REGIMES: tuple[Regime, ...] = ("nothing compiled", "one shape held off")

HELD_OFF = RetryPolicy(wait=1e9)
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)

Function = Callable[[torch.Tensor], torch.Tensor]


def full_disk() -> OSError:
    return OSError(28, "No space left on device")


@dataclass(frozen=True)
class Usage:
    """The resources that the process holds: a count of each kind, and its memory in bytes."""

    files: int
    threads: int
    callbacks: int
    objects: int
    blocks: int
    rss: int

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        hooks = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks
        callbacks = callback_handler.start_callbacks, callback_handler.end_callbacks
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            files=len(list(Path("/proc/self/fd").iterdir())),
            threads=threading.active_count(),
            callbacks=sum(len(hook) for hook in hooks) + sum(len(callback) for callback in callbacks),
            objects=len(gc.get_objects()),
            blocks=sys.getallocatedblocks(),
            rss=pages * os.sysconf("SC_PAGESIZE"),
        )


@dataclass(frozen=True)
class Growth:
    """Return the growth over this many calls; objects, memory blocks and bytes are per call."""

    files: int
    threads: int
    callbacks: int
    objects: float
    blocks: float
    rss: float

    @classmethod
    def over(cls, calls: int, call: Callable[[], object], warm_up: int) -> Growth:
        for _ in range(warm_up):
            call()
        before = Usage.now()
        for _ in range(calls):
            call()
        after = Usage.now()
        return cls(
            after.files - before.files,
            after.threads - before.threads,
            after.callbacks - before.callbacks,
            (after.objects - before.objects) / calls,
            (after.blocks - before.blocks) / calls,
            (after.rss - before.rss) / calls,
        )


def held_off(regime: Regime, calls: int) -> Growth:
    """Call while nothing is due: the plain function, or a function compiled for another shape."""
    failing = torch.ones(3)
    working = torch.ones(4, 4)

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if regime == "nothing compiled" or inputs[0].shape == failing.shape:
            raise full_disk()
        return graph_module.forward

    fn = compile_with_fallback(lambda x: x.sin(), backend=backend, dynamic=False, policy=HELD_OFF)
    if regime == "one shape held off":
        fn(working)
    growth = Growth.over(calls, lambda: fn(failing), warm_up=1000)
    stats = fn.stats
    if (stats.attempts - stats.failures, stats.failures, fn.state) != (
        int(regime == "one shape held off"),
        1,
        CompileState.FALLBACK,
    ):
        raise RuntimeError(f"not held off: {fn!r}, {stats}")
    return growth


@contextmanager
def dynamo_calls(before_each_frame: Callable[[str], None]) -> Iterator[None]:
    """Make Dynamo call this with each frame's function name before it translates the frame. It may raise."""
    run = InstructionTranslator.run

    def run_or_fail(self: InstructionTranslator) -> None:
        before_each_frame(self.f_code.co_name)
        run(self)

    with patch.object(InstructionTranslator, "run", run_or_fail):
        yield


def two_graphs(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    torch._dynamo.graph_break()
    return y.cos()


def failed_attempts(position: Position, attempts: int, warm_up: int = 70) -> tuple[Growth, Growth]:
    """Make calls that each fail to compile something, with the library and with stock torch.compile."""
    failures = 0

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal failures
        if position == "first graph" or (position == "second graph" and "cos" in graph_module.code):
            failures += 1
            raise full_disk()
        return graph_module.forward

    def frame(name: str) -> None:
        nonlocal failures
        if position == "inside Dynamo" and name == two_graphs.__name__:
            failures += 1
            raise full_disk()

    def measure(fn: Function) -> Growth:
        nonlocal failures
        failures, x = 0, torch.ones(3)

        def call() -> None:
            with suppress(Exception):
                fn(x)

        with torch._dynamo.config.patch(accumulated_recompile_limit=10**9):  # otherwise stock torch stops compiling
            growth = Growth.over(attempts, call, warm_up)
        if failures != attempts + warm_up:
            raise RuntimeError(f"{failures} failures in {attempts + warm_up} calls of {fn}")
        torch._dynamo.reset()
        return growth

    with dynamo_calls(frame):
        stock = measure(torch.compile(two_graphs, backend=backend))
        ours = measure(compile_with_fallback(two_graphs, backend=backend, policy=EVERY_CALL))
    return ours, stock


@dataclass
class Soak:
    """The observations of eight threads. `early` lists failures before they were due, as (call, first call allowed)."""

    rounds: int = 0
    calls: int = 0
    booked: list[CompileStats] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    stuck: int = 0
    attempts: int = 0
    failures: int = 0
    most_at_once: int = 0
    early: list[tuple[int, int]] = field(default_factory=list)
    states: set[CompileState] = field(default_factory=set)

    def total(self, figure: str) -> int:
        """Sum one of the library's own counters."""
        return int(sum(stats.as_dict()[figure] for stats in self.booked))


class Faults:
    """A backend and a Dynamo hook that fail while their event is set, and their observations."""

    def __init__(self) -> None:
        self.backend_fails, self.dynamo_fails = threading.Event(), threading.Event()
        self.attempts = self.failures = self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.fn: CompiledFunction[..., Any] | None = None

    def come_and_go(self, rng: random.Random) -> None:
        for event in (self.backend_fails, self.dynamo_fails):
            event.set() if rng.random() < 0.4 else event.clear()

    def stop(self) -> None:
        self.backend_fails.clear()
        self.dynamo_fails.clear()

    def _fail(self) -> None:
        self.failures += 1
        raise full_disk()

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        assert self.fn is not None
        with self._lock:
            self._at_once += 1
            if self.fn.state is CompileState.FALLBACK:
                self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def backend(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with self._attempt():
            self.attempts += 1
            if self.backend_fails.is_set():
                self._fail()
            return graph_module.forward

    def frame(self, name: str) -> None:
        with self._attempt():
            if self.dynamo_fails.is_set():
                self.attempts += 1
                self._fail()


def eight_threads(seconds: float) -> Soak:
    """Run eight threads that call a function with four shapes while its backend and Dynamo fail now and then.

    A new function replaces it every two seconds, because faults cannot reach a compiled one.
    """
    soak, end = Soak(), time.monotonic() + seconds
    while time.monotonic() < end and not soak.stuck:
        _round(soak, random.Random(soak.rounds))
        soak.rounds += 1
    return soak


def _round(soak: Soak, rng: random.Random, wait_calls: int = 40) -> None:
    faults, done, calls = Faults(), threading.Event(), [0] * 8
    policy = RetryPolicy(wait=None, wait_calls=wait_calls)
    # Its own code object, because torch stops compiling one after 256 compiles, whatever wrappers it has.
    step = FunctionType(two_graphs.__code__.replace(), two_graphs.__globals__)
    fn = compile_with_fallback(step, backend=faults.backend, dynamic=False, policy=policy, name="soak")
    faults.fn = fn

    def work(thread: int) -> None:
        mine = random.Random(thread)
        try:
            while not done.is_set():
                x = torch.full((mine.choice([2, 3, 4, 5]),), mine.random())
                calls[thread] += 1
                torch.testing.assert_close(fn(x), x.sin().cos())
        except BaseException as exc:
            soak.wrong.append(repr(exc))

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(8)]
    with dynamo_calls(faults.frame), record_events("soak") as events:
        faults.come_and_go(rng)
        for thread in threads:
            thread.start()
        for _ in range(18):
            time.sleep(0.1)  # faults come and go over time, while the threads work
            faults.come_and_go(rng)
        faults.stop()
        done.set()
        for thread in threads:
            thread.join(60)
        for n in (2, 3, 4, 5) * wait_calls:
            calls[0] += 1
            fn(torch.ones(n))
    soak.calls += sum(calls)
    soak.booked.append(fn.stats)
    soak.stuck += sum(thread.is_alive() for thread in threads)
    soak.attempts += faults.attempts
    soak.failures += faults.failures
    soak.most_at_once = max(soak.most_at_once, faults.most_at_once)
    soak.early += _too_early(events, wait_calls)
    soak.states.add(fn.state)


def _too_early(events: list[Event], wait_calls: int) -> Iterator[tuple[int, int]]:
    due = 0
    for event in sorted(events, key=lambda event: event.time):
        if event.kind in {"recovered", "swept away"}:
            due = 0
        elif isinstance(event, AttemptFailed):
            if event.failure.call < due:
                yield event.failure.call, due
            due = event.failure.call + wait_calls


def _row(what: str, growth: Growth) -> str:
    return (
        f"{what:44} {growth.objects:9.3f} {growth.blocks:9.3f} {growth.rss:9.1f}"
        f" {growth.files:6} {growth.threads:8} {growth.callbacks:10}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of the soak with eight threads")
    parser.add_argument("--calls", type=int, default=1_000_000, help="held off")
    parser.add_argument("--attempts", type=int, default=2000, help="that fail")
    args = parser.parse_args()
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    logging.getLogger("compile_retry").setLevel(logging.CRITICAL)

    print(
        f"{'kept per call':44} {'objects':>9} {'blocks':>9} {'bytes':>9} {'files':>6} {'threads':>8} {'callbacks':>10}"
    )
    for regime in REGIMES:
        print(_row(f"held off, {regime} ({args.calls} calls)", held_off(regime, args.calls)))
    for position in POSITIONS:
        ours, stock = failed_attempts(position, args.attempts)
        print(_row(f"failed: {position} ({args.attempts} attempts)", ours))
        print(_row("    stock torch.compile", stock))

    soak = eight_threads(args.seconds)
    figures = "calls", "compiled_calls", "mixed_calls", "eager_calls", "attempts", "failures", "recoveries"
    print(f"\neight threads for {args.seconds:g} s, {soak.rounds} functions")
    print("booked: " + ", ".join(f"{soak.total(figure)} {figure}" for figure in figures))
    print(f"seen: {soak.calls} calls, {soak.attempts} attempts, {soak.failures} failures")
    print(f"wrong results {len(soak.wrong)}, stuck threads {soak.stuck}, attempts at once {soak.most_at_once}")
    print(f"failures before they were due {len(soak.early)}, states at the end {[s.value for s in soak.states]}")


if __name__ == "__main__":
    main()
