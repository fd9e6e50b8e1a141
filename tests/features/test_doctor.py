"""``python -m compile_retry doctor`` with made-up findings: its checks, its output and its exit status.

Real faults are in test_doctor_on_real_faults.py. Some findings cannot be produced in a test, for example a disk that
fills up during the run, or a processor without vector instructions.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
from doctor_command import checks_of, command, doctor, examine, forget_variables

from compile_retry._doctor import checks as doctor_room
from compile_retry._doctor.process import Findings

Facts = dict[str, dict[str, Any]]
Find = Callable[..., None]

COMPILED = {"compiled": True, "from cache": False, "seconds": 1.2}
HEALTHY: Facts = {
    "import torch": {"path": "/torch/__init__.py", "seconds": 2.0},
    "versions": {"python": "3.14", "torch": "2.13", "compile_retry": "0.1"},
    "cache directory": {"path": "/c", "free": 2**40},
    "temporary directory": {"path": "/t", "free": 2**40},
    "C++ compiler": {"path": "g++", "version": "g++ 14"},
    "vector instructions": {"processor": ["a"], "found": ["a"]},
    "compile": COMPILED,
    "cached compile": {**COMPILED, "from cache": True},
}
GPU: Facts = {"GPU": {"device": None, "built for": ""}}
PRESENT: Facts = {
    "GPU": {"device": "cuda", "name": "A", "driver": "580"},
    "GPU memory": {"free": 2**36, "total": 2**37},
    "ptxas": {"path": "/ptxas", "version": "release 12.8"},
    "Triton": {"version": "3.7", "seconds": 2.0},
    "GPU compile": COMPILED,
}
GPU_NAMES = list(PRESENT)
TIGHT: Facts = {"cache directory": {"path": "/c", "free": 2**29}}
LOST = {"error": "OSError: lost"}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_variables(monkeypatch)


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Find:
    """Return a function that replaces the child's findings: those of a healthy machine, with these changes."""

    def find(
        facts: Facts,
        *,
        until: str | None = None,
        stopped: str = "",
        timed_out: bool = False,
        elsewhere: Any = None,
        gpu: Findings | None = None,
    ) -> None:
        names = list(HEALTHY)
        reached = names[: names.index(until)] if until else names
        finished = {name: HEALTHY[name] for name in reached} | {k: v for k, v in facts.items() if k in HEALTHY}
        usual = Findings(finished, until if stopped else None, stopped, timed_out)
        in_new_directory = Findings(
            {"elsewhere": elsewhere} if elsewhere else {}, None, "it took too long", timed_out=True
        )
        of_gpu = {name: found for name, found in {**GPU, **facts}.items() if name in GPU_NAMES}
        findings = {"elsewhere": in_new_directory, "gpu": gpu or Findings(of_gpu, None, "")}

        def ask(mode: str, seconds: float, tell: Callable[[str, Any], None] = lambda name, facts: None) -> Findings:
            found = findings.get(mode, usual)
            for name in found.facts if mode != "elsewhere" else ():
                tell(name, found.facts[name])
            return found

        monkeypatch.setattr(doctor_room, "ask", ask)

    return find


@pytest.mark.parametrize(
    ("facts", "arguments", "status"),
    [({}, ["--strict"], 0), (TIGHT, [], 0), (TIGHT, ["--strict"], 1), ({"compile": LOST}, [], 1)],
)
def test_exit_status(find: Find, facts: Facts, arguments: list[str], status: int) -> None:
    """A warning counts as a failure in strict mode only."""
    find(facts)
    assert doctor(*arguments).exit_code == status


