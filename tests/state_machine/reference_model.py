"""A model of the promised attempts, hold-offs, states and statistics, in plain arithmetic on plain sets.

It is written from the design and not from the source, so that test_state_machine.py can compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from tenacity import stop_after_attempt, wait_exponential, wait_fixed

from compile_retry import CompileState, NextRetry, RetryPolicy

Outcome = Literal["code", "transient", "permanent"]
Stage = Literal["torch.compile", "trace", "backend"]
Key = tuple[object, ...]

CREATION: Key = ("torch.compile",)

# The rest of a function after a graph break, and the graph that must be compiled for this rest to be a frame. If a
# function runs as it is, its rest is not a separate frame, but the functions that it calls are.
REST_OF = {"cos": "sin", "sigmoid": "tanh"}

# After so many calls for each function, without eager frames except given-up ones, failed frames that were not called
# again are forgotten.
CLEAN_CALLS = 64

# A permanent failure gives up a frame for one key; after so many keys of a function, for all.
MOST_KEYS = 8

# This many permanent failures in a row cost nothing. After that, they must stay within the policy's `max_overhead`.
FREE_REFUSALS = 8


@dataclass(frozen=True)
class Config:
    """The properties in which calls of the step differ."""

    rows: int = 3
    grad: bool = True
    training: bool = True
    tag: str = "plain"

    def key(self, graph: str) -> Key:
        """Return the key of the frame that contains this graph: the properties that the frame can see."""
        inner = graph in ("tanh", "sigmoid")
        return (graph, self.rows, self.grad) if inner else (graph, self.rows, self.grad, self.training, self.tag)


def runs_of(graphs: Iterable[str], is_compiled: Callable[[str], bool]) -> list[str]:
    """Return the graphs that run compiled, in order, given which frames have compiled code."""
    runs: list[str] = []
    for graph in graphs:
        if is_compiled(graph) and REST_OF.get(graph) in (None, *runs):
            runs.append(graph)
    return runs


@dataclass(frozen=True)
class Schedule:
    """A policy, and its waits as functions of the number of failed attempts."""

    policy: RetryPolicy
    seconds: Callable[[int], float] = lambda attempt: math.inf
    calls: Callable[[int], float] = lambda attempt: math.inf
    most: float = math.inf

    def with_clock(self, clock: Callable[[], float]) -> Schedule:
        return replace(self, policy=replace(self.policy, clock=clock))

    def pause(self, elapsed: float, spent: float, last: float) -> float:
        """Return the seconds until one more failure, as long as the last, stays within `max_overhead`."""
        share = self.policy.max_overhead or math.inf
        return max(0.0, (spent + last) / share - last - elapsed)


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
    "two calls, a fifth of the time": Schedule(
        RetryPolicy(wait=None, wait_calls=2, max_overhead=0.2), calls=lambda attempt: 2
    ),
}


@dataclass(frozen=True)
class Episode:
    """The time from a first failure to the recovery."""

    failures: int
    began: float
    spent: float
    due_call: float
    due_time: float
    not_before: float  # even if enough calls have been made
    stopped: bool

    def is_due(self, call: int, now: float) -> bool:
        return (call >= self.due_call and now >= self.not_before) or now >= self.due_time


@dataclass(frozen=True)
class Refusals:
    """Permanent failures since the last success."""

    in_a_row: int = 0
    since: float = 0.0
    spent: float = 0.0
    last: float = 0.0

    def with_another(self, now: float, seconds: float) -> Refusals:
        since = self.since if self.spent or self.last or self.in_a_row else now
        return Refusals(self.in_a_row + 1, since, self.spent + seconds, seconds)


@dataclass(frozen=True)
class Failure:
    """A failed attempt, in doubt until the call is over."""

    key: Key
    outcome: Outcome
    time: float
    seconds: float


@dataclass(eq=False)
class Books:
    """What one function must have counted.

    Attributes:
        unclear: Calls that ended in an error that Dynamo had traced: compiled or mixed.
        created: Whether ``torch.compile`` has returned for it.
    """

    calls: int = 0
    compiled: int = 0
    mixed: int = 0
    eager: int = 0
    unclear: int = 0
    attempts: int = 0
    failures: int = 0
    recoveries: int = 0
    seconds: float = 0.0
    created: bool = False

    def clear_up(self, compiled: int) -> None:
        """Decide the unclear calls as the function has counted them."""
        more = min(max(compiled - self.compiled, 0), self.unclear)
        self.compiled += more
        self.mixed += self.unclear - more
        self.unclear = 0

    def as_dict(self) -> dict[str, float]:
        return {
            "calls": self.calls,
            "compiled_calls": self.compiled,
            "mixed_calls": self.mixed,
            "eager_calls": self.eager,
            "attempts": self.attempts,
            "failures": self.failures,
            "recoveries": self.recoveries,
            "compile_seconds": self.seconds,
            "partly_tuned": 0,
        }


@dataclass
class Call:
    """The current call.

    Attributes:
        books: The books of the function that is called.
        before: The episode when it began.
        due: Whether there was no episode, or an attempt was due.
        in_backward: Whether it is a recomputation.
        affords: Whether `max_overhead` allows an attempt that may fail permanently, like those before.
        failure: The failed attempt. There is at most one.
    """

    config: Config
    books: Books
    before: Episode | None = None
    due: bool = True
    in_backward: bool = False
    affords: bool = True
    failure: Failure | None = None


class Model:
    """What functions that share must have done together, and the attempts that they may make.

    Attributes:
        functions: The books of those that are alive.
        seen: How they have been called.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.episode: Episode | None = None
        self.refusals = Refusals()
        self.functions: list[Books] = []
        self.seen: dict[Config, None] = {}
        self.calls = 0
        self.has_backend = self.was_reset = self.has_code = False
        self.code: set[Key] = set()
        self.waiting: set[Key] = set()
        self.given_up: set[Key] = set()
        self.progress = False
        self.clean_calls = 0
        self.call = Call(Config(), Books())
        self.complaints: list[str] = []

    # State

    @property
    def state(self) -> CompileState:
        if self.episode is not None:
            return CompileState.GAVE_UP if self.episode.stopped else CompileState.FALLBACK
        if self.given_up:
            return CompileState.GAVE_UP
        return CompileState.COMPILED if self.has_code else CompileState.PENDING

    @property
    def next_retry(self) -> NextRetry | None:
        episode, now = self.episode, self.now
        if episode is None or episode.stopped:
            return None
        calls = None if math.isinf(episode.due_call) else int(max(1, episode.due_call - self.calls))
        seconds = None if episode.due_time == math.inf else max(0.0, episode.due_time - now)
        at_least = max(0.0, episode.not_before - now)
        return NextRetry(calls, seconds, at_least, self.schedule.policy.max_overhead if at_least else None)

    @property
    def takes_more(self) -> bool:
        """True if functions that are decorated now share with these."""
        return bool(self.functions) and not self.was_reset

    @property
    def now(self) -> float:
        return self.schedule.policy.clock()

    def is_given_up(self, key: Key) -> bool:
        keys = [known for known in self.given_up if known[0] == key[0]]
        return key in keys or len(keys) >= MOST_KEYS

    @property
    def waits_out_of_reach(self) -> bool:
        """True if the rest of a function waits, and its first part has been given up since then."""
        firsts = {key: (REST_OF[graph], *key[1:]) for key in self.waiting if (graph := str(key[0])) in REST_OF}
        return any(first not in self.code and self.is_given_up(first) for first in firsts.values())

    # Calls and attempts

    def begin(self, config: Config, books: Books, *, in_backward: bool = False) -> None:
        """Begin a call of the function with these books."""
        self.seen[config] = None
        self.calls += 1
        books.calls += 1
        due = self.episode is None or self.episode.is_due(self.calls, self.now)
        self.call = Call(config, books, self.episode, due, in_backward, self._affords_a_refusal())

    def _affords_a_refusal(self) -> bool:
        refusals = self.refusals
        if refusals.in_a_row < FREE_REFUSALS:
            return True
        return self.schedule.pause(self.now - refusals.since, refusals.spent, refusals.last) <= 0

    def attempt(self, graph: str, outcome: Outcome, stage: Stage, seconds: float) -> None:
        """Record that the compiler has run, or that Dynamo has failed."""
        key = CREATION if stage == "torch.compile" else self.call.config.key(graph)
        self._complain_of(key)
        if outcome != "code":
            self.call.failure = Failure(key, outcome, self.now, seconds)
            return
        self.call.books.attempts += 1
        self.call.books.seconds += seconds
        self.has_code = self.progress = True
        self.refusals = replace(self.refusals, in_a_row=0)
        self.code.add(key)
        self.waiting.discard(key)

    def _complain_of(self, key: Key) -> None:
        call = self.call
        if call.before is not None and not call.due:
            self.complaints.append(f"an attempt of {key} before it was due")
        if call.before is None and not call.affords and self.refusals.in_a_row >= FREE_REFUSALS:
            self.complaints.append(f"an attempt of {key} that cannot be afforded")
        if call.in_backward:
            self.complaints.append(f"an attempt of {key}, which the forward pass ran eagerly")
        if call.failure is not None:
            self.complaints.append(f"an attempt of {key} after a failure in the same call")
        if key in self.code:
            self.complaints.append(f"an attempt of {key}, which was compiled")
        if self.is_given_up(key):
            self.complaints.append(f"an attempt of {key}, which was given up")

    def was_created(self) -> None:
        """Record that ``torch.compile`` has returned."""
        self.call.books.created = self.has_backend = True
        if CREATION in self.waiting:
            self.waiting.discard(CREATION)
            self.progress = True
            self.refusals = replace(self.refusals, in_a_row=0)

    def end(self, graphs: Iterable[str], runs: list[str], *, raised: bool) -> None:
        """End a call.

        Args:
            graphs: The graphs that eager would have run.
            runs: The graphs whose compiled code ran.
            raised: Whether the program raised. Then a failed attempt was the program's own error.
        """
        expected, failure, books = list(graphs), self.call.failure, self.call.books
        compilable = runs_of(expected, self._can_be_compiled)
        if not runs:
            books.eager += 1
        elif raised and self.call.config.tag.startswith("raise"):
            books.unclear += 1
        elif runs == expected:
            books.compiled += 1
        else:
            books.mixed += 1
        self._complain_of_runs(expected, runs)
        if failure is not None and not raised:
            self._failed(failure)
            if failure.outcome == "transient":
                return
        if self.episode is not None and self.call.due:
            clean = runs == compilable and failure is None and not raised
            self._maybe_recovered(clean=clean, compiled=bool(runs))

    def _failed(self, failure: Failure) -> None:
        self.call.books.attempts += 1
        self.call.books.failures += 1
        self.call.books.seconds += failure.seconds
        if failure.outcome == "transient":
            self.waiting.add(failure.key)
            self.progress, self.clean_calls = False, 0
            self._hold_off(failure)
            return
        self.waiting.discard(failure.key)
        self.given_up.add(failure.key)
        self.refusals = self.refusals.with_another(failure.time, failure.seconds)
        if self.episode is not None:
            self.episode = replace(self.episode, spent=self.episode.spent + failure.seconds)

    def _hold_off(self, failure: Failure) -> None:
        last, now = self.episode, failure.time
        failures = last.failures + 1 if last else 1
        began = last.began if last else now
        spent = failure.seconds + (last.spent if last else 0)
        stopped = failures >= self.schedule.most
        due_call = math.inf if stopped else self.calls + self.schedule.calls(failures)
        pause = self.schedule.pause(now - began, spent, failure.seconds)
        wait = self.schedule.seconds(failures)
        due_time = math.inf if stopped else now + max(pause, wait)
        not_before = now + pause if due_call < math.inf or pause > wait else -math.inf
        self.episode = Episode(failures, began, spent, due_call, due_time, not_before, stopped)

    def _complain_of_runs(self, expected: list[str], runs: list[str]) -> None:
        """Complain of compiled code that did not run, and of code that was not compiled without a reason."""
        call, key = self.call, self.call.config.key
        for graph in runs_of(expected, lambda graph: key(graph) in self.code) if call.books.created else ():
            if graph not in runs:
                self.complaints.append(f"{key(graph)} has lost its code")
        if call.before is not None or not call.affords or call.in_backward or call.failure is not None:
            return
        wanted = runs_of(expected, self._can_be_compiled) if call.books.created else []
        if runs != wanted:
            self.complaints.append(f"{runs} ran compiled, although {wanted} could have")

    def _can_be_compiled(self, graph: str) -> bool:
        key = self.call.config.key(graph)
        return key in self.code or not self.is_given_up(key)

    def _maybe_recovered(self, *, clean: bool, compiled: bool) -> None:
        self.clean_calls += clean
        if not self.waiting or self.clean_calls >= CLEAN_CALLS * len(self.functions):
            self.waiting = set()
            self.episode = None
            self.call.books.recoveries += self.progress or (clean and compiled)

    # Users' requests

    def retry_now(self) -> None:
        self.given_up = set()
        self.refusals = replace(self.refusals, in_a_row=0)
        if self.episode is not None:
            by_calls, by_clock = self.schedule.policy.wait_calls is not None, self.schedule.policy.wait is not None
            self.episode = replace(
                self.episode,
                due_call=0 if by_calls else math.inf,
                due_time=-math.inf if by_clock else math.inf,
                not_before=-math.inf,
                stopped=False,
            )

    def reset(self) -> None:
        self.given_up, self.waiting, self.episode, self.refusals = set(), set(), None, Refusals()

    def dynamo_reset(self) -> None:
        """Drop all code. Failures are not forgotten, and functions that are decorated later do not share."""
        self.code, self.was_reset = set(), self.was_reset or self.has_backend
