"""Equality by meaning, for values without an equality of their own."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial


def meaning(value: object, *, of_objects: Callable[[object], Hashable] = id) -> Hashable:
    """Return equal keys for values that mean the same, as far as that can be told.

    Args:
        value: The value.
        of_objects: Tells objects apart that have no other meaning: by default, by their identity. That holds as long as
            whoever has the key keeps them alive.
    """
    kind, inner = type(value), partial(meaning, of_objects=of_objects)
    if isinstance(value, dict):
        return kind, frozenset((inner(name), inner(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return kind, tuple(map(inner, value))
    if kind in _PLAIN:
        return kind, value
    if kind.__module__.partition(".")[0] == "tenacity":
        return kind, inner(vars(value))
    return kind, of_objects(value)


_PLAIN = (bool, int, float, str, type(None))
