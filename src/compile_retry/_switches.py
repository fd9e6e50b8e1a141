"""Operators' switches: environment variables that change how a program behaves, without a change to its code."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

_log = logging.getLogger("compile_retry")

_WORDS = {"": "on", "1": "on", "on": "on", "true": "on", "yes": "on", "install": "install", "strict": "strict"}


def is_set(word: str) -> bool:
    """Return True if ``COMPILE_RETRY`` contains ``"install"`` or ``"strict"``, alone or separated by a comma."""
    return word in _words(os.environ.get("COMPILE_RETRY", ""))


def overrides() -> dict[str, float]:
    """Return the arguments of a policy that the environment sets."""
    given = {name: _number(variable, os.environ.get(variable, "")) for name, variable in _VARIABLES.items()}
    return {name: value for name, value in given.items() if value is not None}


@functools.cache  # each wrong value is logged once
def _words(text: str) -> frozenset[str]:
    words = [word.strip().lower() for word in text.split(",")]
    if not all(word in _WORDS for word in words):
        _log.warning("COMPILE_RETRY=%s is ignored; it must be on, strict, install, or strict,install", text)
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
