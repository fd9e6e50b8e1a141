"""Events as structlog's key-values, in place of the lines in the standard log."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import structlog

from compile_retry.events import Event

from ._logging import write_line


class Structlog:
    """Speaks where the program has configured structlog. Elsewhere, and where structlog fails, the log has the line.

    Where nobody has configured it, structlog would print to standard output, and who reads the standard log would miss
    the lines.
    """

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def __call__(self, event: Event) -> None:
        if not structlog.is_configured():
            write_line(event)
            return
        try:
            _speak(event)
        except Exception:
            write_line(event)
            raise


def _speak(event: Event) -> None:
    # By the method's name: not every logger that structlog wraps has a log().
    method = logging.getLevelName(logging.DEBUG if event.level is None else event.level).lower()
    # Not kept: it would keep the configuration of its first use.
    getattr(structlog.get_logger("compile_retry"), method)(event.kind, **_key_values(event))


def _key_values(event: Event) -> dict[str, Any]:
    values = {**asdict(event), "state": event.state.value}
    del values["level"]  # structlog has its own
    if "failure" in values:
        del values["failure"]["traceback"]  # pages of text
    return values
