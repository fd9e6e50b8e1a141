"""``python -m compile_retry doctor`` on real faults: it names the fault, ends in time and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from doctor_command import checks_of, forget_variables
from doctor_command import examine as examine_within

# Each test compiles with a real C++ compiler, in separate processes.
pytestmark = pytest.mark.long

# Answers --version, and hangs on every compile.
HANGS = """#!/bin/sh
[ "$1" = --version ] && echo "hangs 1.0" && exit
echo $$ > "@PLACE@/pid"
exec sleep 600
"""

# Compiles everything except Inductor's kernels.
FAILS = """#!/bin/sh
case "$*" in *.main.cpp*) echo "x.cpp:1: internal compiler error: told to" >&2; exit 1 ;; esac
exec g++ "$@"
"""

# Compiles the doctor's library from other source code.
MAKES = """#!/bin/sh
case "$*" in *doctor.cpp*) ;; *) exec g++ "$@" ;; esac
while [ "$1" != -o ]; do shift; done
echo '#include <cstdlib>
extern "C" int compile_retry_doctor(int n) { @BODY@ }' > "$2.cpp"
exec g++ -shared -fPIC -o "$2" "$2.cpp"
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set a new directory for temporary files, which must be empty afterwards, and a new cache directory."""
    forget_variables(monkeypatch)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    return tmp_path


@pytest.fixture
def scalar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable vector instructions, so that kernels compile in a third of the time."""
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")


def examine(*arguments: str, status: int) -> dict[str, dict[str, Any]]:
    """Run the doctor. Other tests may run at the same time, so it has more time than it usually takes."""
    return examine_within("--timeout", "240", *arguments, status=status)


def assert_nothing_is_left(place: Path) -> None:
    # Torch keeps precompiled headers there, and 2.10 has no environment variable to disable them.
    headers = {path.parent for path in (place / "tmp").glob("*/precompiled_headers")}
    assert {*(place / "tmp").iterdir()} == headers
    assert list((place / "cache").glob("compile_retry_doctor_*")) == []


def is_alive(pid: int) -> bool:
    """Return True if the process runs. A killed process that its new parent has not reaped yet does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def install_compiler(place: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = place / "c++"
    compiler.write_text(script.replace("@PLACE@", str(place)))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


@pytest.mark.usefixtures("measured")
def test_a_healthy_machine(place: Path) -> None:
    """On a healthy machine no check fails, and nothing is left behind."""
    command = [sys.executable, "-m", "compile_retry", "doctor", "--json", "--timeout", "240"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    checks = checks_of(done.stdout)
    assert {check["status"] for check in checks.values()} <= {"ok", "warning", "skipped"}
    assert "compiled in" in checks["compile"]["detail"]
    assert "compiled in" in checks["cached compile"]["detail"]
    assert_nothing_is_left(place)


@pytest.mark.usefixtures("scalar")
def test_a_poisoned_cache(place: Path) -> None:
    """The doctor says if a result came from the cache. If a kernel is truncated, it says which directory to delete."""
    examine(status=1)  # it fails because no vector instructions are found
    checks = examine(status=1)
    assert "compiled in" in checks["compile"]["detail"]
    assert "from the cache in" in checks["cached compile"]["detail"]

    kernels = list((place / "cache").rglob("*.main.so"))
    assert kernels
    for kernel in kernels:
        os.truncate(kernel, 3000)
    checks = examine(status=1)
    assert checks["compile"]["status"] == "ok"
    assert checks["cached compile"]["status"] == "failed"
    assert "works in a new cache directory" in checks["cached compile"]["detail"]
    assert checks["cached compile"]["remedy"].startswith(f"poisoned cache suspected: delete {place / 'cache'}")
    assert_nothing_is_left(place)


@pytest.mark.usefixtures("measured")
def test_no_compiler(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler the doctor fails, and the remedy names CXX."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    checks = examine(status=1)
    assert checks["C++ compiler"]["status"] == "failed"
    assert "CXX=no-such-compiler" in checks["C++ compiler"]["remedy"]
    assert checks["compile"]["status"] == "failed"
    assert checks["compile"]["remedy"] == "see C++ compiler"
    assert_nothing_is_left(place)


@pytest.mark.usefixtures("scalar", "measured")
def test_a_compiler_that_fails(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a compile also fails in a new cache directory, the usual one is not suspected."""
    install_compiler(place, FAILS, monkeypatch)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(place / "triton"))
    checks = examine(status=1)
    assert checks["C++ compiler"]["status"] == "ok"
    assert "internal compiler error: told to; also fails in a new cache directory" in checks["compile"]["detail"]
    assert "poisoned" not in str(checks)
    assert_nothing_is_left(place)


