"""Events as lines in the standard log."""

from __future__ import annotations

from compile_retry.events import Event, log


def write_line(event: Event) -> None:
    """Write the line of an event that has one."""
    if event.level is not None:
        log.log(event.level, "%s: %s", event.function, event.message)
