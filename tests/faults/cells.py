"""Runs one cell of the fault matrix, in its own process and directory."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .faults import BY_NAME, Place

TIMEOUT = 240


@functools.cache
def can_mount() -> bool:
    """Return True if a tmpfs can be mounted. That needs root, and in some containers root is not enough."""
    place = tempfile.mkdtemp()
    try:
        mount = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False)
        if mount.returncode == 0:
            subprocess.run(["umount", "-l", place], check=True)
        return mount.returncode == 0
    except OSError:
        return False
    finally:
        Path(place).rmdir()


@contextmanager
def _place(tmpfs: str | None) -> Iterator[Place]:
    root = Path(tempfile.mkdtemp(prefix="fault_"))
    if tmpfs is not None:
        (root / tmpfs).mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(root / tmpfs)], check=True)
    try:
        (root / "tmp").mkdir()
        yield Place(root)
    finally:
        if tmpfs is not None:
            subprocess.run(["umount", "-l", str(root / tmpfs)], check=True)
        shutil.rmtree(root, ignore_errors=True)


def _run(place: Place, environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "faults.worker", *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TMPDIR": str(place.tmp),
        "TORCHINDUCTOR_CACHE_DIR": str(place.cache),
        # Saves 150 MB and some seconds per run.
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    # Inductor sets the second one when this process uses it.
    for name in ("COMPILE_RETRY", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        _, err = process.communicate()
        return {"outcome": "error", "error": f"hangs: no end after {TIMEOUT} s", "log": err[-6000:]}
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    lines = out.strip().splitlines()
    if process.returncode != 0 or not lines or not lines[-1].startswith("{"):
        return {"outcome": "error", "error": f"the process ended with {process.returncode}", "log": err[-6000:]}
    answer: dict[str, Any] = json.loads(lines[-1])
    return {**answer, "log": err[-6000:]} if answer["outcome"] == "error" else answer


@functools.cache
def _healthy() -> tuple[Path, list[str]]:
    """Probe the compiler in a healthy process. Return its cache directory and the instruction sets found."""
    root = Path(tempfile.mkdtemp(prefix="healthy_"))
    (root / "tmp").mkdir()
    answer = _run(Place(root), {}, "instruction sets")
    return root / "cache", answer["instruction_sets"]


def clean_up() -> None:
    if _healthy.cache_info().currsize:
        shutil.rmtree(_healthy()[0].parent, ignore_errors=True)
        _healthy.cache_clear()


def run_cell(name: str, position: str, policy: str = "every call", *, probed: bool | None = None) -> dict[str, Any]:
    """Run one cell and return its outcome.

    Args:
        name: The fault.
        position: The compile that it hits.
        policy: The retry policy.
        probed: Whether the cache contains the results of Inductor's compiler probes from the start, which saves ten
            seconds. By default it does if the fault begins after the probes.
    """
    fault = BY_NAME[name]
    started = time.monotonic()
    answers, instruction_sets = _healthy()
    with _place(fault.tmpfs) as place:
        environment = dict(fault.environment)
        if fault.script:
            environment["CXX"] = str(place.script.path)
        if position != "first call" if probed is None else probed:
            shutil.copytree(answers, place.cache, dirs_exist_ok=True)
        if fault.populate:
            _run(place, environment, "populate")
        answer = _run(place, environment, "cell", str(place.root), name, position, policy, json.dumps(instruction_sets))
    return {
        "fault": name,
        "position": position,
        "policy": policy,
        "seconds": round(time.monotonic() - started, 1),
        **answer,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_cell(*sys.argv[1:]), indent=1) + "\n")
    clean_up()
