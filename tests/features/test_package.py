"""What is in reach after ``import compile_retry``."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

import compile_retry
from compile_retry.__main__ import main

SUBMODULES = """
import sys
import torch

before = set(sys.modules)
import compile_retry

added = set(sys.modules) - before
assert not {"compile_retry.testing", "compile_retry.plotting", "importlib.metadata"} & added, added
assert not [name for name in added if name.startswith("torch.")], added
assert compile_retry.events.Event and compile_retry.instrumentation.active
assert {"__version__", "events", "plotting", "report", "testing"} <= set(dir(compile_retry))
assert compile_retry.testing.FakeClock(3)() == 3
assert compile_retry.plotting.plot_timeline
assert {"compile_retry.testing", "compile_retry.plotting"} <= set(sys.modules)
compile_retry.compile_with_fallback(dynamic=True, policy=compile_retry.RetryPolicy(wait=1.0))(lambda x: x)
assert not {"torch._dynamo", "matplotlib", "pytest", "rich"} & set(sys.modules)
"""


@pytest.mark.usefixtures("measured")
def test_submodules() -> None:
    """They need no import of their own, and neither they nor a decoration import the compiler or an extra."""
    subprocess.run([sys.executable, "-c", SUBMODULES], check=True, timeout=300)


def test_the_version() -> None:
    """It is that of the installed distribution."""
    assert compile_retry.__version__ == version("compile-retry")


def test_a_copy_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no version, and the command line works all the same."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("compile_retry._version.version", missing)
    assert compile_retry.__version__ == "0+unknown"
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, "python -m compile_retry, version 0+unknown\n")


def test_an_unknown_attribute() -> None:
    """Raises as in any other module."""
    with pytest.raises(AttributeError, match="module 'compile_retry' has no attribute 'polcy'"):
        compile_retry.polcy  # type: ignore[attr-defined]  # noqa: B018  # it must raise
