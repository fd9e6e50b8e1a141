"""Events as structlog's key-value pairs, instead of lines in the standard log."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import structlog

from compile_retry.events import Event, abbreviated

from ._logging import write_line


class Structlog:
    """The integration with structlog. If structlog is not configured, or fails, the standard log gets the line.

    An unconfigured structlog would print to standard output, and the lines would be missing from the standard log.
    """

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def __call__(self, event: Event) -> None:
        if not structlog.is_configured():
            write_line(event)
            return
        try:
            _log(event)
        except Exception:
            write_line(event)
            raise


def _log(event: Event) -> None:
    # The method is called by name, because not every logger that structlog wraps has a log().
    method = logging.getLevelName(logging.DEBUG if event.level is None else event.level).lower()
    # Not cached, because a logger keeps the configuration of its first use.
    getattr(structlog.get_logger("compile_retry"), method)(event.kind, **_key_values(event))


def _key_values(event: Event) -> dict[str, Any]:
    values = {**asdict(event), "state": event.state.value, "fqns": abbreviated(event.fqns)}
    del values["level"]  # structlog adds its own
    # Most functions have neither a group of ranks nor a name in a model.
    values = {name: value for name, value in values.items() if name not in ("fqns", "rank") or value not in ("", None)}
    if "failure" in values:
        del values["failure"]["traceback"]  # pages of text
    return values
