"""Which decorated functions there are. Keeps none of them alive."""

from __future__ import annotations

import itertools
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compile_retry._function import CompiledFunction

# By number, in order of creation. Only touched by dictionary methods that are one C call each: a lock would be of no
# use, since functions are collected in the middle of whatever a thread does, also while it holds the lock.
_live: dict[int, weakref.ref[CompiledFunction[..., Any]]] = {}
_next_number = itertools.count().__next__


def register(function: CompiledFunction[..., Any]) -> None:
    """Count a function among the live ones for as long as it lives."""
    number = _next_number()
    _live[number] = weakref.ref(function, partial(_live.pop, number))


def functions() -> list[CompiledFunction[..., Any]]:
    """All decorated functions that are alive, in order of creation."""
    found = (reference() for reference in _live.copy().values())
    return [function for function in found if function is not None]
