"""Runs one cell of the matrix in this process: one fault, at one position, under one policy.

    python -m faults.worker PLACE FAULT POSITION POLICY

Prints a line of JSON for the parent (`cells.py`), which has created the place and set the environment. Nothing here may
import torch._dynamo before the decorated function does.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tenacity
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.events import AttemptFailed, Event
from compile_retry.testing import FakeClock, record_events

from .faults import BY_NAME, Fault, Place

CALLS_DURING = 2
CALLS_UNTIL_RECOVERED = 16
# Torch sets these by itself: the first only if it was not set, the second always.
SET_BY_TORCH = {"TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}

CLOCK = FakeClock()
POLICIES = {
    "every call": lambda: RetryPolicy(wait=None, wait_calls=1),
    "doubling calls": lambda: RetryPolicy(wait=None, wait_calls=tenacity.wait_exponential(max=4)),
    "seconds": lambda: RetryPolicy(wait=tenacity.wait_exponential(multiplier=10, max=40), clock=CLOCK),
    "seconds or calls": lambda: RetryPolicy(wait=25, wait_calls=2, clock=CLOCK),
}
SECONDS_PER_CALL = 10


class Net(torch.nn.Module):
    """A network whose state shows every effect of a step: weights, a running mean, a count."""

    mean: torch.Tensor
    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scale = torch.nn.Parameter(torch.randn(16, generator=generator))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.01)


def loss_of(net: Net, x: torch.Tensor, seen: list[int]) -> torch.Tensor:
    """Run a step with one graph."""
    seen.append(x.shape[0])
    h = (x * net.scale).sin()
    net.mean.lerp_(h.detach().mean(0), 0.1)
    net.steps.add_(1)
    return (h * h).sum()


def loss_in_two(net: Net, x: torch.Tensor, seen: list[int], at_break: Callable[[], None]) -> torch.Tensor:
    """Run a step with two graphs: Dynamo does not trace into `at_break`."""
    loss = loss_of(net, x, seen)
    at_break()
    seen.append(-1)
    return (loss * net.scale.exp()).mean()


def nothing() -> None:
    pass


class AtTheBackward:
    """An Inductor pass that changes nothing, and begins the fault when its input is the second graph, the backward."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin, self._graphs = begin, 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self._graphs += 1
        if self._graphs == 2:
            self._begin()

    def uuid(self) -> str:
        return "changes nothing"


