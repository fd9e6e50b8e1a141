"""Imports ``torch._dynamo``. A failure in the middle of that would be for good.

While it is imported it makes inductor's cache directory (since 2.9). If that cannot be made, it is left half imported,
and every later import in this process fails. So where the directory is in doubt, it is imported with another one;
nothing of that is kept, the directory is looked up again at each compile.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def _can_be_made(directory: str | None) -> bool:
    if directory is None:
        return False  # torch will choose one, and only Dynamo knows which
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return True


def _import_dynamo() -> None:
    directory = os.environ.get(_VARIABLE)
    if _can_be_made(directory):
        import torch._dynamo
    else:
        with tempfile.TemporaryDirectory() as another:  # if there is not even room for this, we fail before the import
            os.environ[_VARIABLE] = another
            try:
                import torch._dynamo  # noqa: F401
            finally:
                if directory is None:
                    del os.environ[_VARIABLE]
                else:
                    os.environ[_VARIABLE] = directory


if "torch._dynamo" not in sys.modules:
    _import_dynamo()
