"""``python -m compile_retry doctor`` with made-up findings: its judgement, its output and its exit status.

The findings of real faults are in test_doctor_on_real_faults.py. A disk that gets full at that very moment, or a
processor that lacks something, is more than a test can make.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
from doctor_command import Result, checks_of, command, doctor, examine, forget_variables

from compile_retry._doctor import checks as doctor_room
from compile_retry._doctor.process import Findings

Facts = dict[str, dict[str, Any]]
Find = Callable[..., None]

COMPILED = {"compiled": True, "from cache": False, "seconds": 1.2}
HEALTHY: Facts = {
    "versions": {"python": "3.14", "torch": "2.13", "compile_retry": "0.1"},
    "cache directory": {"path": "/c", "free": 2**40},
    "temporary directory": {"path": "/t", "free": 2**40},
    "C++ compiler": {"path": "g++", "version": "g++ 14"},
    "vector instructions": {"processor": ["a"], "found": ["a"]},
    "compile": COMPILED,
    "cached compile": {**COMPILED, "from cache": True},
    "GPU": {"device": None, "built for": ""},
}
TIGHT: Facts = {"cache directory": {"path": "/c", "free": 2**29}}
LOST = {"error": "OSError: lost"}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_variables(monkeypatch)


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Find:
    """Has a healthy machine found, except for these facts, up to a step that is not finished."""

    def find(
        facts: Facts, *, until: str | None = None, stopped: str = "", timed_out: bool = False, elsewhere: Any = None
    ) -> None:
        names = list(HEALTHY)
        reached = names[: names.index(until)] if until else names
        finished = {name: HEALTHY[name] for name in reached} | facts
        usual = Findings(finished, until if stopped else None, stopped, timed_out)
        in_new_directory = Findings(
            {"elsewhere": elsewhere} if elsewhere else {}, None, "it took too long", timed_out=True
        )
        monkeypatch.setattr(doctor_room, "ask", lambda mode, _: in_new_directory if mode == "elsewhere" else usual)

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
    """Lines that can be searched; on a terminal a table, where rich is installed."""
    find(TIGHT)
    lines = doctor().stdout.splitlines()
    assert lines[1:4] == [
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
    assert doctor().stdout.splitlines() == lines


@pytest.mark.parametrize(
    ("name", "facts", "status", "detail"),
    [
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
        ("GPU", {"device": "cuda", "name": "A", "triton": None, "triton works": False}, "failed", "A: Triton is not"),
        (
            "GPU",
            {"device": "cuda", "name": "A", "triton": "3", "triton works": False},
            "failed",
            "A: Triton 3 does not",
        ),
        ("GPU", {"device": "cuda", "name": "A", "triton works": True, "error": "MemoryError"}, "failed", "A: Memory"),
    ],
)
def test_findings(find: Find, name: str, facts: dict[str, Any], status: str, detail: str) -> None:
    """Each is judged and told in a line."""
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
def test_causes(find: Find, facts: Facts, elsewhere: Any, detail: str, remedy: str) -> None:
    """A compile that failed is made in a new cache directory too, and what comes of it tells what to do."""
    find({"cached compile": LOST, **facts}, elsewhere=elsewhere)
    check = examine(status=1)["cached compile"]
    assert (check["status"], check["detail"]) == ("failed", "OSError: lost" + detail)
    assert check["remedy"].startswith(remedy)
    assert bool(check["remedy"]) == bool(remedy)


@pytest.mark.parametrize(("until", "remedy"), [("C++ compiler", "run it by hand"), ("versions", "")])
def test_out_of_time(find: Find, until: str, remedy: str) -> None:
    """The step that took too long is to blame, and those behind it were not reached."""
    find({}, until=until, stopped="it took too long", timed_out=True)
    checks = examine("--timeout", "50", status=1)
    assert (checks[until]["status"], checks[until]["detail"]) == ("failed", "it took too long (limit: 50 s)")
    assert checks[until]["remedy"].startswith(remedy)
    assert checks["GPU"]["detail"] == f"skipped because of {until}"


def test_an_end_before_the_limit(find: Find) -> None:
    """An error of the child's is told without the limit, whatever its words."""
    find({}, until="compile", stopped="the process ended with status 1: OSError: File name too long")
    assert examine("--timeout", "50", status=1)["compile"]["detail"].endswith("OSError: File name too long")


def test_compiling_is_disabled(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is compiled, and that is a failure."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    find({}, until="compile")
    checks = examine(status=1)
    assert checks["environment"]["detail"] == "TORCH_COMPILE_DISABLE=1: torch.compile does nothing"
    assert checks["C++ compiler"]["status"] == "ok"
    for name in ("compile", "cached compile", "GPU"):
        assert (checks[name]["status"], checks[name]["detail"]) == ("skipped", "TORCH_COMPILE_DISABLE=1 is set")


def test_variables_that_change_compiling(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named, with their effect."""
    monkeypatch.setenv("COMPILE_RETRY_STRICT", "1")
    find({})
    check = examine(status=0)["environment"]
    assert (check["status"], check["detail"]) == ("warning", "COMPILE_RETRY_STRICT=1: failed compiles raise")


def test_a_torch_that_cannot_compile(find: Find) -> None:
    """Nothing else is checked, which would only say so again."""
    find({"versions": {"error": "ImportError: x"}}, until="cache directory")
    assert examine(status=1)["C++ compiler"]["detail"] == "skipped because of versions"


def test_a_compiler_that_the_environment_names(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy names it."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    find({"C++ compiler": LOST})
    assert "or correct CXX=no-such-compiler" in examine(status=1)["C++ compiler"]["remedy"]


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit status says that the machine has not been found healthy."""

    def interrupt(*args: object) -> Findings:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_room, "ask", interrupt)
    assert doctor() == Result(1, "", "Aborted!\n")


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
    """Nothing is checked, and the last line says what is wrong."""
    result = command(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: python -m compile_retry ")
    assert said in result.stderr.splitlines()[-1]


def test_help() -> None:
    """The commands; the options with their defaults, and the exit status."""
    assert "doctor Check whether torch.compile would work here." in " ".join(command("--help").stdout.split())
    told = " ".join(doctor("--help").stdout.split())
    assert "--timeout SECONDS End the checks after this time, at least 1 (default: 180)." in told
    assert "Exit status: 0 if it would, 1 if a check failed, 2 if the command itself is wrong." in told


@pytest.mark.usefixtures("measured")
def test_its_version() -> None:
    """It is that of the package."""
    arguments = [sys.executable, "-m", "compile_retry", "--version"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == f"python -m compile_retry, version {version('compile-retry')}\n"
