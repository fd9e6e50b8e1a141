"""Objects that are still alive."""

from __future__ import annotations

import itertools
import weakref
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")


class WeakRegistry(Generic[T]):
    """Remembers objects in the order of their registration, and keeps none of them alive."""

    def __init__(self) -> None:
        # Only touched by dictionary methods that are one C call each: a lock would be of no use, since objects are
        # collected in the middle of whatever a thread does, also while it holds the lock.
        self._references: dict[int, weakref.ref[T]] = {}
        self._next_number = itertools.count().__next__

    def register(self, item: T) -> None:
        number = self._next_number()
        self._references[number] = weakref.ref(item, partial(self._references.pop, number))

    def alive(self) -> list[T]:
        found = (reference() for reference in self._references.copy().values())
        return [item for item in found if item is not None]
