"""What the design promises of attempts, hold-offs, states and books, as plain arithmetic on plain sets.

Written from the design and not from the source, so that tests/test_state_machine.py can hold one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from tenacity import stop_after_attempt, wait_exponential, wait_fixed

from compile_retry import CompileState, NextRetry, RetryPolicy

Outcome = Literal["code", "transient", "permanent"]
Stage = Literal["torch.compile", "trace", "backend"]

# The library looks at calls this coarsely, and for so many calls, before it believes that a failed graph is not needed.
WATCHED_CALLS = 64


@dataclass(frozen=True)
class Config:
    """What one call of the step differs in from another."""

    rows: int = 3
    grad: bool = True
    training: bool = True
    tag: str = "plain"

    def key(self, graph: str) -> Key:
        """Of these, what the graph's code depends on."""
        inner = graph in ("tanh", "sigmoid")
        return (graph, self.rows, self.grad) if inner else (graph, self.rows, self.grad, self.training, self.tag)

    def looks(self) -> tuple[object, ...]:
        """By which the library tells what a failed graph was needed for: here, all of it."""
        return self.rows, self.grad, self.training, self.tag


Key = tuple[object, ...]
CREATION: Key = ("torch.compile",)


@dataclass(frozen=True)
class Schedule:
    """A policy, and the same in arithmetic: from the number of a failed attempt to the wait after it."""

    policy: RetryPolicy
    seconds: Callable[[int], float] = lambda attempt: math.inf
    calls: Callable[[int], float] = lambda attempt: math.inf
    most: float = math.inf

    def with_clock(self, clock: Callable[[], float]) -> Schedule:
        return replace(self, policy=replace(self.policy, clock=clock))


def doubling(first: float, most: float = math.inf) -> Callable[[int], float]:
    return lambda attempt: min(first * 2 ** (attempt - 1), most)


SCHEDULES = {
    "every call": Schedule(RetryPolicy(wait=None, wait_calls=1), calls=lambda attempt: 1),
    "three calls": Schedule(RetryPolicy(wait=None, wait_calls=wait_fixed(3)), calls=lambda attempt: 3),
    "two, four, eight calls": Schedule(
        RetryPolicy(wait=None, wait_calls=wait_exponential(multiplier=2, max=8)), calls=doubling(2, 8)
    ),
    "ten seconds": Schedule(RetryPolicy(wait=10), seconds=lambda attempt: 10),
    "seconds, doubling": Schedule(RetryPolicy(wait=wait_exponential(multiplier=5, max=40)), seconds=doubling(5, 40)),
    "whichever comes first": Schedule(
        RetryPolicy(wait=10, wait_calls=5), seconds=lambda attempt: 10, calls=lambda attempt: 5
    ),
    "three attempts": Schedule(
        RetryPolicy(wait=None, wait_calls=2, stop=stop_after_attempt(3)), calls=lambda attempt: 2, most=3
    ),
}


@dataclass(frozen=True)
class Episode:
    """From a first failure to the recovery."""

    failures: int
    due_call: float
    due_time: float
    stopped: bool


@dataclass
class Call:
    """The call that is under way.

    Attributes:
        due: Whether nothing is held off, or an attempt is due.
        open: Whether it may attempt what is held off.
        before: What was held off before it, to come back to if a failure turns out to be the program's own error.
        failed: What has failed in it.
        doubts: What has failed inside Dynamo.
    """

    config: Config
    due: bool
    open: bool
    before: Episode | None
    failed: list[Key] = field(default_factory=list)
    doubts: list[Key] = field(default_factory=list)


