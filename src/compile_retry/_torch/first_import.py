"""Import ``torch._dynamo`` safely, because a failure during its import would be permanent.

The import creates Inductor's cache directory (since 2.9). If that fails, the module stays half imported, and every
later import in this process fails. So if the directory may not be creatable, Dynamo is imported with another one. This
has no lasting effect, because every compile looks up the directory again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def _can_be_made(directory: str | None) -> bool:
    if directory is None:
        return False  # torch chooses one, and only Dynamo can look it up
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
        with tempfile.TemporaryDirectory() as another:  # if this fails too, it fails before the import
            os.environ[_VARIABLE] = another
            try:
                import torch._dynamo  # noqa: F401  # so that it is imported from here on
            finally:
                if directory is None:
                    del os.environ[_VARIABLE]
                else:
                    os.environ[_VARIABLE] = directory


if "torch._dynamo" not in sys.modules:
    _import_dynamo()
