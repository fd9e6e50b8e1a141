"""Tells the processes of the command line from those of programs that use the library."""

from __future__ import annotations

import sys
from pathlib import Path

_MODULES = ("compile_retry", "compile_retry._doctor.child")
_SCRIPTS = ("compile-retry", "compile-retry.exe")


def is_command() -> bool:
    """Return True in the processes of ``python -m compile_retry`` and ``compile-retry``.

    They work without PyTorch, so the package does not import it there: it may be missing or broken, or its import may
    hang, and the doctor is run to find that out.
    """
    if sys.argv[:1] == ["-m"]:  # Python is still locating the module to run
        module = sys.orig_argv[-len(sys.argv) :][:1]
        return "".join(module).removeprefix("-m") in _MODULES
    return Path("".join(sys.argv[:1])).name in _SCRIPTS
