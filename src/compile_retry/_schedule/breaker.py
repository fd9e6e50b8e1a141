"""May an attempt be made now? Knows the policy and the clock; knows nothing of torch, graphs or functions.

While nothing has failed there is no episode and every call may attempt. From a first failure on there is an episode:
calls are held off until the next attempt is due; then one call at a time is let through as the *probe*. The probe may
attempt until an attempt of its own fails, which holds everybody off again.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

from compile_retry._locks import Lock

from .policy import RetryPolicy, decide, pause

# For so many calls after a failure the function goes on through Dynamo even if nothing is compiled, so that it is seen
# whether other graphs are waiting too. After that, calls go straight to the eager function.
WATCHED_CALLS = 64

# So many failures in a row that are not worth another attempt are free.
_FREE_REFUSALS = 8


@dataclass(frozen=True)
class NextRetry:
    """When the next attempt is due; whichever comes first, where both are given.

    Attributes:
        calls: Calls of the function left until and including the next attempt, or ``None`` if calls do not count.
        seconds: Seconds left, or ``None`` if seconds do not count.
        at_least: Seconds left that have to pass even if the calls are over, because of the policy's ``max_overhead``.
    """

    calls: int | None
    seconds: float | None
    at_least: float = 0.0

    def __str__(self) -> str:
        parts = []
        if self.calls is not None:
            parts.append("in 1 call" if self.calls == 1 else f"in {self.calls} calls")
        if self.seconds is not None:
            parts.append(f"in {_in_seconds(self.seconds)}")
        if self.calls is not None and self.at_least:
            parts[0] += f" and {_in_seconds(self.at_least)}"
        return " or ".join(parts)


def _in_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


class Episode(NamedTuple):
    """From a first failure to the recovery. Replaced as a whole, never changed, so it can be read without a lock."""

    failures: int
    started: float
    failed_at: float
    waited: float
    failed_in_call: int
    watched_until: int  # `failed_in_call + WATCHED_CALLS`; not computed where it is asked, in each call held off
    due_call: float
    due_time: float
    stopped: bool
    spent: float  # seconds, in failed attempts
    not_before: float = -math.inf  # even if the calls are over

    def is_due(self, call: int, clock: Callable[[], float]) -> bool:
        if call >= self.due_call and (self.not_before == -math.inf or clock() >= self.not_before):
            return True
        return self.due_time < math.inf and clock() >= self.due_time

    def nothing_due_before(self, call: int) -> tuple[float, float]:
        """Before which call nothing becomes due, and before which time, for this call and those after it."""
        if call < self.due_call:
            return self.due_call, self.due_time
        return math.inf, min(self.due_time, self.not_before)

    def is_long_overdue(self, call: int, now: float) -> bool:
        """Whether as long a wait again has passed since the attempt was due."""
        return call >= 2 * self.due_call - self.failed_in_call or now >= 2 * self.due_time - self.failed_at


class Refusals:
    """The account of failures that are not worth another attempt. They hold nothing off as long as they are few.

    Where a frame is given up, what it calls is compiled on its own: a compiler that refuses everything would otherwise
    be asked for one function after another, without an end.
    """

    def __init__(self) -> None:
        self._in_a_row = 0
        self._since: float | None = None
        self._spent = self._last = 0.0

    def add(self, now: float, seconds: float) -> None:
        """Note one that took so long."""
        if self._since is None:
            self._since = now
        self._in_a_row += 1
        self._spent, self._last = self._spent + seconds, seconds

    def end(self) -> None:
        """An attempt has succeeded."""
        self._in_a_row = 0

    def affords_another(self, policy: RetryPolicy) -> bool:
        """Allow the first few in a row, and later ones as long as all of them keep to their share of the time."""
        if self._since is None or self._in_a_row < _FREE_REFUSALS:
            return True
        return pause(policy, policy.clock() - self._since, self._spent, self._last) <= 0


class Probe:
    """One call's leave to attempt during an episode.

    The call holds it, and nobody else, so that it is gone with the call's frame, even where an interrupt has kept the
    call from saying that it is over, or its thread has died. In a forked child the frames of threads that are not there
    stay, so it knows its process too.

    Attributes:
        episode: The episode in which it may attempt; None once an attempt of its own has failed.
        claims: Keys whose turn it is; empty if anybody may attempt.
        exclusive: Nobody else may attempt.
    """

    def __init__(self, episode: Episode) -> None:
        self.process, self.thread = os.getpid(), threading.get_ident()
        self.episode: Episode | None = episode
        self.claims: frozenset[Hashable] = frozenset()
        self.exclusive = False


class Unsettled:
    """A failure in a call that is not over yet. Nothing is attempted in the meantime."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_open(self) -> bool:
        """False in a forked child: it does not have the thread whose call this is."""
        return self._process == os.getpid()


