"""The decorated functions there are in this process. Keeps none of them alive."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

from ._locks import Lock

if TYPE_CHECKING:
    from ._function import CompiledFunction

_lock = Lock()
_numbers = itertools.count()
_functions: weakref.WeakValueDictionary[int, CompiledFunction[..., Any]] = weakref.WeakValueDictionary()


def register(function: CompiledFunction[..., Any]) -> None:
    """Add a function that has just been made."""
    with _lock:
        _functions[next(_numbers)] = function


def functions() -> list[CompiledFunction[..., Any]]:
    """Those that are still there, in the order in which they were made."""
    with _lock:
        return list(_functions.values())
