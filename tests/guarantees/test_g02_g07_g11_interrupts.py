"""G2, G7 and G11 under Ctrl-C: a real SIGINT in the middle of an attempt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from support import Compiler, first, full_disk, moments, rows

X = torch.ones(3)
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
SECONDS = 20.0


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


class CtrlC:
    """Sends a real SIGINT to this process the next time an armed place is passed."""

    def __init__(self) -> None:
        self.armed = ""
        self.passes = 0

    def passed(self, place: str, after: int = 0) -> None:
        if self.armed == place:
            self.passes += 1
            if self.passes > after:
                self.armed = ""
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("place", ["backend 1", "backend 2", "tracing", "between graphs"])
@pytest.mark.parametrize("failures", [0, 1, 2])
def test_an_interrupt(place: str, failures: int) -> None:
    """An interrupt of an attempt reaches the caller, the next call attempts, and everything is compiled in the end."""
    ctrl_c = CtrlC()
    asked = failed = 0

    def traced() -> int:
        ctrl_c.passed("tracing")
        return 2

    constant = torch.compiler.assume_constant_result(traced)
    pause = torch.compiler.disable(lambda: ctrl_c.passed("between graphs"))

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x.sin().mul(constant())
        pause()
        return y.cos()

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal asked, failed
        ctrl_c.passed(f"backend {2 if 'cos' in gm.code else 1}")
        asked += 1
        if failed < failures:
            failed += 1
            raise full_disk()
        return gm.forward

    fn = compile_with_fallback(step, backend=backend, policy=EVERY_CALL)
    expected = (X.sin() * 2).cos()
    for _ in range(failures):
        torch.testing.assert_close(fn(X), expected)
    ctrl_c.armed = place
    with pytest.raises(KeyboardInterrupt):
        [fn(X) for _ in range(3)]  # a retry may reach the second graph one call later
    assert fn.stats.failures == failures
    assert fn.state is not CompileState.GAVE_UP
    for _ in range(4):
        torch.testing.assert_close(fn(X), expected)
    stats = fn.stats
    fn(X)
    assert (fn.state, fn.next_retry, fn.stats.compiled_calls) == (
        CompileState.COMPILED,
        None,
        stats.compiled_calls + 1,
    )
    assert (stats.attempts, stats.failures, stats.recoveries) == (asked, failures, min(failures, 1))


@pytest.mark.parametrize("after", range(4))
def test_an_interrupt_while_the_policy_is_evaluated(after: int) -> None:
    """After an interrupt at any reading of the clock, any thread can make the due call, and the function recovers."""
    ctrl_c = CtrlC()

    def clock() -> float:
        ctrl_c.passed("clock", after)
        return 0.0

    fn = compile_with_fallback(sine, backend=Compiler(first(1)), policy=RetryPolicy(wait=0, clock=clock))
    fn(X)
    ctrl_c.armed = "clock"
    with pytest.raises(KeyboardInterrupt):
        fn(X)
    other = threading.Thread(target=lambda: [fn(X) for _ in range(2)])
    other.start()
    other.join(SECONDS)
    assert not other.is_alive()
    assert (fn.state, fn.stats.failures, fn.stats.recoveries) == (CompileState.COMPILED, 1, 1)


def test_an_interrupt_of_a_due_call() -> None:
    """After an interrupt at any moment, no thread may attempt once another thread's attempt has failed."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    for moment in moments():
        compiler = Compiler(rows(4))
        policy = RetryPolicy(wait=None, wait_calls=lambda state: 1 if state.attempt_number == 1 else 100)
        fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=policy)
        fn(X), fn(torch.ones(4))
        with suppress(KeyboardInterrupt), moment.doing(interrupt):
            fn(X)
        other = threading.Thread(target=fn, args=(torch.ones(4),))
        other.start()
        other.join()
        for n in (4, 5):
            torch.testing.assert_close(fn(torch.ones(n)), torch.ones(n).sin())
        assert (compiler.asked, fn.stats.failures) == (3, 2)


