"""Strict mode: compile failures raise. It is process-wide, because CI needs it for all functions or none."""

from __future__ import annotations

from contextlib import AbstractContextManager

from . import _switches


class _Strict:
    def __init__(self) -> None:
        self.enabled = _switches.is_set("strict")


_strict = _Strict()


class _Restore(AbstractContextManager[None]):
    """The context manager that `set_strict` returns. It restores the previous mode at the end of the block."""

    def __init__(self, previous: bool) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        _strict.enabled = self._previous


def set_strict(enabled: bool) -> AbstractContextManager[None]:
    """Turn strict mode on or off for the whole process.

    In strict mode, the call in which a compile fails raises that failure, and nothing is held off. It is meant for CI,
    where the fallback would hide a broken compile. ``COMPILE_RETRY=strict`` in the environment turns it on from the
    start.

    Args:
        enabled: The new mode.

    Returns:
        A context manager. ``with set_strict(True):`` restores the previous mode at the end of the block. Without
        ``with``, the new mode stays.

    Raises:
        TypeError: `enabled` is not a bool.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"set_strict() takes True or False, not {enabled!r}")
    previous, _strict.enabled = _strict.enabled, enabled
    return _Restore(previous)


def is_strict() -> bool:
    return _strict.enabled
