"""What the call path, the frame callback and the graph backend of one decorated function share.

Holds no reference to the function: Dynamo keeps every backend for the life of the process, and the backend holds this.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ._breaker import WATCHED_CALLS, Breaker, Episode
from ._events import Transition, TransitionKind, log, publish
from ._failures import CompileFailure, FailureKind, FailureStage, format_traceback, qualified_name, root_cause
from ._policy import RetryPolicy
from ._stats import Books, CompileState
from ._strict import is_strict

if TYPE_CHECKING:
    from types import CodeType

    from ._looks import Looks
    from ._torch_internals import CachedFrame

# Which frame it is that has no cache entry to be known by: its code and what its variables look like.
Fingerprint: TypeAlias = tuple[object, ...]
Location: TypeAlias = tuple[str, str, int]

# The call of torch.compile() itself, where it fails.
CREATION: Fingerprint = ("torch.compile",)


@dataclass
class Conversion:
    """One frame that Dynamo is compiling in this thread, and what came of its graph.

    Attributes:
        location: The frame's function, file and line.
        retrying: The cached fallback that the compiled code is to replace, if this is a retry.
        attempted: The compiler was run.
        fallback: The graph is going to run eagerly, and whether it is to be tried again.
        gave_way: The backend raised to have the frame run eagerly, this once.
        raised: The backend raised to have the failure reach the user (strict mode).
    """

    location: Location
    retrying: CachedFrame | None = None
    attempted: bool = False
    fallback: FailureKind | None = None
    gave_way: bool = False
    raised: bool = False


@dataclass(frozen=True)
class Attempt:
    """One run of the compiler.

    Attributes:
        function: Name of the decorated function.
        graph: Which graph of the call it is, from 1, counting all that have run before it.
    """

    function: str
    graph: int


@dataclass
class Doubt:
    """A failure inside Dynamo that may yet turn out to be the program's own error: the rest of the call will tell."""

    exc: BaseException
    failure: CompileFailure
    fallback: Fallback
    before: Episode | None
    during: Episode | None


class Tally:
    """What one thread's calls of the function have run, and what its current call may do.

    The two counts only grow; a call compares them before and after.
    """

    __slots__ = (
        "call",
        "compiled",
        "conversion",
        "doubts",
        "eager",
        "probing",
        "reserved",
        "retrying",
        "skipped",
        "fallen",
        "started",
        "unsettled",
    )

    def __init__(self) -> None:
        self.compiled = 0
        self.eager = 0
        self.call = 0
        self.started = 0  # both counts at the beginning of the call
        self.probing = False
        self.reserved = False
        self.retrying: CachedFrame | None = None
        self.conversion: Conversion | None = None
        # What is left to do when the call is over.
        self.unsettled = False
        self.doubts: list[Doubt] = []
        self.fallen: list[Fallback] = []
        self.skipped: list[tuple[CodeType, dict[object, object]]] = []


    @property
    def graphs_before(self) -> int:
        """How many graphs this call has run so far."""
        return self.compiled + self.eager - self.started


class PerThread(threading.local):
    """Where each thread finds its tally."""

    def __init__(self) -> None:
        self.tally = Tally()


@dataclass(eq=False)
class Fallback:
    """Something that runs eagerly.

    Attributes:
        fingerprint: The frame.
        entry: Dynamo's cache entry for it; None where Dynamo itself failed and made none.
        looks: What the call that it fell back in looked like; known when that call is over.
    """

    fingerprint: Fingerprint
    entry: CachedFrame | None = None
    looks: Looks | None = None

    @property
    def alive(self) -> bool:
        """Whether it still runs eagerly. The user's ``torch._dynamo.reset()`` sweeps cache entries away."""
        return self.entry is None or self.entry.alive


