"""Programs that do not know this library: Accelerate, Hugging Face Trainer and Lightning compile by their own flags.

    .venv-recipes/bin/python examples/recipes/without_code_changes.py

`make recipes` creates that environment. Each program in `unmodified` runs as `python -m compile_retry run PROGRAM`. The
C++ compiler is broken until the first attempt has failed. The programs end normally, and go back to compiled code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAMS = sorted(Path(__file__).with_name("unmodified").glob("*.py"))


def run(program: Path, folder: Path) -> list[str]:
    """Run the program, and repair the compiler after its first failed attempt. Return the lines that it wrote."""
    repaired = folder / "repaired"
    compiler = folder / "c++"
    compiler.write_text(
        f'#!/bin/sh\n[ -e {repaired} ] || {{ echo "this compiler is broken" >&2; exit 1; }}\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    environment = os.environ | {
        "CXX": str(compiler),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # empty, because a cache hit needs no compiler
        "COMPILE_RETRY_WAIT": "0",  # the next call attempts again
        "COMPILE_RETRY_MAX_OVERHEAD": "inf",
    }
    command = [sys.executable, "-m", "compile_retry", "run", str(program), str(folder)]
    lines = []
    with subprocess.Popen(  # noqa: S603  # our own programs
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="")
            lines.append(line)
            if "attempt 1 failed" in line and not repaired.exists():
                print(">>> the compiler is repaired")
                repaired.touch()
    assert process.returncode == 0, f"{program.name} ended with {process.returncode}"
    return lines


def main() -> None:
    for program in PROGRAMS:
        assert "compile_retry" not in program.read_text(), "the program does not know the library"
        print(f">>> {program.name}")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            lines = run(program, Path(folder))
        assert any("attempt 1 failed" in line for line in lines), "the first attempt failed"
        assert any(": recovered in call" in line for line in lines), "it recovered"
        assert any("trained 20 steps" in line for line in lines), "every step was taken"


if __name__ == "__main__":
    main()
