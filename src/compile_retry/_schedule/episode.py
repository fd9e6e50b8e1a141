"""Records of the schedule: episodes, probes, unsettled failures, and the due moment as users see it."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

from .policy import RetryPolicy, pause

# Number of calls after a failure that still go through Dynamo even if nothing is compiled, to find out which other
# graphs are waiting. Later calls go straight to the eager function.
WATCHED_CALLS = 64

# Number of permanent failures in a row that `max_overhead` does not limit.
_FREE_REFUSALS = 8


@dataclass(frozen=True)
class NextRetry:
    """The due moment of the next attempt. If both limits are given, whichever comes first applies.

    Attributes:
        calls: Calls left, including the one that attempts; ``None`` if the policy does not count calls.
        seconds: Seconds left; ``None`` if the policy does not count seconds.
        at_least: Minimum number of seconds left, whatever ``calls`` says, because of the policy's ``max_overhead``.
        max_overhead: The policy's share, if it delays the attempt beyond the policy's wait; otherwise ``None``.
    """

    calls: int | None
    seconds: float | None
    at_least: float = 0.0
    max_overhead: float | None = None

    def __str__(self) -> str:
        delayed = "" if self.max_overhead is None else f" (delayed by max_overhead={self.max_overhead:g})"
        in_time = "" if self.seconds is None else f"in {_in_seconds(self.seconds)}"
        if self.calls is None or (self.seconds is not None and 0 < self.seconds <= self.at_least):
            return in_time + delayed
        in_calls = "in 1 call" if self.calls == 1 else f"in {self.calls} calls"
        if self.at_least:
            in_calls += f" and {_in_seconds(self.at_least)}{delayed}"
        return f"{in_calls} or {in_time}" if in_time else in_calls


def _in_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


class Episode(NamedTuple):
    """State from a first failure to the recovery. Replaced, never mutated, so it can be read without a lock."""

    failures: int
    started: float
    failed_at: float
    waited: float
    failed_in_call: int
    watched_until: int  # `failed_in_call + WATCHED_CALLS`; stored, because each held-off call reads it
    due_call: float
    due_time: float
    stopped: bool
    spent: float  # seconds, in failed attempts
    not_before: float = -math.inf  # even if the due call has come; set if `max_overhead` delays the attempt

    def is_due(self, call: int, clock: Callable[[], float]) -> bool:
        if call >= self.due_call and (self.not_before == -math.inf or clock() >= self.not_before):
            return True
        return self.due_time < math.inf and clock() >= self.due_time

    @property
    def is_asked_for(self) -> bool:
        """True if the user has made an attempt due now."""
        return self.due_time == -math.inf or self.due_call == 0

    def nothing_due_before(self, call: int) -> tuple[float, float]:
        """Return a call and a time before which nothing is due, for this call and later ones."""
        if call < self.due_call:
            return self.due_call, self.due_time
        return math.inf, min(self.due_time, self.not_before)

    def is_long_overdue(self, call: int, now: float) -> bool:
        """Return True if twice the wait has passed since the failure."""
        return call >= 2 * self.due_call - self.failed_in_call or now >= 2 * self.due_time - self.failed_at


class Refusals:
    """Limits permanent failures. The first few in a row are free.

    After a frame is given up, the functions that it calls are compiled on their own. Without a limit, a compiler that
    rejects everything would be run for one function after another, endlessly.
    """

    def __init__(self) -> None:
        self._in_a_row = 0
        self._since: float | None = None
        self._spent = self._last = 0.0

    def add(self, now: float, seconds: float) -> None:
        """Record a permanent failure and its duration in seconds."""
        if self._since is None:
            self._since = now
        self._in_a_row += 1
        self._spent, self._last = self._spent + seconds, seconds

    def end(self) -> None:
        """End the row of failures, because an attempt has succeeded."""
        self._in_a_row = 0

    @property
    def are_few(self) -> bool:
        """True for the first few in a row."""
        return self._in_a_row < _FREE_REFUSALS

    def affords_another(self, policy: RetryPolicy) -> bool:
        """Return True for the first few in a row, and later if another one stays within ``max_overhead``."""
        if self._since is None or self.are_few:
            return True
        return pause(policy, policy.clock() - self._since, self._spent, self._last) <= 0


class Probe:
    """One call's permission to attempt during an episode.

    Only the call holds a reference to it. So it disappears with the call's Python frame, even if an interrupt skipped
    the call's clean-up or the thread died. A forked child keeps the Python frames of threads that it does not have, so
    the probe records its process too.

    Attributes:
        episode: The episode in which it may attempt; None once one of its own attempts has failed.
        claims: The keys whose turn it is; empty if any key may be attempted.
        exclusive: Whether only these keys may be attempted.
    """

    def __init__(self, episode: Episode) -> None:
        self.process, self.thread = os.getpid(), threading.get_ident()
        self.episode: Episode | None = episode
        self.claims: frozenset[Hashable] = frozenset()
        self.exclusive = False


class Unsettled:
    """A failure in a call that is not over yet. No other attempt is made in the meantime."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_open(self) -> bool:
        """False in a forked child, which does not have the thread of this call."""
        return self._process == os.getpid()