class Run:
    """The decorated step and its eager twin, called side by side."""

    def __init__(self, fault: Fault, place: Place, position: str, policy: RetryPolicy) -> None:
        self.fault, self.place, self.position = fault, place, position
        self.calls = 0
        self.began = False
        self.net, self.twin = Net(), Net()
        self.eager = loss_in_two if position == "second graph" else loss_of
        self.step: Any = compile_with_fallback(self.eager, name="step", dynamic=False, policy=policy)
        self.at_break: Callable[[], None] = nothing
        if position == "second graph":
            self.at_break = torch.compiler.disable(self.begin)

    def begin(self) -> None:
        if not self.began:
            self.began = True
            self.fault.begin(self.place)

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        now = {which: resource.getrlimit(which) for which in self.place.limits}
        self._limit(self.place.limits)
        try:
            yield
        finally:
            self._limit(now)

    @staticmethod
    def _limit(limits: dict[int, tuple[int, int]]) -> None:
        for which, values in limits.items():
            resource.setrlimit(which, values)

    def call(self, rows: int) -> None:
        x = torch.linspace(-2, 2, rows * 16).reshape(rows, 16)
        results = []
        for net, step, at_break in ((self.net, self.step, self.at_break), (self.twin, self.eager, nothing)):
            seen: list[int] = []
            loss = step(net, x, seen, *([at_break] if self.position == "second graph" else []))
            assert seen == ([rows, -1] if self.position == "second graph" else [rows])
            net.optimizer.zero_grad()
            loss.backward()
            net.optimizer.step()
            results.append(loss.detach())
        self.calls += 1
        CLOCK.advance(SECONDS_PER_CALL)
        with self.unlimited():  # comparing takes memory, and may import something
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(self.net.scale.grad, self.twin.scale.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(dict(self.net.state_dict()), dict(self.twin.state_dict()), rtol=1e-4, atol=1e-5)
        stats = self.step.stats
        assert stats.calls == self.calls == stats.compiled_calls + stats.mixed_calls + stats.eager_calls
        assert stats.attempts >= stats.failures


def train(run: Run) -> dict[str, Any]:
    fault, step, rows = run.fault, run.step, 32
    if run.position == "first call":
        run.begin()
    elif run.position == "recompile":
        run.call(rows)
        assert step.state is CompileState.COMPILED, "not healthy before the fault"
        run.begin()
        rows = 48
    elif run.position == "backward":
        import torch._inductor.config

        torch._inductor.config.post_grad_custom_post_pass = AtTheBackward(run.begin)
    for _ in range(CALLS_DURING):
        run.call(rows)
    assert run.began, "the fault never began"
    during, failed = step.state, step.stats.failures
    if fault.end is not None:
        fault.end(run.place)
    needed = 0
    while step.state is not CompileState.COMPILED and needed < CALLS_UNTIL_RECOVERED:
        run.call(rows)
        needed += 1
    before = step.stats
    for _ in range(2):
        run.call(rows)
    assert step.state is CompileState.COMPILED, f"{step.state} {needed} calls after the fault: {step.last_failure}"
    assert step.stats.compiled_calls == before.compiled_calls + 2, f"the last calls ran eagerly: {step.stats}"
    assert step.stats.attempts == before.attempts, "compiled more after the recovery"
    assert step.stats.recoveries == (1 if failed else 0) or needed, f"recoveries: {step.stats}"
    if failed:
        outcome = "worked around" if during is CompileState.COMPILED or fault.end is None else "recovered"
    else:
        assert fault.may_miss, "the fault did not hit"
        outcome = "unaffected"
    return {"outcome": outcome, "calls_needed": needed}


def instruction_sets() -> list[str]:
    from torch._inductor import cpu_vec_isa

    return [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()]


def outermost(traceback: str) -> str:
    """Return the class of the exception that reached the library, including torch's wrappers around the cause."""
    names: list[str] = re.findall(r"^[\w.]*?(\w+(?:Error|Exception|Failed|Compiler|Pool))\b", traceback, re.MULTILINE)
    return names[-1] if names else ""


def causes_in(events: list[Event]) -> list[dict[str, str]]:
    causes: list[dict[str, str]] = []
    for event in events:
        if isinstance(event, AttemptFailed):
            failure = event.failure
            cause = {
                "type": failure.error_type.removeprefix("builtins."),
                "says": str(failure)[:160],
                "raised": outermost(failure.traceback),
                "kind": failure.kind,
                "stage": failure.stage,
            }
            if cause not in causes:
                causes.append(cause)
    return causes


def run_cell(place: Place, name: str, position: str, policy: str, healthy: list[str]) -> dict[str, Any]:
    fault = BY_NAME[name]
    if fault.script:
        place.script.install()
    before = dict(os.environ)
    run = Run(fault, place, position, POLICIES[policy]())
    with record_events() as events:
        try:
            answer = train(run)
            now = {key: value for key, value in os.environ.items() if key not in SET_BY_TORCH or key in before}
            assert now == before, f"environment: {set(now.items()) ^ set(before.items())}"
            assert instruction_sets() == healthy, f"instruction sets: {instruction_sets()}, healthy: {healthy}"
        except Exception as exc:
            if run.began and fault.end is not None:
                for which, limits in place.limits.items():
                    resource.setrlimit(which, limits)
            logging.getLogger("faults").exception("failed")
            answer = {"outcome": "error", "error": f"{type(exc).__name__}: {exc}"[:1500]}
    stats = run.step.stats
    return {
        **answer,
        "calls": run.calls,
        "attempts": stats.attempts,
        "failures": stats.failures,
        "recoveries": stats.recoveries,
        "causes": causes_in(events),
        "moved": [t.message for t in events if t.kind == "cache moved"],
        "invocations": place.script.invocations() if fault.script else None,
    }


def populate() -> dict[str, Any]:
    """Compile the cells' functions into the same cache, without a fault."""
    step = torch.compile(loss_of, dynamic=False)
    for rows in (32, 48):
        net = Net()
        step(net, torch.linspace(-2, 2, rows * 16).reshape(rows, 16), []).backward()
    return {"outcome": "populated"}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING)
    what, *rest = sys.argv[1:]
    if what == "populate":
        answer = populate()
    elif what == "instruction sets":
        answer = {"outcome": "asked", "instruction_sets": instruction_sets()}
    else:
        place, name, position, policy, healthy = rest
        answer = run_cell(Place(Path(place)), name, position, policy, json.loads(healthy))
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
