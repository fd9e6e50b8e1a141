"""The plug-in that ``import torch`` loads, because it is an entry point of the group ``torch.backends``.

PyTorch loads the plug-ins of all installed packages. A module inside the package `compile_retry` would import the
package, even if nobody uses it. So this is a separate module next to the package, and does nothing unless
``COMPILE_RETRY=install`` is set.
"""

from __future__ import annotations

import logging
import os

__all__ = ["load"]


def load() -> None:
    """Import the package, which then installs itself. An error is logged, because it would fail ``import torch``."""
    if "install" not in os.environ.get("COMPILE_RETRY", "").lower():
        return
    try:
        import compile_retry  # noqa: F401  # it decides, and installs itself
    except Exception:
        logging.getLogger("compile_retry").exception("COMPILE_RETRY=install has no effect")
