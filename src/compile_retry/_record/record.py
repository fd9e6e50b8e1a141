"""The record of one decorated function: its counters, samples of its calls, and its hooks."""

from __future__ import annotations

from collections.abc import Callable

from compile_retry._stats import Books
from compile_retry.events import Hooks

from .history import History


class Record:
    """Belongs to one decorated function, also where several share their compiled code.

    Attributes:
        books: Its counters.
        history: Samples of its calls, and recent events.
        hooks: The hooks registered for it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.books = Books()
        self.history = History(clock)
        self.hooks = Hooks()
