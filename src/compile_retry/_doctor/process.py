"""The doctor's child process: run it with a time limit, and end it with all processes that it has started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

# Takes the name of a step that has finished, and its facts.
Tell: TypeAlias = Callable[[str, dict[str, Any]], None]

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


def _ignore(name: str, facts: dict[str, Any]) -> None:
    """Do nothing."""


def ask(mode: Literal["look", "compile", "elsewhere", "gpu"], seconds: float, tell: Tell = _ignore) -> Findings:
    """Run the child in this mode, for at most this many seconds.

    Args:
        mode: Determines the child's steps.
        seconds: The time limit.
        tell: Called with a step's name and facts when it finishes, from another thread.
    """
    parent, alive = os.pipe()  # closed when this process is gone, even if it is killed
    reading, writing = os.pipe()
    lines: list[bytes] = []
    reader = threading.Thread(target=_collect, args=(reading, lines, tell), daemon=True)
    try:
        process = subprocess.Popen(  # noqa: S603  # this package's own module
            [sys.executable, "-m", "compile_retry._doctor.child", mode],
            stdin=parent,
            stdout=writing,
            stderr=subprocess.PIPE,
            start_new_session=True,  # compilers and workers are in its process group
        )
        os.close(writing)
        reader.start()
        stopped, timed_out = _outcome(process, seconds)
        reader.join(_GRACE)
    finally:
        os.close(parent)
        os.close(alive)
    return Findings(*_read(lines), stopped, timed_out)


def _collect(reading: int, lines: list[bytes], tell: Tell) -> None:
    """Collect the child's lines until it ends."""
    with open(reading, "rb") as output:
        for line in output:
            lines.append(line)
            for parsed in _parsed([line]):
                if "facts" in parsed:
                    tell(parsed["step"], parsed["facts"])


def _outcome(process: subprocess.Popen[bytes], seconds: float) -> tuple[str, bool]:
    """Wait for the child. Return the reason why it ended early, and whether that is the time limit."""
    try:
        _, errors = process.communicate(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        _end(process)
        return "it took too long", True
    except BaseException:
        _end(process)
        raise
    if process.returncode:
        _signal(process, signal.SIGTERM)
        return _describe_exit(process.returncode, errors), False
    return "", False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child's process group. Do not wait for a process that cannot be killed."""
    for number in (signal.SIGTERM, _KILL):
        _signal(process, number)
        if process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_GRACE)


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


def _read(lines: list[bytes]) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Return the facts, and the step that has none because the child ended in it."""
    facts: dict[str, dict[str, Any]] = {}
    during = None
    for line in _parsed(lines):
        if "facts" in line:
            facts[line["step"]] = line["facts"]
            during = None
        else:
            during = line["step"]
    return facts, during


def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):  # cut short
            yield json.loads(line)