class Model:
    """What one decorated function must have done so far, and what it may do next."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.episode: Episode | None = None
        self.calls = self.compiled = self.mixed = self.eager = 0
        self.attempts = self.failures = self.recoveries = 0
        self.unclear = 0  # calls that Dynamo leaves by an error it has seen coming: compiled or mixed
        self.created = self.has_code = False
        self.code: set[Key] = set()
        self.waiting: dict[Key, tuple[Stage, tuple[object, ...]]] = {}
        self.permanent: dict[Key, Stage] = {}
        self.progress = False
        self.clean_calls = 0
        self.call = Call(Config(), due=True, open=True, before=None)
        self.complaints: list[str] = []

    # What the function says of itself

    @property
    def state(self) -> CompileState:
        if self.episode is not None:
            return CompileState.GAVE_UP if self.episode.stopped else CompileState.FALLBACK
        if self.permanent:
            return CompileState.GAVE_UP
        return CompileState.COMPILED if self.has_code else CompileState.PENDING

    @property
    def next_retry(self) -> NextRetry | None:
        if self.episode is None or self.episode.stopped:
            return None
        calls = None if math.isinf(self.episode.due_call) else int(max(1, self.episode.due_call - self.calls))
        by_clock = self.episode.due_time != math.inf
        return NextRetry(calls, max(0.0, self.episode.due_time - self.now) if by_clock else None)

    @property
    def books(self) -> dict[str, int]:
        return {
            "calls": self.calls,
            "compiled_calls": self.compiled,
            "mixed_calls": self.mixed,
            "eager_calls": self.eager,
            "attempts": self.attempts,
            "failures": self.failures,
            "recoveries": self.recoveries,
        }

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is left to fall back."""
        return self.episode is None and not self.permanent

    @property
    def now(self) -> float:
        return self.schedule.policy.clock()

    # What happens to it

    def begin(self, config: Config, *, in_backward: bool = False) -> None:
        """A call begins. Under a backward pass nothing that is held off may be attempted."""
        self.calls += 1
        episode = self.episode
        due = episode is None or self.calls >= episode.due_call or self.now >= episode.due_time
        self.call = Call(config, due, open=due and not in_backward, before=episode)

    def attempt(self, graph: str, outcome: Outcome, stage: Stage) -> None:
        """The compiler runs, or Dynamo does and fails."""
        key = CREATION if stage == "torch.compile" else self.call.config.key(graph)
        self._complain_of(key)
        self.attempts += 1
        if outcome == "code":
            self._compiled(key)
            return
        self.failures += 1
        self.call.failed.append(key)
        if stage == "trace":
            self.call.doubts.append(key)
        if outcome == "permanent":
            self.waiting.pop(key, None)
            self.permanent[key] = stage
            return
        self.waiting[key] = stage, self.call.config.looks()
        self.progress, self.clean_calls = False, 0
        self._hold_off()

    def _complain_of(self, key: Key) -> None:
        call, held_off = self.call, self.episode is not None
        if held_off and not call.open:
            self.complaints.append(f"an attempt of {key} before it was due")
        if held_off and (key in call.failed or (call.failed and call.before is None)):
            self.complaints.append(f"an attempt of {key} after a failure in the same call")
        if key in self.code:
            self.complaints.append(f"an attempt of {key}, which was compiled")
        if key in self.permanent:
            self.complaints.append(f"an attempt of {key}, which was given up")

    def _compiled(self, key: Key) -> None:
        self.has_code = self.progress = True
        self.code.add(key)
        self.waiting.pop(key, None)

    def was_created(self) -> None:
        """``torch.compile`` itself has returned."""
        self.created = True
        if self.waiting.pop(CREATION, None):
            self.progress = True

    def _hold_off(self) -> None:
        failures = self.episode.failures + 1 if self.episode else 1
        stopped = failures >= self.schedule.most
        due_call = math.inf if stopped else self.calls + self.schedule.calls(failures)
        due_time = math.inf if stopped else self.now + self.schedule.seconds(failures)
        self.episode = Episode(failures, due_call, due_time, stopped)

    def end(self, graphs: Iterable[str], runs: list[str], *, raised: bool) -> None:
        """The call ends.

        Args:
            graphs: What eager would have run as graphs.
            runs: Those of which compiled code ran.
            raised: Whether the program raised.
        """
        expected = list(graphs)
        if raised and self.call.doubts:
            self._withdraw()
        if not runs:
            self.eager += 1
        elif raised and self.call.config.tag.startswith("raise"):
            self.unclear += 1
        elif runs == expected:
            self.compiled += 1
        else:
            self.mixed += 1
        self._complain_of_lost_code(expected, runs)
        if self.episode is not None and self.call.due and not self._failed_transiently():
            self._maybe_recovered(clean=runs == expected and not raised)

    def clear_up(self, compiled: int) -> None:
        """Take the function's word for the calls that are unclear."""
        more = min(max(compiled - self.compiled, 0), self.unclear)
        self.compiled += more
        self.mixed += self.unclear - more
        self.unclear = 0

    def _failed_transiently(self) -> bool:
        return any(key in self.waiting for key in self.call.failed)

    def _withdraw(self) -> None:
        """Eager raises as well: what failed inside Dynamo was the program's own error."""
        for key in self.call.doubts:
            self.failures -= 1
            self.attempts -= 1
            self.waiting.pop(key, None)
            self.permanent.pop(key, None)
            self.call.failed.remove(key)
        if not self.call.failed:
            self.episode = self.call.before

    def _complain_of_lost_code(self, expected: list[str], runs: list[str]) -> None:
        """Compiled code is lost if it does not run, though what leads to it was compiled too."""
        for graph in expected:
            if graph in runs:
                continue
            if self.call.config.key(graph) in self.code:
                self.complaints.append(f"{self.call.config.key(graph)} has lost its code")
            return

    def _maybe_recovered(self, *, clean: bool) -> None:
        if clean:
            self.clean_calls += 1
            if self.progress:
                looks = self.call.config.looks()
                self.waiting = {key: value for key, value in self.waiting.items() if value[1] != looks}
        if not self.waiting or self.clean_calls >= WATCHED_CALLS:
            self.waiting = {}
            self.episode = None
            self.recoveries += self.progress or clean

    # What users do to it

    def retry_now(self) -> None:
        self.permanent = {}
        if self.episode is not None:
            by_calls, by_clock = self.schedule.policy.wait_calls is not None, self.schedule.policy.wait is not None
            self.episode = replace(
                self.episode,
                due_call=0 if by_calls else math.inf,
                due_time=-math.inf if by_clock else math.inf,
                stopped=False,
            )

    def reset(self) -> None:
        self.permanent, self.waiting, self.episode = {}, {}, None

    def dynamo_reset(self) -> None:
        """All code is gone, and all that ran eagerly because a backend had failed on it."""
        self.code = set()
        self.permanent = {key: stage for key, stage in self.permanent.items() if stage != "backend"}
        self.waiting = {key: value for key, value in self.waiting.items() if value[0] != "backend"}