class Breaker:
    """Decides which calls may attempt. One per decorated function, shared by its threads.

    Attributes:
        episode: The one that has begun and not ended.
        held_off_before_call: Calls before this one need not ask, they may not attempt, as long as the clock is
        held_off_before_time: earlier than this.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self._lock = Lock()
        self.probe: weakref.ref[Probe] | None = None
        self._unsettled: weakref.ref[Unsettled] | None = None
        self.refusals = Refusals()
        self.episode: Episode | None = None
        self.have_calls_ask()

    def _begin(self, episode: Episode | None) -> None:
        self.episode = episode
        self.have_calls_ask()

    def hold_off(self, before_call: float, before_time: float) -> None:
        """Let no call attempt before this one, nor any before this time, and none ask whether it may."""
        self.held_off_before_call, self.held_off_before_time = before_call, before_time

    def have_calls_ask(self) -> None:
        """Let each call ask."""
        self.held_off_before_call, self.held_off_before_time = 0.0, -math.inf

    def let_through(self, call: int) -> Probe | None:
        """What makes this call, made during an episode, the probe; None if it may not be. `probe_ended` must follow.

        A call within a probe of the same thread must not ask. So if the thread that asks has a probe, an interrupt has
        kept that from ending; and if another process has it, this one was forked from that.

        Args:
            call: The call's number.
        """
        episode, last = self.episode, self.probe
        if episode is None or not episode.is_due(call, self.policy.clock):
            return None
        probe, running = Probe(episode), last() if last is not None else None
        if running is not None and running.process == probe.process and running.thread != probe.thread:
            return None
        with self._lock:
            if self.probe is not last or self.episode is not episode:
                return None
            self.probe = weakref.ref(probe)
            return probe

    def probe_ended(self) -> None:
        """Let others through."""
        self.probe = None

    def is_long_overdue(self, call: int) -> bool:
        """Whether whoever had a claim to the due moment has let it pass."""
        episode = self.episode
        return episode is None or episode.is_long_overdue(call, self.policy.clock())

    @property
    def is_in_doubt(self) -> bool:
        """True while a call is under way in which an attempt has failed."""
        failure = self._unsettled() if self._unsettled is not None else None
        return failure is not None and failure.is_open

    def doubt(self, failure: Unsettled) -> None:
        """Let nothing be attempted until this is settled, or nobody holds it any more."""
        self._unsettled = weakref.ref(failure)

    def settle(self, failure: Unsettled) -> None:
        """End that, unless another one has begun."""
        if self._unsettled is not None and self._unsettled() is failure:  # pragma: no branch  # after another's fork
            self._unsettled = None

    def refused(self, now: float, seconds: float) -> None:
        """An attempt failed that is not worth another one: the time counts, but nothing is held off."""
        self.refusals.add(now, seconds)
        with self._lock:
            if self.episode is not None:
                self._begin(self.episode._replace(spent=self.episode.spent + seconds))

    def affords_another_refusal(self) -> bool:
        """Allow an attempt that may be refused like those before it."""
        return self.refusals.affords_another(self.policy)

    def failed(self, exc: BaseException, call: int, began: float, cost: float) -> tuple[int, bool]:
        """An attempt failed: hold off as the policy says, or not at all if this failure is not worth a retry.

        Args:
            exc: The root cause.
            call: The call in which it failed.
            began: The clock when it began.
            cost: Seconds it took.

        Returns:
            The attempt's number within the episode, and whether this failure is worth another attempt.

        Raises:
            Exception: Whatever the policy's strategies raise. The episode is then stopped.
        """
        while True:
            last, now = self.episode, began + cost
            attempt = last.failures + 1 if last else 1
            started = last.started if last else now
            waited = last.waited + now - last.failed_at if last else 0.0
            spent = last.spent + cost if last else cost
            watched_until = call + WATCHED_CALLS
            episode = Episode(
                attempt, started, now, waited, call, watched_until, math.inf, math.inf, stopped=True, spent=spent
            )
            try:  # without the lock: these are the user's strategies
                decision = decide(
                    self.policy, exc, attempt=attempt, started=started, now=now, waited=waited, spent=spent, cost=cost
                )
            except Exception:
                self._begin(episode)
                raise
            if decision.retry and not decision.stop:
                due_call, due_time = call + decision.calls, now + decision.seconds
                not_before = now + decision.at_least if decision.at_least and decision.calls < math.inf else -math.inf
                episode = episode._replace(due_call=due_call, due_time=due_time, not_before=not_before, stopped=False)
            with self._lock:
                if self.episode is last:  # otherwise something else has happened meanwhile
                    if decision.retry:
                        self._begin(episode)
                    return attempt, decision.retry

    def end(self, only: Episode | None = None) -> Episode | None:
        """End the episode; returns the one that ended. With `only`, not another one that has begun since."""
        with self._lock:
            if only is not None and self.episode is not only:
                return None
            ended = self.episode
            self._begin(None)
            return ended

    def reset(self) -> None:
        """Forget all failures."""
        self.refusals = Refusals()
        self.end()

    def retry_now(self) -> None:
        """Make an attempt due at once, also after giving up."""
        self.refusals.end()
        with self._lock:
            if self.episode is not None:
                due_call = math.inf if self.policy.wait_calls is None else 0
                due_time = math.inf if self.policy.wait is None else -math.inf
                episode = self.episode._replace(
                    due_call=due_call, due_time=due_time, not_before=-math.inf, stopped=False
                )
                self._begin(episode)

    def next_retry(self, calls: int) -> NextRetry | None:
        """How far away the next attempt is after `calls` calls; None if nothing is held off or no retry will come."""
        episode = self.episode
        if episode is None or episode.stopped:
            return None
        left = None if math.isinf(episode.due_call) else max(1, int(episode.due_call) - calls)
        now = self.policy.clock()
        seconds = None if episode.due_time == math.inf else max(0.0, episode.due_time - now)
        return NextRetry(left, seconds, max(0.0, episode.not_before - now))
