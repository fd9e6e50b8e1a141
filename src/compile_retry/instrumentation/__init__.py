"""Hands events and books to the monitoring packages that are installed; nothing has to be set up.

``"structlog"``, ``"prometheus"`` and ``"opentelemetry"`` are imported with the first event, the outcome of the first
attempt, and not before. One call of :func:`disable` keeps them out.
"""

from __future__ import annotations

from ._switchboard import active, disable, enable

__all__ = ["active", "disable", "enable"]

for _name in __all__:  # where users find them
    globals()[_name].__module__ = __name__
del _name
