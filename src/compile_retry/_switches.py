"""Operators' switches: environment variables and process-wide settings that change how a program behaves."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

_log = logging.getLogger("compile_retry")

_WORDS = {word: word for word in ("on", "off", "install", "strict")}
_WORDS |= dict.fromkeys(("", "1", "true", "yes"), "on")
_WORDS |= dict.fromkeys(("0", "false", "no"), "off")


class Switch:
    """A setting for the whole process.

    Attributes:
        on: Its value.
    """

    def __init__(self, on: bool) -> None:
        self.on = on

    def set(self, on: bool) -> AbstractContextManager[None]:
        """Change the value. The returned context manager restores the previous one at the end of its block."""
        previous, self.on = self.on, on
        return _Restore(self, previous)


class _Restore(AbstractContextManager[None]):
    def __init__(self, switch: Switch, previous: bool) -> None:
        self._switch, self._previous = switch, previous

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        self._switch.on = self._previous


def is_set(word: str) -> bool:
    """Return True if ``COMPILE_RETRY`` contains `word`, alone or separated by a comma."""
    return word in _words(os.environ.get("COMPILE_RETRY", ""))


def overrides() -> dict[str, float]:
    """Return the arguments of a policy that the environment sets."""
    given = {name: _number(variable, os.environ.get(variable, "")) for name, variable in _VARIABLES.items()}
    return {name: value for name, value in given.items() if value is not None}


@functools.cache  # each wrong value is logged once
def _words(text: str) -> frozenset[str]:
    words = [word.strip().lower() for word in text.split(",")]
    if not all(word in _WORDS for word in words):
        _log.warning("COMPILE_RETRY=%s is ignored; it must be on, off, strict, install, or strict,install", text)
        return frozenset()
    return frozenset(_WORDS[word] for word in words)


_VARIABLES = {"wait": "COMPILE_RETRY_WAIT", "max_overhead": "COMPILE_RETRY_MAX_OVERHEAD"}
_ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "COMPILE_RETRY_WAIT": (lambda value: value >= 0, "a number of seconds, at least 0, such as 30"),
    "COMPILE_RETRY_MAX_OVERHEAD": (
        lambda value: 0 < value <= 1 or value == float("inf"),
        "above 0 and at most 1, such as 0.05, or inf for no limit",
    ),
}


@functools.cache
def _number(variable: str, text: str) -> float | None:
    if not text.strip():
        return None
    is_allowed, allowed = _ALLOWED[variable]
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if is_allowed(value):
        return value
    _log.warning("%s=%s is ignored; it must be %s", variable, text, allowed)
    return None


# Process-wide, because CI needs strict mode for all functions or for none.
strict = Switch(is_set("strict") or os.environ.get("COMPILE_RETRY_STRICT") == "1")
active = Switch(not is_set("off"))


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
    return strict.set(enabled)


def is_strict() -> bool:
    return strict.on


def set_active(enabled: bool) -> AbstractContextManager[None]:
    """Switch the library on or off for the whole process.

    While it is off, decorated functions are what stock ``torch.compile`` makes of them: a failed compile raises, and
    nothing is retried or counted. ``COMPILE_RETRY=off`` in the environment switches the library off from the start.
    Switched on again, they go on as before.

    Args:
        enabled: The new setting.

    Returns:
        A context manager. ``with set_active(False):`` restores the previous setting at the end of the block. Without
        ``with``, the new setting stays.

    Raises:
        TypeError: `enabled` is not a bool.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"set_active() takes True or False, not {enabled!r}")
    return active.set(enabled)
