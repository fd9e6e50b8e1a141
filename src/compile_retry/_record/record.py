"""The records of decorated functions: counters, samples of their calls, and hooks."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

from compile_retry._locks import Lock
from compile_retry._stats import Books, CompileStats, total
from compile_retry.events import Hooks

from .history import History


class Record:
    """Belongs to one decorated function, also where several share their compiled code.

    Attributes:
        books: Its counters.
        history: Samples of its calls, and recent events.
        hooks: The hooks registered for it.
        fqn: The fully qualified name of its module in the model, such as ``layers.3``; empty if it is not known.
    """

    def __init__(self, clock: Callable[[], float], fqn: str = "") -> None:
        self.books = Books()
        self.history = History(clock)
        self.hooks = Hooks()
        self.fqn = fqn


class Records:
    """The records of the functions that share their compiled code. It keeps none alive, but all count in its totals."""

    def __init__(self) -> None:
        self._books: dict[weakref.ref[Record], Books] = {}
        # References whose record is gone. They are added at any point of any thread, even while it holds the lock.
        self._gone: deque[weakref.ref[Record]] = deque()
        self._totals_of_gone = total(())
        self._lock = Lock()

    def add(self, record: Record) -> None:
        with self._lock:
            self._count_gone()
            self._books[weakref.ref(record, self._gone.append)] = record.books

    def alive(self) -> list[Record]:
        """Return the records of the functions that are alive, in the order in which they were added."""
        found = (reference() for reference in self._books.copy())
        return [record for record in found if record is not None]

    def totals(self) -> CompileStats:
        """Return the sums of all counters. They never decrease, because functions that are gone still count."""
        with self._lock:
            self._count_gone()
            return total((self._totals_of_gone, *(books.snapshot() for books in self._books.copy().values())))

    def _count_gone(self) -> None:
        while self._gone:
            books = self._books.pop(self._gone.popleft())
            self._totals_of_gone = total((self._totals_of_gone, books.snapshot()))
