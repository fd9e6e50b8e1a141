"""Dynamo cache entries, dropped once their decorated function is gone.

Importing this module imports ``torch._dynamo``.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from . import first_import  # noqa: F401  # before anything else imports Dynamo

# isort: split
# Replaces the guards of a dropped cache entry. Since 2.6. Essential: Dynamo has no public way to drop a single entry.
from torch._dynamo.guards import DeletedGuardManagerWrapper

from .frames import compile_lock

# The last dropped guards. Dynamo releases the GIL while it evaluates guards and holds no reference to them. So another
# thread may still be evaluating these, and would crash if they were freed.
_dropped: deque[object] = deque(maxlen=256)


class CachedFrame:
    """A Dynamo cache entry, to be dropped when its function is gone. The reference is weak, because Dynamo owns it.

    `CacheEntry` itself is a C object that dangles after a reset. The guard manager shows if the entry is still in use.
    Since 2.6. Essential.
    """

    def __init__(self, guarded_code: Any) -> None:
        self._manager: Callable[[], Any] = weakref.ref(guarded_code.guard_manager)

    @property
    def alive(self) -> bool:
        """False after ``torch._dynamo.reset()``, or once a guarded object has died: then Dynamo no longer uses it."""
        manager = self._manager()
        return manager is not None and manager.extra_state is not None

    def drop(self) -> None:
        """Drop this entry, and only this one, from Dynamo's cache."""
        manager = self._manager()
        if manager is not None and manager.extra_state is not None:  # pragma: no branch  # False after a reset
            dead = DeletedGuardManagerWrapper("compile_retry: its function is gone")
            dead.id_matched_objs = _UNCOUNTED
            _dropped.append(manager)
            manager.extra_state.invalidate(manager.cache_entry, dead)

    def drop_now(self) -> None:
        """Drop this entry while Dynamo is not compiling."""
        with compile_lock():
            self.drop()

    def add_guard(self, passes: Callable[[object], bool]) -> None:
        """Add a guard that is evaluated if all others have passed.

        Since 2.7; without it, the code is not passed by. The stack is an argument since 2.12.

        Args:
            passes: Takes the frame's variables.
        """
        add = getattr(getattr(self._manager(), "root", None), "add_epilogue_lambda_guard", None)
        reason = ["compile_retry tunes this code again"]
        if add is not None:  # pragma: no branch  # exists in the torch version that the tests use
            try:
                add(passes, reason, None)
            except TypeError:  # pragma: no cover  # before 2.12
                add(passes, reason)


# Entries to drop before the next compile, because functions may be garbage-collected at any point of any thread.
_abandoned: deque[CachedFrame] = deque()


def abandon(entries: Iterable[CachedFrame]) -> None:
    """Schedule these entries to be dropped, because their function is gone and nothing else runs them.

    Otherwise they and their graphs would live as long as their code object.
    """
    _abandoned.extend(entries)


def drop_abandoned() -> None:
    """Drop all scheduled entries. Call it only while Dynamo is not iterating over its entries."""
    while _abandoned:
        _abandoned.popleft().drop()


class _Unrelated:
    pass


# An entry counts towards `recompile_limit` only if the objects that it is specialized to are the frame's own. A dropped
# entry should not count, so it refers to an object that no frame has.
_UNRELATED = _Unrelated()


_UNCOUNTED: dict[str, weakref.ReferenceType[object]] = {"compile_retry": weakref.ref(_UNRELATED)}
