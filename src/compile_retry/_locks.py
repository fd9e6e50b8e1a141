"""Locks that stay usable in a forked child, even if another thread of the parent held them."""

from __future__ import annotations

import os
import threading
import weakref
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING


class Lock:
    """A reentrant lock. In a forked child it is free, unless the forking thread held it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _all.add(self)

    if TYPE_CHECKING:

        def __enter__(self) -> bool: ...

        def __exit__(
            self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
        ) -> None: ...

    else:
        # A `with` statement looks both up before it begins, and then calls methods in C. Methods in Python could be
        # interrupted by Ctrl-C before their first line, and leave the lock held.
        __enter__ = property(attrgetter("_lock.__enter__"))
        __exit__ = property(attrgetter("_lock.__exit__"))

    def after_fork(self) -> None:  # pragma: no cover  # only in forked children: test_g02_g04_g11_processes.py
        """Free the lock if a thread that the child does not have held it."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


_all: weakref.WeakSet[Lock] = weakref.WeakSet()


def _after_fork() -> None:  # pragma: no cover  # likewise
    for lock in tuple(_all):
        lock.after_fork()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
