"""Helpers that run ``python -m compile_retry`` in this process."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import pytest

from compile_retry.__main__ import main

NAMES = [
    "environment",
    "import torch",
    "versions",
    "cache directory",
    "temporary directory",
    "C++ compiler",
    "vector instructions",
    "compile",
    "cached compile",
    "GPU",
]


def forget_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset variables that affect torch's compiler or the command's output."""
    for variable in os.environ:
        if variable.startswith(("TORCH", "ATEN_", "COMPILE_RETRY")):
            monkeypatch.delenv(variable)
    for variable in ("CXX", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)


@dataclass
class Result:
    exit_code: int | str | None
    stdout: str
    stderr: str


def command(*arguments: str) -> Result:
    """Run a command. It must not change the environment."""
    before, out, err = dict(os.environ), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status: int | str | None = main(arguments)
        except SystemExit as end:
            status = end.code
    assert dict(os.environ) == before
    return Result(status, out.getvalue(), err.getvalue())


def doctor(*arguments: str) -> Result:
    """Run the doctor."""
    return command("doctor", *arguments)


def checks_of(output: str) -> dict[str, dict[str, Any]]:
    """Parse the JSON output. It must contain all checks, in order."""
    report = json.loads(output)
    assert [check["name"] for check in report["checks"]] == NAMES
    return {check["name"]: check for check in report["checks"]}


def examine(*arguments: str, status: int) -> dict[str, dict[str, Any]]:
    """Run the doctor, which must exit with this status, and return its checks."""
    result = doctor("--json", *arguments)
    assert result.exit_code == status, result
    assert json.loads(result.stdout)["ok"] is (status == 0)
    return checks_of(result.stdout)
