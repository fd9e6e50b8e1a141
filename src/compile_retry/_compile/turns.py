"""Turns at due moments: the least recently tried key goes first, so no frame starves behind one that keeps failing.

Keys may be any hashable objects.
"""

from __future__ import annotations

from collections.abc import Hashable

# Maximum number of remembered keys. Frames beyond that are attempted in the order in which they are called.
_MAX_KEYS = 64


class Turns:
    """Records which keys wanted an attempt while held off, and when each was last tried.

    Attributes:
        claimants: The keys whose turn it is at the next due moment; empty if any key may go first.
        claimants_follow: Whether they all ran in the same call as the last failure, after it. If so, the failed key may
            go first: if it succeeds, they may be attempted too.
    """

    def __init__(self) -> None:
        self._requested: dict[Hashable, int] = {}  # since the last failure: the first call
        self._last_tried: dict[Hashable, int] = {}  # the call
        self.claimants: frozenset[Hashable] = frozenset()
        self.claimants_follow = False

    def request(self, who: Hashable, call: int) -> None:
        """Record that this key would have been attempted in this call."""
        if len(self._requested) < _MAX_KEYS:
            self._requested.setdefault(who, call)

    def served(self, who: Hashable) -> None:
        """Drop a key that need not be tried again."""
        self._requested.pop(who, None)
        self._last_tried.pop(who, None)
        self.claimants -= {who}

    def failed(self, who: Hashable, call: int, last_failure_in_call: int | None) -> None:
        """Record a failed attempt. If it was a retry, the next turn goes to the least recently tried waiting keys.

        Args:
            who: The key that failed.
            call: The call in which it failed.
            last_failure_in_call: The call of the previous failure; None if this is the first.
        """
        self.served(who)
        self._last_tried[who] = call
        if last_failure_in_call is None:
            return
        requested, self._requested = self._requested, {}
        longest_ago = min((self._last_tried.get(other, 0) for other in requested), default=0)
        self.claimants = frozenset(other for other in requested if self._last_tried.get(other, 0) == longest_ago)
        self.claimants_follow = all(requested[other] == last_failure_in_call for other in self.claimants)

    def forget(self) -> None:
        """Forget everything, because the episode is over."""
        self._requested, self._last_tried, self.claimants = {}, {}, frozenset()
