"""Entries of Dynamo's cache, dropped when the function is gone that they were compiled for.

Importing this module imports ``torch._dynamo``.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from . import first_import  # noqa: F401  # before anything else imports Dynamo

# isort: split
# What replaces the guards of a dropped cache entry; since 2.6. Essential: Dynamo has no public way to drop one entry.
from torch._dynamo.guards import DeletedGuardManagerWrapper

# Guards that were dropped last. Dynamo lets go of the interpreter lock while it evaluates guards, and holds no
# reference to them: another thread may still be in the middle of these, and would crash if they were freed.
_dropped: deque[object] = deque(maxlen=256)


class CachedFrame:
    """A cache entry of Dynamo's that is dropped when the function is gone. Holds it weakly: Dynamo owns it.

    `CacheEntry` itself is a C object that dangles after a reset; the guard manager knows whether it is still in use.
    Since 2.6. Essential.
    """

    def __init__(self, guarded_code: Any) -> None:
        self._manager: Callable[[], Any] = weakref.ref(guarded_code.guard_manager)

    @property
    def alive(self) -> bool:
        """Whether Dynamo may still use it: not after ``torch._dynamo.reset()``, nor once a guarded object has died."""
        manager = self._manager()
        return manager is not None and manager.extra_state is not None

    def drop(self) -> None:
        """Make Dynamo forget this entry, and this entry only."""
        manager = self._manager()
        if manager is not None and manager.extra_state is not None:  # pragma: no branch  # a reset may be faster
            dead = DeletedGuardManagerWrapper("compile_retry: its function is gone")
            dead.id_matched_objs = _UNCOUNTED
            _dropped.append(manager)
            manager.extra_state.invalidate(manager.cache_entry, dead)


# Entries that are dropped before the next compile. Functions are collected in the middle of whatever a thread does.
_abandoned: deque[CachedFrame] = deque()


def abandon(entries: Iterable[CachedFrame]) -> None:
    """Have Dynamo forget these soon: the function is gone that they were compiled for, and nothing else runs them.

    Otherwise they and the graphs behind them would stay for as long as the code object that they belong to.
    """
    _abandoned.extend(entries)


def drop_abandoned() -> None:
    """Make Dynamo forget what was left to it. Called where Dynamo does not go through its entries."""
    while _abandoned:
        _abandoned.popleft().drop()


class _Nobody:
    pass


# Entries are counted towards `recompile_limit` only if the objects that they were specialised to are the frame's own.
# An eager fallback should not use the limit up, so it names an object that no frame has.
_NOBODY = _Nobody()


_UNCOUNTED: dict[str, weakref.ReferenceType[object]] = {"compile_retry": weakref.ref(_NOBODY)}
