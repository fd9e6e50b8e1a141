"""Runs of ``python -m compile_retry doctor``, in this process."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compile_retry.__main__ import main

NAMES = [
    "environment",
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
    """Unset what changes how torch compiles, or how the command prints."""
    for variable in os.environ:
        if variable.startswith(("TORCH", "ATEN_", "COMPILE_RETRY_")):
            monkeypatch.delenv(variable)
    for variable in ("CXX", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)


def doctor(*arguments: str) -> Result:
    """Run the command, which leaves the environment alone."""
    before = dict(os.environ)
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert dict(os.environ) == before
    return result


def checks_of(output: str) -> dict[str, dict[str, Any]]:
    """Read what it has printed as JSON: all checks, in their order."""
    report = json.loads(output)
    assert [check["name"] for check in report["checks"]] == NAMES
    return {check["name"]: check for check in report["checks"]}


def examine(*arguments: str, status: int) -> dict[str, dict[str, Any]]:
    """Run the command, which ends with this status, and read its checks."""
    result = doctor("--json", *arguments)
    assert result.exit_code == status, result.output
    assert json.loads(result.stdout)["ok"] is (status == 0)
    return checks_of(result.stdout)
