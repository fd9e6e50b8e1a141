"""Turns at due moments: the least recently tried goes first, so that nobody starves behind what keeps failing.

Knows those who wait by whatever names them, and nothing else of them.
"""

from __future__ import annotations

from collections.abc import Hashable

# So many are remembered; a function with more shapes than that waiting is served in the order in which they come.
_MOST = 64


class Turns:
    """Keeps who has asked for an attempt while held off, and when each was tried last.

    Attributes:
        claimants: Those whose turn it is at the next due moment; empty if anybody may go first.
        claimants_follow: They all run in the same call as the last failure, after it. Then whatever failed may try
            first: if it succeeds, so may they.
    """

    def __init__(self) -> None:
        self._asked: dict[Hashable, int] = {}  # since the last failure: in which call first
        self._last_tried: dict[Hashable, int] = {}  # in which call
        self.claimants: frozenset[Hashable] = frozenset()
        self.claimants_follow = False

    def ask(self, who: Hashable, call: int) -> None:
        """Note that an attempt would have been made in this call."""
        if len(self._asked) < _MOST:
            self._asked.setdefault(who, call)

    def served(self, who: Hashable) -> None:
        """Drop one that need not be tried again."""
        self._asked.pop(who, None)
        self._last_tried.pop(who, None)
        self.claimants -= {who}

    def failed(self, who: Hashable, call: int, last_failure_in_call: int | None) -> None:
        """Note a failed attempt. After a retry, the due moment goes to the least recently tried of those who asked.

        Args:
            who: Tried in vain.
            call: The call in which it was.
            last_failure_in_call: The call of the failure before this one; None if this is the first.
        """
        self.served(who)
        self._last_tried[who] = call
        if last_failure_in_call is None:
            return
        asked, self._asked = self._asked, {}
        longest_ago = min((self._last_tried.get(other, 0) for other in asked), default=0)
        self.claimants = frozenset(other for other in asked if self._last_tried.get(other, 0) == longest_ago)
        self.claimants_follow = all(asked[other] == last_failure_in_call for other in self.claimants)

    def forget(self) -> None:
        """Start again: the episode is over."""
        self._asked, self._last_tried, self.claimants = {}, {}, frozenset()
