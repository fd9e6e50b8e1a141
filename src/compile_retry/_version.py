"""The version of the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

UNKNOWN = "0+unknown"


def installed_version() -> str:
    """Return the distribution's version, or `UNKNOWN` for a copy of the source that is not installed."""
    try:
        return version("compile-retry")
    except PackageNotFoundError:
        return UNKNOWN
