"""Log lines for events."""

from __future__ import annotations

from compile_retry.events import Event, log


def write_line(event: Event) -> None:
    """Write the event's log line, if it has one."""
    if event.level is not None:
        log.log(event.level, "%s: %s", event.who, event.message)
