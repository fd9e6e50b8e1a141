"""G16: a healthy first compile starts the same processes as stock ``torch.compile``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = """#!/bin/sh
echo "$@" | tr ' ' '\\n' | grep -v / | tr '\\n' ' ' >>{log}
echo >>{log}
exec g++ "$@"
"""
PROGRAM = """
import sys, torch
from compile_retry import CompileState, compile_with_fallback
started = []
sys.addaudithook(lambda event, args: event == "subprocess.Popen" and started.append(args[0]))
compile, which = sys.argv[1:]
fn = {
    "a kernel": lambda x, scale: scale * x.sin() + x.exp(),
    "no kernel": lambda x, scale: x @ x,
}[which]
fn = (compile_with_fallback if compile == "ours" else torch.compile)(fn, dynamic=True)
fn(torch.ones(8, 8), torch.tensor(2.0))
if compile == "ours":
    assert (fn.state, fn.stats.failures) == (CompileState.COMPILED, 0)
print(started)
"""


def processes(folder: Path, compile_with: str, which: str) -> tuple[str, list[str]]:
    """Compile in a fresh process with an empty cache. Return the processes that it started, and the compiler's runs."""
    folder.mkdir()
    compiler, log = folder / "g++", folder / "log"
    compiler.write_text(COMPILER.format(log=log))
    compiler.chmod(0o755)
    log.touch()
    environment = {
        **os.environ,
        "CXX": str(compiler),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }
    command = [sys.executable, "-c", PROGRAM, compile_with, which]
    done = subprocess.run(command, env=environment, check=True, timeout=600, stdout=subprocess.PIPE, text=True)
    return done.stdout.replace(str(folder), ""), log.read_text().splitlines()


@pytest.mark.long
def test_a_kernel_for_the_cpu(tmp_path: Path) -> None:
    """The compiler is run as often as by stock, with the same options, probes for vector instructions included."""
    stock, runs = processes(tmp_path / "stock", "stock", "a kernel")
    ours, our_runs = processes(tmp_path / "ours", "ours", "a kernel")
    assert runs
    assert our_runs == runs
    assert ours == stock


@pytest.mark.long
def test_no_kernel_for_the_cpu(tmp_path: Path) -> None:
    """A graph that needs no C++ kernel starts no C++ compiler, even if there are CPU tensors among its inputs."""
    stock, runs = processes(tmp_path / "stock", "stock", "no kernel")
    ours, our_runs = processes(tmp_path / "ours", "ours", "no kernel")
    assert our_runs == runs == []
    assert ours == stock
