"""The breaker of a function whose ranks agree: the group's first rank decides when to attempt.

Only the first rank evaluates the policy's waits, with its own clock. It announces the call of the next attempt. For a
wait in seconds it cannot know that call, so it announces the call in which it will look at its clock again, as it
estimates from its rate of calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from compile_retry._schedule.breaker import Breaker
from compile_retry._schedule.budget import Unshared
from compile_retry._schedule.episode import Episode, NextRetry, Probe
from compile_retry._schedule.policy import Decision, RetryPolicy

from .agreement import Agreement, Due


class _Schedule(NamedTuple):
    """The first rank's own schedule, by its clock."""

    failed_in_call: int
    failed_at: float
    due_call: float
    due_time: float
    not_before: float

    def is_due(self, call: int, now: float) -> bool:
        return (call >= self.due_call and now >= self.not_before) or now >= self.due_time

    def next_look(self, call: int, now: float) -> tuple[int, bool]:
        """Return the next call to consider, and whether it is certain that an attempt is due then."""
        looks: list[tuple[int, bool]] = []
        if self.due_time < math.inf:
            looks.append((self._estimate(call, now, self.due_time), False))
        if self.due_call < math.inf:
            due_call = math.ceil(self.due_call)
            if self.not_before == -math.inf:
                looks.append((due_call, True))
            else:
                looks.append((max(due_call, self._estimate(call, now, self.not_before)), False))
        return min(looks, key=lambda look: (look[0], not look[1]))

    def _estimate(self, call: int, now: float, time: float) -> int:
        """Estimate the call at a time. The number of calls since the failure at most doubles, so errors stay small."""
        calls, seconds = call - self.failed_in_call, now - self.failed_at
        if calls < 1 or seconds <= 0:
            return call + 1
        return call + max(1, min(calls, math.ceil((time - now) * calls / seconds)))

    def seconds_left(self, now: float) -> float | None:
        time = self.due_time if self.due_time < math.inf else self.not_before
        return max(0.0, time - now) if math.isfinite(time) else None


class GroupBreaker(Breaker):
    """Decides which calls may attempt, alike on all ranks: by the number of the call only.

    Args:
        policy: The policy.
        agreement: Returns the agreement with the other ranks; None if there are no others.

    Attributes:
        on_disagreement: Called with the number of the call if the ranks cannot agree any more.
    """

    def __init__(self, policy: RetryPolicy, agreement: Callable[[], Agreement | None]) -> None:
        super().__init__(policy, budget=Unshared(policy.clock))
        self._agreement = agreement
        self._schedule: _Schedule | None = None  # on the first rank
        self._due: Due | None = None
        self._due_time = math.inf  # about when the next attempt is due, by this rank's clock
        self.on_disagreement: Callable[[int], object] = lambda call: None

    def affords_another_refusal(self) -> bool:
        """Return True for the first few. Later on, the time would decide, which differs between ranks."""
        return self.refusals.are_few if self._agreement() is not None else super().affords_another_refusal()

    def _decide(self, exc: BaseException, call: int, *, retry: bool | None, now: float, **when: Any) -> Decision:
        agreement = self._agreement()
        if agreement is None or agreement.over is not None or retry is False:
            return super()._decide(exc, call, retry=retry, now=now, **when)
        if not agreement.leads:
            return self._decision(agreement.hear(call), call)
        try:
            own = super()._decide(exc, call, retry=retry, now=now, **when)
        except Exception:
            agreement.announce(Due(call, call, sure=False, stop=True))
            raise
        not_before = now + own.at_least if own.at_least else -math.inf
        self._schedule = _Schedule(call, now, call + own.calls, now + own.seconds, not_before)
        return self._decision(self._announce(agreement, self._schedule, call, stop=own.stop), call)

    def _announce(self, agreement: Agreement, schedule: _Schedule, call: int, *, stop: bool = False) -> Due | None:
        now = self.policy.clock()
        next_call, sure = (call, True) if stop else schedule.next_look(call, now)
        return agreement.announce(Due(call, next_call, sure, schedule.seconds_left(now), stop))

    def _decision(self, due: Due | None, call: int) -> Decision:
        self._adopt(due)
        if due is None or due.stop:
            return Decision(retry=True, stop=True, seconds=math.inf, calls=math.inf)
        return Decision(retry=True, stop=False, seconds=math.inf, calls=due.next_call - call)

    def _adopt(self, due: Due | None) -> None:
        self._due = due
        seconds = due.seconds if due is not None else None
        self._due_time = math.inf if seconds is None else self.policy.clock() + seconds

    def let_through(self, call: int) -> Probe | None:
        episode, agreement = self.episode, self._agreement()
        if agreement is None:
            return super().let_through(call)
        if episode is None or episode.stopped or call < episode.due_call:
            return None
        if self._due is not None and not self._due.sure and not self._look(agreement, episode, call):
            return None
        return super().let_through(call)

    def _look(self, agreement: Agreement, episode: Episode, call: int) -> bool:
        """Let the first rank look at its clock. Return True if an attempt is due."""
        schedule = self._schedule
        if not agreement.leads:
            due = agreement.hear(call)
        elif schedule is None or schedule.is_due(call, self.policy.clock()):
            due = agreement.announce(Due(call, call, sure=True))
        else:
            due = self._announce(agreement, schedule, call)
        if due is None:
            self.stop(call)
            self.on_disagreement(call)
            return False
        self._adopt(due)
        with self._lock:
            self._begin(episode._replace(due_call=due.next_call))
        return due.next_call <= call

    def retry_now(self) -> None:
        """Make an attempt due now, even after giving up. All ranks do so in the same call."""
        super().retry_now()
        if self._agreement() is not None:
            self._adopt(None)
            with self._lock:
                if self.episode is not None:
                    self._begin(self.episode._replace(due_call=0, due_time=math.inf))

    def next_retry(self, calls: int) -> NextRetry | None:
        episode, due = self.episode, self._due
        if self._agreement() is None or episode is None or episode.stopped or due is None:
            return super().next_retry(calls)
        left = max(1, int(episode.due_call) - calls) if due.sure else None
        seconds = max(0.0, self._due_time - self.policy.clock()) if self._due_time < math.inf else None
        return NextRetry(left, None if due.sure else seconds)
