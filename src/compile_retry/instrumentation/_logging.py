"""Events as lines in the standard log."""

from __future__ import annotations

from compile_retry.events import Event, log


def write_line(event: Event) -> None:
    """Write the line of an event that has one."""
    if event.level is not None:
        who = event.function if event.functions <= 1 else f"{event.function} x{event.functions}"
        log.log(event.level, "%s: %s", who, event.message)
