"""If the compiler fails while Inductor probes for vector instructions, all later code silently lacks them.

The empty result is cached until the process exits, so later compiles produce scalar code even if the compiler is
repaired. A probe's .so that was truncated on disk (by a full disk or a killed linker) gives the same result in every
new process that shares the cache.

Expected: a failure is not cached, and a file that does not load is rebuilt. Seen on 2.13.0, CPU. Needs a POSIX shell,
g++, and a processor with vector instructions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

COMPILER = """#!/bin/sh
case "$*" in *.cpp*)
    if [ -e "{folder}/broken" ]; then echo "No space left on device" >&2; exit 1; fi
esac
exec g++ "$@"
"""


def compile_and_ask(broken: Path) -> None:
    """In a separate process, print the instruction sets that Inductor finds, at first and after the repair."""
    from torch._inductor import cpu_vec_isa

    x = torch.ones(64)
    if broken.exists():
        try:
            torch.compile(lambda x: x.sin())(x)
        except torch._dynamo.exc.BackendCompilerFailed:
            broken.unlink()
    torch.compile(lambda x: x.cos() + 1)(x)  # no warning about missing instructions
    print([str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()])


def found(when: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "CXX": str(folder / "cxx"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }
    command = [sys.executable, __file__, str(folder / "broken")]
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()  # noqa: S603  # this file
    print(f"{when}: {answer}", flush=True)
    return answer


def main(folder: Path) -> bool:
    compiler = folder / "cxx"
    compiler.write_text(COMPILER.format(folder=folder))
    compiler.chmod(0o700)
    (folder / "broken").touch()
    first = found("compiler broken at first, then repaired", folder)
    healthy = found("a new process", folder)
    for library in (folder / "cache").glob("*/*.so"):
        if not library.name.endswith(".main.so"):  # the others are probes
            os.truncate(library, 100)
    truncated = found("a new process, probes cut short on disk", folder)
    return first == truncated == "[]" != healthy


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compile_and_ask(Path(sys.argv[1]))
        sys.exit()
    with tempfile.TemporaryDirectory() as directory:
        reproduced = main(Path(directory))
    if not reproduced:
        print("not reproduced")
    sys.exit(not reproduced)
