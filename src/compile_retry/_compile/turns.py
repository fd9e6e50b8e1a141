"""Whose turn it is at a due moment, so that nobody starves behind what keeps failing.

Knows those who wait by whatever names them, and nothing else of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

# So many are remembered; a function with more shapes than that waiting is served in the order in which they come.
_MOST = 64


class Turns:
    """Who has asked for an attempt while held off, and how often the due moment was used up by another."""

    def __init__(self) -> None:
        self._asked: dict[Hashable, int] = {}  # since the last failure: in which call first
        self._passed_over: dict[Hashable, int] = {}
        self.claimants: frozenset[Hashable] = frozenset()
        # They all run in the same call as what fails, after it. Then it may try first: if it succeeds, so may they.
        self.claimants_follow = False

    def ask(self, who: Hashable, call: int) -> None:
        """Note that an attempt would have been made in this call."""
        if len(self._asked) < _MOST:
            self._asked.setdefault(who, call)

    def served(self, who: Hashable) -> None:
        """Its attempt has been made."""
        self._asked.pop(who, None)
        self._passed_over.pop(who, None)
        self.claimants -= {who}

    def due_moment_used(self, who: Hashable, last_failure_in_call: int, has_failed: Callable[[Any], bool]) -> None:
        """A retry has failed. Who asked since the last failure was passed over, and now has a claim to the next one.

        Those come first that have not failed at all; then those that were passed over most often.

        Args:
            who: Whose attempt failed.
            last_failure_in_call: The call of the failure before this one.
            has_failed: Whether an attempt for this one has failed before.
        """
        self.served(who)
        asked, self._asked = dict(self._asked), {}
        self._passed_over = {other: self._passed_over.get(other, 0) + 1 for other in asked}
        first = [other for other in asked if not has_failed(other)] or list(asked)
        most = max((self._passed_over[other] for other in first), default=0)
        self.claimants = frozenset(other for other in first if self._passed_over[other] == most)
        self.claimants_follow = all(asked[other] == last_failure_in_call for other in self.claimants)

    def forget(self) -> None:
        """The episode is over."""
        self._asked, self._passed_over, self.claimants = {}, {}, frozenset()