def test_an_interrupt_leaves_other_threads_alone() -> None:
    """If the main thread is interrupted in its retry, another thread's calls continue, and may recover the function."""
    ctrl_c, other_done = CtrlC(), threading.Event()

    def fails(inputs: list[Any]) -> Exception | None:
        if threading.current_thread() is threading.main_thread():
            ctrl_c.passed("backend")
        return None if other_done.is_set() or ctrl_c.passes else full_disk()

    def work() -> None:
        for _ in range(3):
            assert interrupted.wait(SECONDS)
            torch.testing.assert_close(fn(X), X.sin())
        other_done.set()

    fn = compile_with_fallback(sine, backend=Compiler(fails), policy=EVERY_CALL)
    interrupted = threading.Event()
    fn(X)
    other = threading.Thread(target=work)
    other.start()
    ctrl_c.armed = "backend"
    with pytest.raises(KeyboardInterrupt):
        fn(X)
    interrupted.set()
    other.join(SECONDS)
    assert other_done.is_set()
    assert (fn.state, fn.stats.calls, fn.stats.failures, fn.stats.recoveries) == (CompileState.COMPILED, 5, 1, 1)


# It hangs while the file `slow` exists. A Ctrl-C at the terminal, after which `slow` is gone, reaches the compiler too.
SLOW_COMPILER = """#!/bin/sh
if [ -e {folder}/slow ]; then
    touch {folder}/started
    while [ -e {folder}/slow ]; do sleep 0.1; done
    exit 130
fi
exec c++ "$@" -O0
"""

INTERRUPTED = """
import json, os, signal, sys, threading, time
from pathlib import Path
import torch
from compile_retry import RetryPolicy, compile_with_fallback
from compile_retry.testing import fail_compiles

started, slow = Path(sys.argv[1], "started"), Path(sys.argv[1], "slow")

def press():
    while not started.exists():
        time.sleep(0.01)  # for the compiler, another process: this file is all that tells of it
    os.kill(os.getpid(), signal.SIGINT)
    slow.unlink()

def interrupted(when, x):
    fn = compile_with_fallback(lambda x: x.sin() * len(when), policy=RetryPolicy(wait=None, wait_calls=1))
    if when == "retry":
        with fail_compiles(OSError):
            fn(x)
    slow.touch()
    started.unlink(missing_ok=True)
    threading.Thread(target=press, daemon=True).start()
    interrupts = 0
    try:
        fn(x)
    except KeyboardInterrupt:
        interrupts += 1
    before = fn.stats
    for _ in range(3):
        torch.testing.assert_close(fn(x), x.sin() * len(when))
    stats = fn.stats
    return interrupts, fn.state.value, stats.compiled_calls - before.compiled_calls, stats.calls, stats.failures

# The compiler has been probed once the second of them is run; a retry probes it again.
print(json.dumps({when: interrupted(when, torch.ones(8)) for when in ("first probe", "kernel", "retry")}))
"""


@pytest.mark.long
def test_an_interrupt_while_inductor_waits_for_its_compiler(tmp_path: Path) -> None:
    """After a real Ctrl-C during a slow compile, the next call compiles, and all later calls run compiled code."""
    compiler, script = tmp_path / "slow-c++", tmp_path / "script.py"
    compiler.write_text(SLOW_COMPILER.format(folder=tmp_path))
    compiler.chmod(0o755)
    script.write_text(INTERRUPTED)
    environment = {
        **os.environ,
        "CXX": str(compiler),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",  # 150 MB
    }
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    # Interrupts, the state, compiled calls after the interrupts, all calls, and failures.
    assert json.loads(done.stdout) == {
        "first probe": [1, "compiled", 3, 4, 0],
        "kernel": [1, "compiled", 3, 4, 0],
        "retry": [1, "compiled", 3, 5, 1],
    }
