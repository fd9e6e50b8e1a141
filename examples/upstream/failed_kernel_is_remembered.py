"""A C++ kernel that failed to compile once keeps failing until the process exits, even after the compiler is repaired.

`CppPythonBindingsCodeCache.cache` stores the kernel's loader before the kernel is compiled, and the loader keeps the
failed future. The next compile of the same kernel raises the old error without running the compiler.

Expected: the compiler runs again. Seen on 2.13.0, CPU. Needs a POSIX shell and g++.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

COMPILER = """#!/bin/sh
case "$*" in *main.cpp*)
    echo run >> "{folder}/runs"
    if [ -e "{folder}/broken" ]; then echo "No space left on device" >&2; exit 1; fi
esac
exec g++ "$@"
"""


def fn(x: Tensor) -> Tensor:
    return x.sin() + 1


def main(folder: Path) -> bool:
    compiler, broken, runs = folder / "cxx", folder / "broken", folder / "runs"
    compiler.write_text(COMPILER.format(folder=folder))
    compiler.chmod(0o700)
    os.environ["CXX"] = str(compiler)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"

    def fails(when: str) -> bool:
        before = runs.read_text().count("run") if runs.exists() else 0
        torch._dynamo.reset()
        try:
            torch.compile(fn)(torch.ones(64))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            outcome = type(error.inner_exception).__name__
        else:
            outcome = "compiled"
        print(f"{when}: {outcome}; compiler runs: {runs.read_text().count('run') - before}")
        return outcome != "compiled"

    broken.touch()
    failed = fails("compiler broken")
    broken.unlink()
    return failed and fails("compiler repaired")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        reproduced = main(Path(directory))
    if not reproduced:
        print("not reproduced")
    sys.exit(not reproduced)
