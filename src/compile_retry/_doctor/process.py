"""The doctor's child process: run it with a time limit, and end it with all processes that it has started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

# Seconds that terminated processes get to remove their temporary files.
_GRACE = 3.0


@dataclass(frozen=True)
class Findings:
    """The output of a child.

    Attributes:
        facts: The facts found by each finished step, by its name.
        during: The step in which the child ended; None if it finished.
        stopped: The reason why it ended early, in words.
        timed_out: Whether the reason is the time limit.
    """

    facts: dict[str, dict[str, Any]]
    during: str | None
    stopped: str
    timed_out: bool = False


def ask(mode: Literal["look", "compile", "elsewhere"], seconds: float) -> Findings:
    """Run the child in this mode, for at most this many seconds."""
    parent, alive = os.pipe()  # closed when this process is gone, even if it is killed
    try:
        process = subprocess.Popen(  # noqa: S603  # this package's own module
            [sys.executable, "-m", "compile_retry._doctor.child", mode],
            stdin=parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # compilers and workers are in its process group
        )
        output, stopped, timed_out = _outcome(process, seconds)
    finally:
        os.close(parent)
        os.close(alive)
    return Findings(*_read(output), stopped, timed_out)


def _outcome(process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, str, bool]:
    """Wait for the child. Return its output, the reason why it ended early, and whether that is the time limit."""
    try:
        output, errors = process.communicate(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return _end(process), "it took too long", True
    except BaseException:
        _end(process)
        raise
    if process.returncode:
        _signal(process, signal.SIGTERM)
        return output, _describe_exit(process.returncode, errors), False
    return output, "", False


def _end(process: subprocess.Popen[bytes]) -> bytes:
    """End the child's process group and return its output. Do not wait for a process that cannot be killed."""
    output = b""
    for number in (signal.SIGTERM, _KILL):
        _signal(process, number)
        if process.returncode is None:
            try:
                output, _ = process.communicate(timeout=_GRACE)
            except subprocess.TimeoutExpired as exc:
                output = exc.output or b""
    return output


if sys.platform == "win32":
    _KILL = signal.SIGTERM

    def _signal(process: subprocess.Popen[bytes], number: int) -> None:
        process.kill()

else:
    _KILL = signal.SIGKILL

    def _signal(process: subprocess.Popen[bytes], number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for processes that have ended
            os.killpg(process.pid, number)


def _describe_exit(status: int, errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    if status < 0:
        return f"the process was killed by signal {-status} ({signal.strsignal(-status)})"
    return f"the process ended with status {status}" + (f": {lines[-1][:300]}" if lines else "")


def _read(output: bytes) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Return the facts, and the step that has none because the child ended in it."""
    facts: dict[str, dict[str, Any]] = {}
    during = None
    for line in _lines(output):
        if "facts" in line:
            facts[line["step"]] = line["facts"]
            during = None
        else:
            during = line["step"]
    return facts, during


def _lines(output: bytes) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        with suppress(ValueError):  # cut short
            yield json.loads(line)
