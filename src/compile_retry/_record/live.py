"""A registry of objects that does not keep them alive."""

from __future__ import annotations

import itertools
import weakref
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")


class WeakRegistry(Generic[T]):
    """Lists the registered objects that are still alive, in the order of registration."""

    def __init__(self) -> None:
        # Accessed only through dictionary methods that are single C calls. A lock would not help, because objects can
        # be collected at any point of any thread, even while it holds the lock.
        self._references: dict[int, weakref.ref[T]] = {}
        self._next_number = itertools.count().__next__

    def register(self, item: T) -> None:
        number = self._next_number()
        self._references[number] = weakref.ref(item, partial(self._references.pop, number))

    def alive(self) -> list[T]:
        found = (reference() for reference in self._references.copy().values())
        return [item for item in found if item is not None]