@pytest.mark.usefixtures("scalar", "measured")
def test_headers_cannot_be_precompiled(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without openssl, headers cannot be precompiled, and the remedy says so."""
    (place / "bin").mkdir()
    programs = {file.name: file for folder in os.get_exec_path()[::-1] for file in Path(folder).glob("*")}
    for name in programs.keys() - {"openssl"}:
        (place / "bin" / name).symlink_to(programs[name])
    monkeypatch.setenv("PATH", str(place / "bin"))
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "1")
    checks = examine(status=1)
    assert checks["compile"]["detail"].endswith("; works without precompiled headers")
    assert checks["compile"]["remedy"] == "install openssl, or set TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS=0"


@pytest.mark.usefixtures("scalar", "measured")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 7;", "compiled code gives wrong results"),
        ("exit(3);", "the process ended with status 3"),
        ("abort();", "the process was killed by signal 6 (Aborted)"),
        ("for (;;) ;", "it took too long"),
        ("this is not C++", "error:"),
    ],
)
def test_a_compiler_that_produces_bad_libraries(
    body: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler whose libraries are wrong, crash or hang is reported as broken."""
    install_compiler(place, MAKES.replace("@BODY@", body), monkeypatch)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # Inductor is not under test
    checks = examine("--timeout", "12", status=1)
    assert checks["C++ compiler"]["status"] == "failed"
    assert said in checks["C++ compiler"]["detail"]


@pytest.mark.usefixtures("measured")
def test_a_torch_that_cannot_compile(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a module that Dynamo needs cannot be imported, the doctor says so and skips the other checks."""
    (place / "sympy.py").write_text("raise ImportError('an installation that is broken')")
    monkeypatch.setenv("PYTHONPATH", str(place), prepend=os.pathsep)
    checks = examine(status=1)
    assert "an installation that is broken" in checks["versions"]["detail"]
    assert checks["C++ compiler"]["detail"] == "because of versions"


@pytest.mark.usefixtures("measured")
def test_interrupted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends all processes that the doctor has started."""
    install_compiler(place, HANGS, monkeypatch)
    pid = place / "pid"
    command = [sys.executable, "-m", "compile_retry", "doctor", "--timeout", "240"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: pid.exists() and pid.read_text().strip() != "")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors == "Aborted!\n"
    assert process.returncode == 1
    assert not is_alive(int(pid.read_text()))
    assert_nothing_is_left(place)


def test_a_compiler_that_hangs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the compiler hangs, the doctor ends at the time limit and leaves no process behind."""
    install_compiler(place, HANGS, monkeypatch)
    pid = place / "pid"
    for timeout in (15, 60):
        begin = time.monotonic()
        checks = examine("--timeout", str(timeout), status=1)
        assert time.monotonic() - begin < timeout + 10
        assert_nothing_is_left(place)
        if pid.exists():  # the limit was not reached before the compiler ran
            break
    assert checks["C++ compiler"]["status"] == "failed"
    assert checks["C++ compiler"]["detail"] == f"it took too long (limit: {timeout} s)"
    assert checks["compile"]["detail"] == "because of C++ compiler"
    assert not is_alive(int(pid.read_text()))


@pytest.mark.usefixtures("measured")
def test_a_doctor_that_is_killed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the doctor is killed, as by a container's health check, its processes end too."""
    install_compiler(place, HANGS, monkeypatch)
    pid = place / "pid"
    process = subprocess.Popen([sys.executable, "-m", "compile_retry", "doctor"], stdout=subprocess.DEVNULL)
    wait_until(lambda: pid.exists() and pid.read_text().strip() != "")
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    wait_until(lambda: not is_alive(int(pid.read_text())))
    wait_until(lambda: not any((place / "tmp").iterdir()))


def wait_until(condition: Any) -> None:
    due = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.05)  # for another process, which offers nothing to wait on


@pytest.mark.usefixtures("scalar", "measured")
def test_a_cache_directory_that_is_a_file(place: Path) -> None:
    """A file in place of the cache directory is reported, although stock torch cannot even import Dynamo."""
    (place / "cache").touch()
    checks = examine(status=1)
    assert checks["versions"]["status"] == "ok"
    assert checks["cache directory"]["status"] == "failed"
    assert f"{place / 'cache'} is not writable" in checks["cache directory"]["detail"]
    for name in ("compile", "cached compile"):
        assert checks[name]["status"] == "failed"
        assert "works in a new cache directory" in checks[name]["detail"]
        assert checks[name]["remedy"].startswith("set TORCHINDUCTOR_CACHE_DIR to a directory other than")


@pytest.mark.usefixtures("scalar", "measured")
def test_compiling_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """If torch.compile is disabled, nothing is compiled, and the doctor fails."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    checks = examine(status=1)
    assert checks["environment"]["detail"] == "TORCH_COMPILE_DISABLE=1: torch.compile does nothing"
    assert checks["C++ compiler"]["status"] == "ok"
    for name in ("compile", "cached compile", "GPU"):
        assert (checks[name]["status"], checks[name]["detail"]) == ("skipped", "TORCH_COMPILE_DISABLE=1 is set")
