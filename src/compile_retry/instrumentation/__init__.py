"""Reports events and counters to the monitoring packages that are installed. Nothing has to be set up.

``"structlog"``, ``"prometheus"`` and ``"opentelemetry"`` are imported when the first attempt has finished, not before.
Calling :func:`disable` earlier prevents that.
"""

from __future__ import annotations

from ._switchboard import active, disable, enable

__all__ = ["active", "disable", "enable"]

for _name in __all__:  # the public path
    globals()[_name].__module__ = __name__
del _name