class Fallbacks:
    """What runs eagerly now: what waits for another attempt, and what does not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fallback] = []
        self._permanent: list[Fallback] = []

    def add(self, fallback: Fallback, kind: FailureKind) -> None:
        with self._lock:
            (self._waiting if kind == "transient" else self._permanent).append(fallback)

    def remove(self, entry: CachedFrame | None, fingerprint: Fingerprint | None = None) -> None:
        """Forget what this entry stands for, or what has this fingerprint and no entry: it is compiled now, or tried."""
        with self._lock:
            for fallbacks in (self._waiting, self._permanent):
                fallbacks[:] = [
                    f for f in fallbacks if f.entry is not entry or (entry is None and f.fingerprint != fingerprint)
                ]

    def give_up(self, entry: CachedFrame) -> None:
        """A retry has shown that this can never be compiled."""
        with self._lock:
            self._permanent += [f for f in self._waiting if f.entry is entry]
            self._waiting = [f for f in self._waiting if f.entry is not entry]

    def forget(self, *, waiting: bool = False, permanent: bool = False, looks: Looks | None = None) -> None:
        """Make Dynamo drop these (with `looks`, only what fell back in calls that looked so): their next call compiles."""
        with self._lock:
            dropped = [
                f
                for f in (self._waiting if waiting else []) + (self._permanent if permanent else [])
                if looks is None or f.looks == looks
            ]
            self._waiting = [f for f in self._waiting if f not in dropped]
            self._permanent = [f for f in self._permanent if f not in dropped]
        for fallback in dropped:
            if fallback.entry is not None:
                fallback.entry.drop()

    def any_waiting(self) -> bool:
        with self._lock:
            self._waiting = [f for f in self._waiting if f.alive]
            return bool(self._waiting)

    def any_permanent(self) -> bool:
        return any(f.alive for f in tuple(self._permanent))

    def waits(self, fingerprint: Fingerprint) -> bool:
        """Whether this frame is among those that failed and wait."""
        return any(f.fingerprint == fingerprint for f in tuple(self._waiting))

    def waits_without_entry(self, fingerprint: Fingerprint) -> bool:
        return any(f.entry is None and f.fingerprint == fingerprint for f in tuple(self._waiting))

    def is_hopeless(self, fingerprint: Fingerprint) -> bool:
        """Whether Dynamo cannot compile this frame and is not to be asked again."""
        return any(f.entry is None and f.fingerprint == fingerprint for f in tuple(self._permanent))

    def is_permanent(self, entry: CachedFrame) -> bool:
        return any(f.entry is entry for f in tuple(self._permanent))


class Control:
    """The state of one decorated function, without the function."""

    def __init__(self, name: str, location: Location, policy: RetryPolicy) -> None:
        self.name = name
        self.location = location
        self.policy = policy
        self.breaker = Breaker(policy)
        self.books = Books()
        self.fallbacks = Fallbacks()
        self.per_thread = PerThread()
        self.last_failure: CompileFailure | None = None
        self.has_code = False
        # Frames that Dynamo wants skipped for good, with the state it keeps for them.
        self.given_up: dict[CodeType, dict[object, object]] = {}
        # Since the last failure: whether something was compiled, and for how many calls everything that ran was.
        self._progress = False
        self._clean_calls = 0

    @property
    def state(self) -> CompileState:
        episode = self.breaker.episode
        if episode is not None:
            return CompileState.GAVE_UP if episode.stopped else CompileState.FALLBACK
        if self.fallbacks.any_permanent():
            return CompileState.GAVE_UP
        return CompileState.COMPILED if self.has_code else CompileState.PENDING

    def may_attempt(self, tally: Tally) -> bool:
        return self.breaker.episode is None or tally.probing

    def is_wanted(self, entry: CachedFrame) -> bool:
        """Asked by Dynamo when a cached fallback fits the call: use it? If not, the frame is compiled afresh."""
        tally = self.per_thread.tally
        if self.fallbacks.is_permanent(entry) or tally.reserved or not self.may_attempt(tally):
            return True
        tally.retrying = entry
        return False

    # Outcomes of attempts

    def succeeded(self, tally: Tally) -> None:
        """The compiler produced code."""
        self.books.attempts.add()
        self.made_progress()
        if not self.has_code:
            self.has_code = True
            self._publish("compiled", f"compiled in call {tally.call}", tally.call, logging.INFO)

    def made_progress(self) -> None:
        self._progress = True
        self.breaker.served()

    def failed(self, exc: BaseException, stage: FailureStage, location: Location, tally: Tally) -> CompileFailure:
        """An attempt failed: hold off as the policy says, and book it."""
        failure = self._judge(exc, stage, location, tally)
        self._book(failure)
        return failure

    def doubt(
        self, exc: BaseException, location: Location, fingerprints: tuple[Fingerprint, Fingerprint], tally: Tally
    ) -> CompileFailure:
        """Something failed inside Dynamo: hold off at once, but book it only when the call is over.

        Args:
            exc: What Dynamo raised.
            location: The frame's function, file and line.
            fingerprints: The frame's, with shapes (by which it waits) and without (by which it is given up).
            tally: Of this thread.
        """
        before = self.breaker.episode
        failure = self._judge(exc, "trace", location, tally)
        exact, coarse = fingerprints
        fallback = Fallback(exact if failure.kind == "transient" else coarse)
        self.fell_back(fallback, failure.kind, tally)
        tally.doubts.append(Doubt(exc, failure, fallback, before, self.breaker.episode))
        return failure

    def fell_back(self, fallback: Fallback, kind: FailureKind, tally: Tally) -> None:
        """Something runs eagerly from now on."""
        self.fallbacks.remove(fallback.entry, fallback.fingerprint)
        self.fallbacks.add(fallback, kind)
        tally.fallen.append(fallback)
        tally.unsettled = True

    def settle(self, tally: Tally, looks: Looks, *, program_raised: bool) -> None:
        """The call is over. If the program raised too, what failed inside Dynamo was the program's own error.

        Args:
            tally: Of this thread.
            looks: What the call looked like.
            program_raised: Whether it raised.
        """
        doubts, tally.doubts = tally.doubts, []
        skipped, tally.skipped = tally.skipped, []
        fallen, tally.fallen = tally.fallen, []
        tally.unsettled = False
        for fallback in fallen:
            fallback.looks = looks
        if program_raised:
            for doubt in reversed(doubts):
                self.fallbacks.remove(None, doubt.fallback.fingerprint)
                self.breaker.withdraw(doubt.during, doubt.before)
            return
        self.given_up.update(skipped)
        for doubt in doubts:
            self._book(doubt.failure)
        if doubts and is_strict():
            raise doubts[0].exc

    def probe_ended(self, tally: Tally, looks: Looks | None) -> None:
        """A call that was let through during an episode is over; it may have been the recovery.

        Args:
            tally: Of this thread.
            looks: What the call looked like if it ran compiled code only, otherwise None.
        """
        unharmed, tally.probing, tally.reserved = tally.probing, False, False
        self.breaker.probe_ended()
        if not unharmed:
            return
        if looks is not None and self._progress:
            # Something new runs compiled, in a call like the one in which something fell back: that is over then, though
            # it may never be asked for again. The first call of an optimizer, which makes its state, is not.
            self.fallbacks.forget(waiting=True, looks=looks)
            self._clean_calls += 1
        if self.fallbacks.any_waiting() and self._clean_calls < WATCHED_CALLS:
            return
        self.fallbacks.forget(waiting=True)
        episode, now = self.breaker.end(), self.policy.clock()
        if episode is not None and self._progress:
            self.books.recoveries.add()
            attempts = "1 failed attempt" if episode.failures == 1 else f"{episode.failures} failed attempts"
            message = f"recovered in call {tally.call}, after {attempts} and {now - episode.started:.3g} s; running compiled code"
            self._publish("recovered", message, tally.call, logging.WARNING)

    def recompile_limit(self, location: Location, tally: Tally) -> None:
        """Torch gave a frame up because it was compiled too often."""
        function, file, line = location
        message = (
            f"torch's recompile limit is reached in {function} ({file}:{line}); what its compiled code does not fit runs"
            " eagerly from now on"
        )
        self._publish("recompile limit", message, tally.call, logging.WARNING)

    # What users may do

    def retry_now(self) -> None:
        self.fallbacks.forget(permanent=True)
        self.breaker.retry_now()

    def reset(self) -> None:
        self.fallbacks.forget(waiting=True, permanent=True)
        self.breaker.end()
        self.last_failure = None

    # The record

    def _judge(self, exc: BaseException, stage: FailureStage, location: Location, tally: Tally) -> CompileFailure:
        root, attempt, retry = root_cause(exc), 1, True
        tally.probing = False
        self._progress, self._clean_calls = False, 0
        if not is_strict():
            try:
                attempt, retry = self.breaker.failed(root, tally.call)
            except Exception:
                log.exception("%s: the retry policy raised; no attempt will be made any more", self.name)
        return CompileFailure(
            kind="transient" if retry else "permanent",
            error_type=qualified_name(root),
            message=str(root),
            stage=stage,
            frame=location,
            attempt=attempt,
            call=tally.call,
            traceback=format_traceback(exc),
        )

    def _book(self, failure: CompileFailure) -> None:
        self.books.attempts.add()
        self.books.failures.add()
        self.last_failure = failure
        function, file, line = failure.frame
        where = f"{function} ({file}:{line})"
        episode, due = self.breaker.episode, self.breaker.next_retry(failure.call)
        kind: TransitionKind = "gave up"
        if is_strict():
            kind, message = "failed", f"{where} was not compiled: {failure}; strict mode raises"
        elif failure.kind == "permanent":
            message = f"{where} cannot be compiled: {failure}; it runs eagerly and will not be tried again"
        elif episode is not None and episode.stopped:
            message = (
                f"attempt {failure.attempt} failed in call {failure.call}: {failure}, compiling {where}; giving up,"
                " running eagerly until reset() or retry_now()"
            )
        else:
            kind, message = "failed", (
                f"attempt {failure.attempt} failed in call {failure.call}: {failure}, compiling {where}; running"
                f" eagerly, next attempt {due}"
            )
        level = logging.ERROR if kind == "gave up" else logging.WARNING
        self._publish(kind, message, failure.call, level, failure)

    def _publish(
        self, kind: TransitionKind, message: str, call: int, level: int, failure: CompileFailure | None = None
    ) -> None:
        due = self.breaker.next_retry(call) if kind == "failed" else None
        publish(Transition(kind, self.name, call, self.state, message, failure, due), level)
