"""Strict mode: a compile failure raises at once. Process-wide, because CI wants all of it or nothing."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager


class _Strict:
    def __init__(self) -> None:
        self.enabled = os.environ.get("COMPILE_RETRY_STRICT", "") == "1"


_strict = _Strict()


class _Restore(AbstractContextManager[None]):
    """What `set_strict` returns: as a context manager it puts the previous mode back at the end."""

    def __init__(self, previous: bool) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        _strict.enabled = self._previous


def set_strict(enabled: bool) -> AbstractContextManager[None]:
    """Switch strict mode on or off, for the whole process.

    In strict mode a compile failure raises out of the call in which it happens, and nothing is held off. It is meant
    for CI, where a broken compile must not hide behind a fallback. ``COMPILE_RETRY_STRICT=1`` in the environment
    switches it on from the start.

    Args:
        enabled: The new mode.

    Returns:
        A context manager. Called for its effect alone, the mode stays; as ``with set_strict(True):`` it ends with the
        block.

    Raises:
        TypeError: `enabled` is not a bool.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"set_strict() takes True or False, not {enabled!r}")
    previous, _strict.enabled = _strict.enabled, enabled
    return _Restore(previous)


def is_strict() -> bool:
    return _strict.enabled
