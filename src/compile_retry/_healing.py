"""What torch remembers of a failure, dropped before the next attempt, so that a recovery leaves no trace.

Inductor probes the compiler once and keeps the answer for the life of the process. A probe that failed means code
without vector instructions, several times slower than it should be.
"""

from __future__ import annotations

from . import _torch_internals as internals


def heal() -> None:
    """Make torch ask again what it asked while something was broken."""
    for clear in internals.probe_caches():
        clear()
