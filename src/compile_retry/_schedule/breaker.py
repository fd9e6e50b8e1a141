"""The breaker: decide which calls may attempt. Depends on the policy and the clock only, not on torch.

While nothing has failed there is no episode, and every call may attempt, within the budget of all functions. The first
failure starts an episode: calls are held off until the next attempt is due. Then one call at a time becomes the
*probe*. The probe may attempt until one of its own attempts fails, which holds off all calls again.
"""

from __future__ import annotations

import math
import os
import weakref

from compile_retry._failures import reason
from compile_retry._locks import Lock

from .budget import Budget, Outage, budget_of
from .episode import WATCHED_CALLS, Episode, NextRetry, Probe, Refusals, Unsettled
from .policy import Decision, RetryPolicy, decide, is_worth_retry, pause


class Breaker:
    """Decides which calls may attempt. One per decorated function, shared by all threads.

    Args:
        policy: The policy.
        purpose: Attempts for another purpose have a budget of their own.
        budget: The budget; by default that of all functions.

    Attributes:
        episode: The current episode; None if there is none.
        outage: The outage that the function belongs to, if any. The budget sets it.
        held_off_before_call: Earlier calls are held off without further checks, before `held_off_before_time`.
        held_off_before_time: The time until which `held_off_before_call` applies.
    """

    def __init__(self, policy: RetryPolicy, purpose: str = "compiling", budget: Budget | None = None) -> None:
        self.policy = policy
        self._budget = budget or budget_of(policy, purpose)
        self.outage: Outage | None = None
        self._lock = Lock()
        self.probe: weakref.ref[Probe] | None = None
        self._unsettled: weakref.ref[Unsettled] | None = None
        self.refusals = Refusals()
        self.episode: Episode | None = None
        self._gave_way: Episode | None = None
        self._is_asked_for = False  # while there is no episode
        self._begins_at: float | None = None  # the clock, if the budget does not allow an attempt before
        self._told_of_postponing = False
        self.resume_checks()

    def _begin(self, episode: Episode | None) -> None:
        self.episode = episode
        self.resume_checks()

    def hold_off(self, before_call: float, before_time: float) -> None:
        """Hold off calls before this call and this time, without further checks."""
        self.held_off_before_call, self.held_off_before_time = before_call, before_time

    def resume_checks(self) -> None:
        """Make each call check again if it may attempt."""
        self.held_off_before_call, self.held_off_before_time = 0.0, -math.inf

    def let_through(self, call: int) -> Probe | None:
        """Make a call during an episode the probe, if an attempt is due and no other probe is running.

        Do not use it for a call within a probe of the same thread. So if this thread still has a probe, an interrupt
        has prevented its end, and if the probe belongs to another process, this process was forked from that one.

        Args:
            call: The call's number.

        Returns:
            The probe, to be followed by `probe_ended`; None if the call may not attempt.
        """
        episode, last = self.episode, self.probe
        if episode is None or not episode.is_due(call, self.policy.clock):
            return None
        probe, running = Probe(episode), last() if last is not None else None
        if running is not None and running.process == probe.process and running.thread != probe.thread:
            return None
        if not (episode.is_asked_for or self._is_next(episode)):
            return None
        with self._lock:
            if self.probe is not last or self.episode is not episode:
                return None
            self.probe = weakref.ref(probe)
            return probe

    def _is_next(self, episode: Episode) -> bool:
        """Return True if the budget allows an attempt and no other function should go first."""
        if wait := self._budget.wait(self):
            self._postpone(episode, self.policy.clock() + wait)
            return False
        if self._budget.is_tried(self):
            return False
        if self._gave_way is not episode and self._budget.gives_way(self):
            self._gave_way = episode  # give way for one call: the other function may not be called any more
            return False
        return True

    def _postpone(self, episode: Episode, until: float) -> None:
        with self._lock:
            if self.episode is episode:  # pragma: no branch  # another thread has replaced it
                due_time = max(episode.due_time, until) if episode.due_time < math.inf else math.inf
                self._begin(episode._replace(due_time=due_time, not_before=until))

    def probe_ended(self) -> None:
        """Let another call become the probe."""
        self.probe = None

    def is_long_overdue(self, call: int) -> bool:
        """Return True if the keys whose turn it was have let it pass."""
        episode = self.episode
        return episode is None or episode.is_long_overdue(call, self.policy.clock())

    @property
    def is_in_doubt(self) -> bool:
        """True while a call in which an attempt failed is still running."""
        failure = self._unsettled() if self._unsettled is not None else None
        return failure is not None and failure.is_open

    def doubt(self, failure: Unsettled) -> None:
        """Block all attempts until this failure is settled or garbage-collected."""
        self._unsettled = weakref.ref(failure)

    def settle(self, failure: Unsettled) -> None:
        """Unblock attempts, unless another failure is unsettled."""
        if self._unsettled is not None and self._unsettled() is failure:  # pragma: no branch  # after another's fork
            self._unsettled = None

    def refused(self, now: float, seconds: float) -> None:
        """Record a permanent failure: its time counts, but nothing is held off."""
        self.refusals.add(now, seconds)
        self._is_asked_for = False
        with self._lock:
            if self.episode is not None:
                self._begin(self.episode._replace(spent=self.episode.spent + seconds))
        self._budget.spend(seconds)

    def affords_another_refusal(self) -> bool:
        """Return True if another permanent failure would stay within the limit."""
        return self.refusals.affords_another(self.policy)

    def may_begin(self) -> bool:
        """Return True if the budget allows an attempt although nothing of the function is held off."""
        wait = 0.0 if self._is_asked_for else self._budget.wait(self)
        self._begins_at = self.policy.clock() + wait if wait else None
        return not wait

    def newly_postponed(self) -> tuple[NextRetry, bool] | None:
        """Return the due moment of an attempt that the budget does not allow yet, once until there is one.

        The second value is True if no other function has been told so.
        """
        if self._begins_at is None or self._told_of_postponing:
            return None
        self._told_of_postponing = True
        wait = max(0.0, self._begins_at - self.policy.clock())
        return NextRetry(None, wait), self._budget.is_first_to_tell()

    def hold_off_first(self, before_call: float) -> None:
        """Hold off calls of a function that has not been attempted for as long as the budget does not allow it."""
        if self._begins_at is not None:
            self.hold_off(before_call, self._begins_at)

    def succeeded(self) -> None:
        """Record that an attempt has succeeded."""
        self.refusals.end()
        self._attempted()
        self._budget.succeeded(self)

    def _attempted(self) -> None:
        self._is_asked_for, self._begins_at, self._told_of_postponing = False, None, False

    @property
    def due_time(self) -> float:
        """The clock when the next attempt is due; infinite if none is."""
        episode = self.episode
        return math.inf if episode is None else episode.due_time

    @property
    def failed_at(self) -> float:
        """The clock at the last failed attempt; infinite if nothing is held off."""
        episode = self.episode
        return math.inf if episode is None else episode.failed_at

    @property
    def is_probing(self) -> bool:
        """True while one of the function's calls may attempt, in this process."""
        probe = self.probe() if self.probe is not None else None
        return probe is not None and probe.process == os.getpid()

    def move_due_time(self, time: float, *, at_once: bool = False) -> None:
        """Make the next attempt due at this time, because of another function's attempt.

        Args:
            time: The clock.
            at_once: Whether the function's own share of the time does not matter.
        """
        with self._lock:
            episode = self.episode
            if episode is None or episode.stopped or episode.is_asked_for or self.is_probing:
                return
            not_before = -math.inf if at_once else episode.not_before
            self._begin(episode._replace(due_time=max(time, not_before), not_before=not_before))

    def is_worth_retry(self, exc: BaseException, now: float) -> bool:
        """Evaluate the policy's predicate for a failed attempt that is not recorded yet."""
        last = self.episode
        attempt, started = (last.failures + 1, last.started) if last else (1, now)
        return is_worth_retry(self.policy, exc, attempt=attempt, started=started, now=now)

    def failed(
        self, exc: BaseException, call: int, began: float, cost: float, *, retry: bool | None = None
    ) -> tuple[int, bool]:
        """Record a failed attempt. Hold off as the policy decides, or not at all if it rejects a retry.

        Args:
            exc: The root cause.
            call: The call in which the attempt failed.
            began: The clock when the attempt began.
            cost: Duration of the attempt in seconds.
            retry: Whether the failure is worth a retry, if that is already known.

        Returns:
            The attempt's number within the episode, and whether the policy allows a retry after this failure.

        Raises:
            Exception: Whatever the policy's strategies raise. The episode is then stopped.
        """
        self._attempted()
        budget, cause = self._budget, reason(exc)
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
            try:  # without the lock, because the strategies are user code
                decision = self._decide(
                    exc,
                    call,
                    attempt=attempt,
                    number=max(attempt, budget.number(self, cause, began)),
                    started=started,
                    now=now,
                    waited=waited,
                    at_least=pause(self.policy, now - started, spent, cost),
                    retry=retry,
                )
            except Exception:
                self._begin(episode)
                budget.leave(self)
                raise
            if decision.retry and not decision.stop:
                due_call, due_time = call + decision.calls, now + decision.seconds
                not_before = now + decision.at_least if decision.at_least else -math.inf
                episode = episode._replace(due_call=due_call, due_time=due_time, not_before=not_before, stopped=False)
            with self._lock:
                if self.episode is not last:  # another thread has replaced it: evaluate again
                    continue
                if decision.retry:
                    self._begin(episode)
            if not episode.stopped:
                budget.failed(self, cause, began, cost, now + decision.wait)
            elif decision.retry:
                budget.leave(self)
                budget.spend(cost)
            return attempt, decision.retry

    def _decide(
        self,
        exc: BaseException,
        call: int,
        *,
        attempt: int,
        number: int,
        started: float,
        now: float,
        waited: float,
        at_least: float,
        retry: bool | None,
    ) -> Decision:
        """Evaluate the policy: see `decide`."""
        return decide(
            self.policy,
            exc,
            attempt=attempt,
            number=number,
            started=started,
            now=now,
            waited=waited,
            at_least=at_least,
            retry=retry,
        )

    def end(self, only: Episode | None = None) -> Episode | None:
        """End the episode and return it. With `only`, do nothing if another episode has begun since."""
        with self._lock:
            if only is not None and self.episode is not only:
                return None
            ended = self.episode
            self._begin(None)
        self._budget.leave(self)
        return ended

    def rest(self) -> None:
        """Take no more part in the budget: the function is gone, or attempts nothing any more."""
        self._budget.leave(self)

    def reset(self) -> None:
        """Forget all failures, and let the next call attempt."""
        self.refusals = Refusals()
        self._is_asked_for, self._begins_at = True, None
        self.end()

    def retry_now(self) -> None:
        """Make an attempt due now, even after giving up."""
        self.refusals.end()
        with self._lock:
            if self.episode is None:
                self._is_asked_for, self._begins_at = True, None
                self.resume_checks()
            else:
                due_call = math.inf if self.policy.wait_calls is None else 0
                due_time = math.inf if self.policy.wait is None else -math.inf
                episode = self.episode._replace(
                    due_call=due_call, due_time=due_time, not_before=-math.inf, stopped=False
                )
                self._begin(episode)

    def stop(self, call: int) -> bool:
        """Give up all attempts until `retry_now` or `reset`. Return False if they are given up already.

        Args:
            call: The current call.
        """
        with self._lock:
            last, now = self.episode, self.policy.clock()
            if last is not None and last.stopped:
                return False
            if last is None:
                last = Episode(
                    0, now, now, 0.0, call, call + WATCHED_CALLS, math.inf, math.inf, stopped=True, spent=0.0
                )
            self._begin(last._replace(due_call=math.inf, due_time=math.inf, stopped=True))
        self.rest()
        return True

    def next_retry(self, calls: int) -> NextRetry | None:
        """Return the next due moment, after `calls` calls; None if nothing is held off or no retry will come."""
        episode, now = self.episode, self.policy.clock()
        if episode is None:
            return self._first_attempt(now)
        if episode.stopped:
            return None
        left = None if math.isinf(episode.due_call) else max(1, int(episode.due_call) - calls)
        seconds = None if episode.due_time == math.inf else max(0.0, episode.due_time - now)
        at_least = max(0.0, episode.not_before - now)
        if not episode.is_asked_for:
            wait = self._budget.wait(self)
            if wait > (seconds or 0.0):
                at_least = max(at_least, wait)
                seconds = None if seconds is None else max(seconds, at_least)
        return NextRetry(left, seconds, at_least, self.policy.max_overhead if at_least else None)

    def _first_attempt(self, now: float) -> NextRetry | None:
        if self._begins_at is None or self._begins_at <= now:
            return None
        return NextRetry(None, self._begins_at - now)
