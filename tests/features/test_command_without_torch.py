"""The command line where PyTorch is missing or broken, or where its import hangs: that is the doctor's diagnosis."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doctor_command import checks_of, doctor, forget_variables

import compile_retry

SOURCE = Path(compile_retry.__file__).parents[1]

# What pip writes for an entry point.
SCRIPT = "import sys; from compile_retry.__main__ import main; sys.exit(main())"

BROKEN = {
    "a damaged library": (
        "import ctypes, pathlib; ctypes.CDLL(str(pathlib.Path(__file__).with_name('libtorch.so')))",
        "libtorch.so: file too short",
    ),
    "a dependency that is missing": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "another module of that name": ("", "AttributeError: module 'torch' has no attribute '__version__'"),
    "a crash": ("import os; os.abort()", "the process was killed by signal 6 (Aborted)"),
    "an exit": ("raise SystemExit('no licence')", "the process ended with status 1: no licence"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path of all Python processes."""
    forget_variables(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, SOURCE))))
    return tmp_path


def install_torch(place: Path, code: str) -> Path:
    """Put a module `torch` with this code before the real one."""
    module = place / "torch" / "__init__.py"
    module.parent.mkdir()
    module.write_text(code)
    module.with_name("libtorch.so").touch()
    return module


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_torch_is_missing(place: Path) -> None:
    """The doctor says so. A program that imports the package gets the usual error."""
    assert run(sys.executable, "-m", "venv", "--without-pip", place / "venv").returncode == 0
    python, script = place / "venv" / "bin" / "python", place / "venv" / "bin" / "compile-retry"
    script.write_text(SCRIPT)
    for command in (["-m", "compile_retry"], ["-mcompile_retry"], [script]):
        ended = run(python, *command, "doctor")
        assert ended.returncode == 1
        assert ended.stderr == ""
        lines = ended.stdout.splitlines()
        assert lines[1:4] == [
            "failed   import torch         ModuleNotFoundError: No module named 'torch'",
            f"                              -> install PyTorch for {python}",
            "skipped  versions             because of import torch",
        ]
        assert all(line.endswith("because of import torch") for line in lines[3:])
        assert run(python, *command, "--version").returncode == 0
    program = run(python, "-c", "import compile_retry")
    assert program.returncode == 1
    assert program.stderr.endswith("ModuleNotFoundError: No module named 'torch'\n")


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(("code", "said"), BROKEN.values(), ids=BROKEN)
def test_torch_is_broken(place: Path, code: str, said: str) -> None:
    """The doctor says what its import raised, or how it ended, and skips the other checks."""
    module = install_torch(place, code)
    result = doctor("--json")
    check = checks_of(result.stdout).pop("import torch")
    assert (result.exit_code, check["status"]) == (1, "failed")
    assert check["detail"].endswith(said)
    if "ended" not in said and "killed" not in said:
        assert check["detail"].startswith(f"{module}: ")
        assert check["remedy"] == f"reinstall PyTorch for {sys.executable}"


def test_the_import_of_torch_hangs(place: Path) -> None:
    """Checks that are over are printed meanwhile, and the command ends at the time limit."""
    install_torch(place, "import time; time.sleep(600)")
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "compile_retry", "doctor", "--timeout", "5"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    with process.stdout as output:
        assert output.readline() == "ok       environment          no variables that affect compilation\n"
        assert process.poll() is None
        assert output.readline() == "failed   import torch         it took too long (limit: 5 s)\n"
        assert "-> run python -X importtime -c 'import torch'" in output.readline()
        output.read()
    assert process.wait(60) == 1
    assert 5 <= time.monotonic() - begin < 5 + 10


def test_other_programs_get_the_whole_package(place: Path) -> None:
    """Also those that are run with ``python -m``, whose packages are imported in the same way."""
    (place / "program").mkdir()
    (place / "program" / "__init__.py").write_text("import compile_retry; print(compile_retry.report)")
    (place / "program" / "__main__.py").touch()
    ended = run(sys.executable, "-m", "program", "compile_retry")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("<function report at ")
