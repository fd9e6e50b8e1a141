"""Programs that do not know this library: frameworks compile by their own flags, fail once, and recover.

    .venv-recipes/bin/python examples/recipes/without_code_changes.py [PROGRAM ...]

`make recipes` creates that environment. Each program in `unmodified` runs as `python -m compile_retry run PROGRAM`. The
C++ compiler is broken until the first attempt has failed. The programs end normally, and go back to compiled code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROGRAMS = sorted(Path(__file__).with_name("unmodified").glob("*.py"))
# Each program mostly uses one core.
AT_ONCE = 2


def run(program: Path) -> tuple[list[str], int]:
    """Run the program, and repair the compiler after its first failed attempt. Return its output and exit status."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        repaired, compiler = Path(folder, "repaired"), Path(folder, "c++")
        # It knows its version: ultralytics does not even try to compile otherwise.
        compiler.write_text(
            f'#!/bin/sh\n[ -e {repaired} ] || [ "$*" = --version ] ||'
            ' { echo "this compiler is broken" >&2; exit 1; }\nexec g++ "$@"\n'
        )
        compiler.chmod(0o755)
        environment = os.environ | {
            "CXX": str(compiler),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),  # empty, because a cache hit needs no compiler
            "COMPILE_RETRY_WAIT": "0",  # the next call attempts again
            "COMPILE_RETRY_MAX_OVERHEAD": "inf",
        }
        command = [sys.executable, "-m", "compile_retry", "run", str(program), folder]
        with subprocess.Popen(  # noqa: S603  # our own programs
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            lines = list(_output(process, repaired))
    return lines, process.returncode


def _output(process: subprocess.Popen[str], repaired: Path) -> Iterator[str]:
    assert process.stdout
    for line in process.stdout:
        yield line
        if "attempt 1 failed" in line and not repaired.exists():
            yield ">>> the compiler is repaired\n"
            repaired.touch()


def check(program: Path) -> None:
    assert "compile_retry" not in program.read_text(), "the program does not know the library"
    began = time.monotonic()
    lines, status = run(program)
    output, took = "".join(lines), time.monotonic() - began
    print(f">>> {program.name}\n{output}>>> took {took:.0f} s", flush=True)
    assert status == 0, f"{program.name} ended with {status}"
    assert any("attempt 1 failed" in line for line in lines), "the first attempt failed"
    assert any(": recovered in call" in line for line in lines), "it recovered"
    assert any("took 20 steps" in line for line in lines), "every step was taken"


def main(names: list[str]) -> None:
    programs = [program for program in PROGRAMS if not names or program.name in names]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(check, programs))


if __name__ == "__main__":
    main(sys.argv[1:])
