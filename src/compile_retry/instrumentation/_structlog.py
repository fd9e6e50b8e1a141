"""Events as structlog's key-values, in place of the lines in the standard log."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import structlog

from compile_retry.events import Event


class Structlog:
    """Speaks where the program has configured structlog.

    Where nobody has, structlog would print to standard output, and who reads the standard log would miss the lines.
    """

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def tell(self, event: Event, level: int | None) -> bool:
        if not structlog.is_configured():
            return False
        # By the method's name: not every logger that structlog wraps has a log().
        method = logging.getLevelName(logging.DEBUG if level is None else level).lower()
        # Not kept: it would keep the configuration of its first use.
        getattr(structlog.get_logger("compile_retry"), method)(event.kind, **_key_values(event))
        return True


def _key_values(event: Event) -> dict[str, Any]:
    values = {**asdict(event), "state": event.state.value}
    if "failure" in values:
        del values["failure"]["traceback"]  # pages of text
    return values
