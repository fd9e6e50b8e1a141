"""The group of ranks that a decorated function was given, looked up when it is first needed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from compile_retry._failures import Location
from compile_retry._locks import Lock
from compile_retry._ranks.agreement import Agreement
from compile_retry._torch import distributed
from compile_retry._torch.distributed import DeclaredGroup, Members

# Number of functions in each group that have the same location, so that each gets its own keys in the store.
_functions: Counter[str] = Counter()
_lock = Lock()


class Team:
    """One function's group.

    Args:
        declared: The function's arguments.
        name: The function's name, for messages.
        location: The function's location. It is the same on all ranks, unlike the name.
    """

    def __init__(self, declared: DeclaredGroup, name: str, location: Location) -> None:
        self._declared, self._name, self._location = declared, name, location
        self._agreement: Agreement | None = None
        self.members: Members | None = None

    @property
    def agreement(self) -> Agreement | None:
        """The agreement with the other ranks. None if there are none, or not yet.

        Raises:
            ValueError: `agree_timeout` is not below the group's own timeout.
        """
        if self._agreement is None and (members := distributed.members(self._declared)) is not None:
            self._agreement, self.members = self._agree(members), members
        return self._agreement

    def _agree(self, members: Members) -> Agreement:
        function, file, line = self._location
        # File name only, because directories may differ between hosts.
        prefix = f"compile_retry/{function}:{Path(file).name}:{line}"
        with _lock:
            number = _functions[f"{prefix} {members.name}"]
            _functions[f"{prefix} {members.name}"] += 1
        store = members.substore(f"{prefix}/{number}")
        return Agreement(store, members.rank, members.ranks, members.timeout, function=self._name)
