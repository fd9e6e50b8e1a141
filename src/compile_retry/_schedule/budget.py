"""The budget: what the failed attempts of all functions together may cost, and which function tries next.

A broken compiler fails for all functions alike. So functions that have the same policy and failed for the same reason
form an *outage*: they share their due moments, one of them tries for all, and its success makes the others due at once.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable
from typing import Protocol

from compile_retry._locks import Lock

from .policy import RetryPolicy, pause, policy_key

# Once so many functions have failed for the same reason, those that have never been attempted wait for the outage too.
_CERTAINLY_BROKEN = 8

# Attempts that fail within a second are not limited until they have taken five seconds in all. So functions whose
# failures cost next to nothing do not wait for each other.
_QUICK, _FREE = 1.0, 5.0

# Seconds that are lost to rounding at most.
_ROUNDING = 1e-6


class Member(Protocol):
    """A function's breaker, as far as the budget needs to know it.

    Attributes:
        policy: Its policy.
        outage: The outage to which it belongs, if any. The budget sets it.
    """

    policy: RetryPolicy
    outage: Outage | None

    @property
    def due_time(self) -> float:
        """The clock when its next attempt is due."""

    @property
    def failed_at(self) -> float:
        """The clock at its last failed attempt."""

    @property
    def is_probing(self) -> bool:
        """True while one of its calls may attempt."""

    def move_due_time(self, time: float, *, at_once: bool = False) -> None:
        """Make its next attempt due at this time. With `at_once`, its own share of the time does not matter."""

    def resume_checks(self) -> None:
        """Make each call check again if it may attempt."""


class Outage:
    """Functions that have the same policy and failed for the same reason.

    Attributes:
        policy: The key of the policy.
        members: Their breakers.
        failures: The number of failed attempts at its due moments.
        due_time: The clock when one of the functions may try again.
    """

    def __init__(self, policy: Hashable) -> None:
        self.policy = policy
        self.members: weakref.WeakSet[Member] = weakref.WeakSet()
        self.failures, self.due_time = 0, -math.inf

    def moves(self, member: Member, began: float) -> bool:
        """Return True if this failed attempt moves the due moment. A function that joins early does not."""
        return began >= self.due_time or member in self.members


class Budget:
    """The budget of all functions whose policies have the same clock.

    A function with ``max_overhead=math.inf`` has one to itself. Functions with ``wait_calls`` share the time, but they
    belong to no outage, because each counts its own calls.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = Lock()
        self._held_off: weakref.WeakSet[Member] = weakref.WeakSet()
        self._not_begun: weakref.WeakSet[Member] = weakref.WeakSet()  # not held off, but had to wait for the budget
        self._outages: weakref.WeakValueDictionary[Hashable, Outage] = weakref.WeakValueDictionary()
        self._since = self._spent = self._last = 0.0
        self._told = False

    def _is_quiet(self) -> bool:
        """Return True if no function is held off any more. Then what came before does not matter."""
        if not self._held_off:
            self._spent = self._last = 0.0
            self._told = False
        return not self._held_off

    # Failures

    def number(self, member: Member, reason: Hashable, began: float) -> int:
        """Return the number of a failed attempt among those of its outage, from 1. See `failed`, which must follow."""
        with self._lock:
            outage = self._outages.get(_key(member.policy, reason))
            return outage.failures + outage.moves(member, began) if outage is not None else 1

    def failed(self, member: Member, reason: Hashable, began: float, cost: float, due_time: float) -> None:
        """Record a failed attempt that will be retried.

        Args:
            member: The function's breaker, with the new due moment.
            reason: Equal for failures that probably have the same cause.
            began: The clock when the attempt began.
            cost: The attempt's duration in seconds.
            due_time: The clock when another function may try, if any is in the same outage.
        """
        others: list[Member] = []
        with self._lock:
            if self._is_quiet():
                self._since = began + cost
            self._spent, self._last = self._spent + cost, cost
            self._not_begun.discard(member)
            self._held_off.add(member)
            if member.policy.wait_calls is None:
                key = _key(member.policy, reason)
                outage = self._outages.get(key)
                if outage is None:
                    outage = self._outages[key] = Outage(policy_key(member.policy))
                moves = outage.moves(member, began)
                self._leave_outage(member)
                member.outage = outage
                outage.members.add(member)
                if moves:
                    outage.failures, outage.due_time = outage.failures + 1, due_time
                    others = [other for other in outage.members if other is not member]
                else:
                    others = [member]
                due_time = outage.due_time
        for other in others:
            other.move_due_time(due_time)

    def spend(self, cost: float) -> None:
        """Record a failed attempt that will not be retried."""
        with self._lock:
            if not self._is_quiet():
                self._spent, self._last = self._spent + cost, cost

    # Attempts

    def wait(self, member: Member) -> float:
        """Return the seconds until the function may attempt; 0 if it may do so now."""
        if not self._held_off:  # the usual case
            return 0.0
        now = self._clock()
        with self._lock:
            if self._is_quiet():  # pragma: no cover  # another thread's function has just recovered
                return 0.0
            wait = self._pause(member.policy, now, self._spent, self._last)
            if member not in self._held_off:
                wait = max(wait, self._outage_lasts(member.policy) - now)
                (self._not_begun.add if wait > _ROUNDING else self._not_begun.discard)(member)
            return wait if wait > _ROUNDING else 0.0

    def _pause(self, policy: RetryPolicy, now: float, spent: float, cost: float) -> float:
        is_free = cost < _QUICK and spent + cost <= _FREE
        return 0.0 if is_free else pause(policy, now - self._since, spent, cost)

    def is_first_to_tell(self) -> bool:
        """Return True for the first function that reports a wait. Starts over when no function is held off any more."""
        first, self._told = not self._told, True
        return first

    def _outage_lasts(self, policy: RetryPolicy) -> float:
        """Return the clock until which functions that have not been attempted must wait for an outage."""
        key = policy_key(policy)
        of_policy = (outage for outage in self._outages.values() if outage.policy == key)
        return max((outage.due_time for outage in of_policy if len(outage.members) >= _CERTAINLY_BROKEN), default=0.0)

    def is_tried(self, member: Member) -> bool:
        """Return True while another function tries for the outage."""
        outage = member.outage
        return outage is not None and any(other.is_probing for other in outage.members if other is not member)

    def gives_way(self, member: Member) -> bool:
        """Return True if another function should go first: one never attempted, or else the one untried for longest."""
        now = self._clock()
        with self._lock:
            return bool(self._not_begun) or any(
                other is not member and other.due_time <= now and other.failed_at < member.failed_at
                for other in self._held_off
            )

    def succeeded(self, member: Member) -> None:
        """Record that an attempt succeeded.

        If the function was held off, or an outage was due, the others may succeed as well, so they are due at once.
        Otherwise they failed for reasons of their own: they stay held off, but who fails next does not join them.
        """
        if not self._held_off:  # the usual case
            return
        now = self._clock()
        with self._lock:
            own, policy = member.outage, policy_key(member.policy)
            if member in self._held_off:
                over = [own] if own is not None else []
            else:
                over = [outage for outage in self._outages.values() if outage.policy == policy]
            others = []
            for outage in over:
                if outage is own or outage.due_time <= now:
                    others += [other for other in outage.members if other is not member]
                for each in list(outage.members):
                    self._leave_outage(each)
        for other in others:
            other.move_due_time(now, at_once=True)

    def leave(self, member: Member) -> None:
        """Record that nothing of a function is held off any more, or that it has given up."""
        with self._lock:
            self._held_off.discard(member)
            self._leave_outage(member)
            waiting = list(self._not_begun) if self._is_quiet() else []
            self._not_begun.difference_update(waiting)
        for other in waiting:
            other.resume_checks()

    def _leave_outage(self, member: Member) -> None:
        if member.outage is not None:
            member.outage.members.discard(member)
            member.outage = None


class Unshared(Budget):
    """No budget, for a function that other ranks run too: it must not wait for other functions of this process."""

    def number(self, member: Member, reason: Hashable, began: float) -> int:
        return 1

    def failed(self, member: Member, reason: Hashable, began: float, cost: float, due_time: float) -> None: ...

    def wait(self, member: Member) -> float:
        return 0.0


def _key(policy: RetryPolicy, reason: Hashable) -> Hashable:
    return policy_key(policy), reason


_budgets: weakref.WeakValueDictionary[Hashable, Budget] = weakref.WeakValueDictionary()
_lock = Lock()


def budget_of(policy: RetryPolicy, purpose: str) -> Budget:
    """Return the budget for these attempts of functions with this policy: their own if they are not limited."""
    if policy.max_overhead is None or math.isinf(policy.max_overhead):
        return Budget(policy.clock)
    try:
        hash(policy.clock)
        clock: Hashable = policy.clock
    except TypeError:
        clock = id(policy.clock)  # the budget keeps it alive
    with _lock:
        return _budgets.setdefault((clock, purpose), Budget(policy.clock))


def start_anew() -> None:
    """Give functions that are decorated from now on a budget of their own. Tests need that."""
    _budgets.clear()