def test_output_for_people(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is a table on a terminal if rich is installed, and searchable lines otherwise."""
    find(TIGHT)
    lines = doctor().stdout.splitlines()
    assert [line for line in lines if " GPU " not in line][1:5] == [
        "ok       import torch         /torch/__init__.py, in 2 s",
        "ok       versions             Python 3.14, torch 2.13, compile-retry 0.1",
        "warning  cache directory      /c, 0.5 GiB free",
        "                              -> free some space, or set TORCHINDUCTOR_CACHE_DIR to another directory",
    ]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    table = doctor().stdout
    assert "┃" in table
    assert "/c, 0.5 GiB free" in table
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert sorted(doctor().stdout.splitlines()) == sorted(lines)


@pytest.mark.parametrize(
    ("name", "facts", "status", "detail"),
    [
        ("import torch", {"error": "ImportError: x"}, "failed", "ImportError: x"),
        ("import torch", {"path": None, "error": "ImportError: x"}, "failed", "ImportError: x"),
        ("import torch", {"path": "/t.py", "error": "OSError: x"}, "failed", "/t.py: OSError: x"),
        ("versions", {"error": "ImportError: x"}, "failed", "ImportError: x"),
        ("cache directory", {"error": "ImportError: x"}, "failed", "ImportError: x"),
        ("cache directory", {"path": "/c", "error": "full"}, "failed", "/c is not writable: full"),
        ("cache directory", {"path": "/c", "free": 2**29}, "warning", "/c, 0.5 GiB free"),
        ("C++ compiler", {"error": "OSError: [Errno 28] No space left on device"}, "failed", "OSError: [Errno 28] No"),
        ("C++ compiler", {"path": "g++", "error": "no omp.h"}, "failed", "g++: no omp.h"),
        ("vector instructions", {"error": "OSError"}, "failed", "OSError"),
        ("vector instructions", {"processor": ["a"], "found": [], "found elsewhere": ["a"]}, "failed", "none, but a"),
        ("vector instructions", {"processor": ["a"], "found": []}, "failed", "none, but the processor has a"),
        ("vector instructions", {"processor": ["a", "b"], "found": ["a"]}, "ok", "a (not b)"),
        ("compile", {"compiled": False}, "failed", "torch.compile ran the function eagerly"),
        ("GPU", {"error": "RuntimeError: no driver"}, "failed", "RuntimeError: no driver"),
        ("GPU", {"device": None, "built for": "13.0"}, "skipped", "not present; torch is built for 13.0"),
    ],
)
def test_findings(find: Find, name: str, facts: dict[str, Any], status: str, detail: str) -> None:
    """Each finding is judged, and described in one line."""
    find({name: facts})
    check = checks_of(doctor("--json").stdout)[name]
    assert check["status"] == status
    assert check["detail"].startswith(detail)


@pytest.mark.parametrize(
    ("facts", "elsewhere", "detail", "remedy"),
    [
        ({}, {"error": "OSError: lost"}, "; also fails in a new cache directory", ""),
        ({}, {"without headers": "/t/h"}, "; works without precompiled headers", "delete /t/h, or set TORCHIND"),
        ({}, {"compiled": True}, "; works in a new cache directory", "poisoned cache suspected: delete /c"),
        ({"compile": LOST}, {"compiled": True}, "; works in a new cache directory", "set TORCHINDUCTOR_CACHE_DIR to"),
        ({}, None, "", ""),
        ({"C++ compiler": LOST}, None, "", "see C++ compiler"),
    ],
)
def test_failed_compiles_are_repeated(find: Find, facts: Facts, elsewhere: Any, detail: str, remedy: str) -> None:
    """A failed compile is repeated in a new cache directory, and the outcome decides the remedy."""
    find({"cached compile": LOST, **facts}, elsewhere=elsewhere)
    check = examine(status=1)["cached compile"]
    assert (check["status"], check["detail"]) == ("failed", "OSError: lost" + detail)
    assert check["remedy"].startswith(remedy)
    assert bool(check["remedy"]) == bool(remedy)


def gpu_checks() -> dict[str, Any]:
    report = json.loads(doctor("--json").stdout)
    return {
        check["name"]: (check["status"], check["detail"]) for check in report["checks"] if check["name"] in GPU_NAMES
    }


def test_a_gpu(find: Find) -> None:
    """With a GPU there are five checks of it."""
    find(PRESENT)
    assert gpu_checks() == {
        "GPU": ("ok", "A, driver 580"),
        "GPU memory": ("ok", "64.0 of 128.0 GiB free"),
        "ptxas": ("ok", "/ptxas, release 12.8"),
        "Triton": ("ok", "Triton 3.7 compiled and ran a kernel in 2 s"),
        "GPU compile": ("ok", "forward and backward compiled in 1.2 s, results match eager"),
    }


@pytest.mark.parametrize(
    ("name", "facts", "status", "detail"),
    [
        ("GPU", {"device": "mps", "name": "M", "driver": ""}, "skipped", "M; only CUDA devices are checked further"),
        ("GPU memory", {"error": "no driver"}, "failed", "no driver"),
        ("GPU memory", {"free": 2**28, "total": 2**37}, "warning", "0.2 of 128.0 GiB free: autotuning allocates"),
        ("ptxas", {"path": "/ptxas", "error": "exit status 1"}, "failed", "/ptxas: exit status 1"),
        ("ptxas", {"error": "ImportError: no Triton"}, "failed", "ImportError: no Triton"),
        ("Triton", {"error": "ImportError: no Triton"}, "failed", "ImportError: no Triton"),
        ("GPU compile", {"error": "MemoryError"}, "failed", "MemoryError"),
    ],
)
def test_findings_on_a_gpu(find: Find, name: str, facts: dict[str, Any], status: str, detail: str) -> None:
    """Each finding is judged, and described in one line."""
    find({**PRESENT, name: facts})
    found = gpu_checks()[name]
    assert found[0] == status
    assert found[1].startswith(detail)


def test_a_gpu_check_that_takes_too_long(find: Find) -> None:
    """It is stopped and named, and those after it are skipped. The checks of the CPU are not affected."""
    finished = {name: PRESENT[name] for name in ("GPU", "GPU memory")}
    find({}, gpu=Findings(finished, "ptxas", "it took too long", timed_out=True))
    found = gpu_checks()
    assert found["ptxas"] == ("failed", "it took too long (limit: 60 s)")
    assert found["Triton"] == ("skipped", "because of ptxas")
    assert "failed   ptxas" in doctor().stdout
    assert "ok       cached compile" in doctor().stdout


def test_results_as_they_come(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check is printed when it has finished, before the next one has."""
    find({})
    printed = []
    ask: Any = vars(doctor_room)["ask"]

    def ask_and_look(mode: Any, seconds: float, tell: Any = None) -> Findings:
        def tell_and_look(name: str, facts: Any) -> None:
            tell(name, facts)
            output: Any = sys.stdout
            printed.append((name, f" {name} " in output.getvalue()))

        findings: Findings = ask(mode, seconds, tell_and_look)
        return findings

    monkeypatch.setattr(doctor_room, "ask", ask_and_look)
    doctor()
    assert sorted(printed) == sorted((name, True) for name in (*HEALTHY, "GPU"))


@pytest.mark.parametrize(
    ("until", "remedy", "gpu"),
    [
        ("C++ compiler", "run it by hand", "not present"),
        ("versions", "", "because of versions"),
        ("import torch", "run python -X importtime", "because of import torch"),
    ],
)
def test_out_of_time(find: Find, until: str, remedy: str, gpu: str) -> None:
    """At the time limit, the current step fails and the later ones are skipped."""
    find({}, until=until, stopped="it took too long", timed_out=True)
    checks = examine("--timeout", "50", status=1)
    assert (checks[until]["status"], checks[until]["detail"]) == ("failed", "it took too long (limit: 50 s)")
    assert checks[until]["remedy"].startswith(remedy)
    assert checks["cached compile"]["detail"] == f"because of {until}"
    assert (checks["GPU"]["status"], checks["GPU"]["detail"]) == ("skipped", gpu)


def test_an_end_before_the_limit(find: Find) -> None:
    """An error of the child's is told without the limit, whatever its words."""
    find({}, until="compile", stopped="the process ended with status 1: OSError: File name too long")
    assert examine("--timeout", "50", status=1)["compile"]["detail"].endswith("OSError: File name too long")


def test_compiling_is_disabled(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """If torch.compile is disabled, nothing is compiled, and the doctor fails."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    find({}, until="compile")
    checks = examine(status=1)
    assert checks["environment"]["detail"] == "TORCH_COMPILE_DISABLE=1: torch.compile does nothing"
    assert checks["C++ compiler"]["status"] == "ok"
    for name in ("compile", "cached compile", "GPU"):
        assert (checks[name]["status"], checks[name]["detail"]) == ("skipped", "TORCH_COMPILE_DISABLE=1 is set")


def test_variables_that_change_compiling(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that change how torch compiles are listed with their effects."""
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")
    monkeypatch.setenv("TORCH_COMPILE_DEBUG", "0")
    find({})
    check = examine(status=0)["environment"]
    effect = "TORCHINDUCTOR_VEC_ISA_OK=0: compiled code uses no vector instructions"
    assert (check["status"], check["detail"]) == ("warning", effect)


@pytest.mark.parametrize(
    ("value", "effects"),
    [
        ("off", "functions are compiled without a fallback"),
        ("strict", "failed compiles raise"),
        ("Strict, INSTALL", "failed compiles raise, whatever calls torch.compile gets a fallback"),
        ("install", "whatever calls torch.compile gets a fallback"),
        ("strikt", "not understood, so it is ignored"),
        ("yes", None),
        ("", None),
    ],
)
def test_operators_switches(find: Find, monkeypatch: pytest.MonkeyPatch, value: str, effects: str | None) -> None:
    """Each value of ``COMPILE_RETRY`` that has an effect is listed with it, and one that is misspelt."""
    monkeypatch.setenv("COMPILE_RETRY", value)
    find({})
    check = examine(status=0)["environment"]
    if effects is None:
        assert (check["status"], check["detail"]) == ("ok", "no variables that affect compilation")
    else:
        assert (check["status"], check["detail"]) == ("warning", f"COMPILE_RETRY={value}: {effects}")


@pytest.mark.parametrize("name", ["import torch", "versions"])
def test_a_torch_that_cannot_compile(find: Find, name: str) -> None:
    """If torch cannot be imported, or cannot compile at all, the other checks are skipped."""
    names = list(HEALTHY)
    find({name: {"error": "ImportError: x"}}, until=names[names.index(name) + 1])
    checks = examine(status=1)
    for later in (*names[names.index(name) + 1 :], "GPU"):
        assert (checks[later]["status"], checks[later]["detail"]) == ("skipped", f"because of {name}")


def test_a_compiler_that_the_environment_names(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """If CXX names a broken compiler, the remedy mentions CXX."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    find({"C++ compiler": LOST})
    assert "or correct CXX=no-such-compiler" in examine(status=1)["C++ compiler"]["remedy"]


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt ends the doctor with status 1."""

    def interrupt(mode: str, *args: object) -> Findings:
        if mode == "gpu":
            return Findings({}, "GPU", "it was not finished")
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_room, "ask", interrupt)
    result = doctor()
    assert (result.exit_code, result.stderr) == (1, "Aborted!\n")
    assert "compile" not in result.stdout.split()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["surgeon"], "invalid choice: 'surgeon' (choose from "),
        (["doctor", "--timeout", "soon"], "--timeout: must be a number of seconds, at least 1, not soon"),
        (["doctor", "--timeout", "0"], "--timeout: must be a number of seconds, at least 1, not 0"),
        (["doctor", "--timeout", "nan"], "--timeout: must be a number of seconds, at least 1, not nan"),
        (["doctor", "--timeout", "inf"], "--timeout: must be a number of seconds, at least 1, not inf"),
        (["doctor", "--time", "60"], "unrecognized arguments: --time 60"),
        (["doctor", "--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str) -> None:
    """On wrong usage nothing is checked, and the last line of the error says what is wrong."""
    result = command(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: python -m compile_retry ")
    assert said in result.stderr.splitlines()[-1]


def test_help() -> None:
    """The help lists commands, options with their defaults, and the exit status."""
    assert "doctor Check whether torch.compile works on this machine." in " ".join(command("--help").stdout.split())
    help_text = " ".join(doctor("--help").stdout.split())
    assert "--timeout SECONDS Time limit for the checks, at least 1 (default: 60)." in help_text
    assert "Exit status: 0 if no check failed, 1 if one did, 2 if the command line is invalid." in help_text


@pytest.mark.usefixtures("measured")
def test_version() -> None:
    """The option --version prints the package's version."""
    arguments = [sys.executable, "-m", "compile_retry", "--version"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == f"python -m compile_retry, version {version('compile-retry')}\n"
