"""Locks that stay usable in a forked child, even if another thread of the parent held them."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class Lock:
    """A reentrant lock. In a forked child it is free, unless the forking thread held it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

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
