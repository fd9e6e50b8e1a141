"""If Inductor's cache directory is unusable when `torch._dynamo` is first imported, it can never be imported.

The directory is created in the middle of the import. When that fails, it leaves modules behind that break a second
import, even if the directory is usable by then.

Expected: the import does not need the directory, or works once it is there. Seen on 2.13.0, CPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch


def failure() -> str | None:
    try:
        torch.compile(lambda x: x)  # imports torch._dynamo
    except Exception as error:  # of many types
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def main(folder: Path) -> bool:
    (folder / "file").touch()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "file" / "cache")
    first = failure()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    second = failure()
    print(f"unusable directory: {first}\nusable directory: {second}")
    return first is not None and second is not None


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        reproduced = main(Path(directory))
    if not reproduced:
        print("not reproduced")
    sys.exit(not reproduced)
