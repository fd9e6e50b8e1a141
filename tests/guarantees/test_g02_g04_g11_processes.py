"""G2, G4 and G11 across processes: forked and spawned children, at any moment of the parent."""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.data

import module_level
from compile_retry import CompiledFunction, CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import FakeClock, fail_compiles
from support import Compiler, first, full_disk

# Python's warning, since 3.12, describes exactly the situation under test.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")

X = torch.ones(3)
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
HELD_OFF = RetryPolicy(wait=10, clock=FakeClock())
SECONDS = 20.0
HANGS = 5

Function = CompiledFunction[[torch.Tensor], torch.Tensor]


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def in_child(work: Callable[[], Any], seconds: int = HANGS) -> Any:
    """Return the result of `work` in a forked child. The child is killed after the time limit."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            os.write(writer, pickle.dumps(work()))
        except BaseException as exc:
            os.write(writer, pickle.dumps(repr(exc)))
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], seconds + SECONDS)
        answer = os.read(reader, 1 << 16) if ready else b""
    finally:
        os.close(reader)
        os.waitpid(pid, 0)
    assert answer, "the child hung"
    return pickle.loads(answer)


class Elsewhere:
    """A thread that waits at a gate inside the library while the main thread forks."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._inside, self._go_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=work)

    def gate(self) -> None:
        if threading.current_thread() is self._thread:
            self._inside.set()
            assert self._go_on.wait(SECONDS)

    def __enter__(self) -> None:
        self._thread.start()
        assert self._inside.wait(SECONDS)

    def __exit__(self, *exc_info: object) -> None:
        self._go_on.set()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Four items, each computed by a decorated function, which also collates them."""

    def __init__(self, fn: Function) -> None:
        self._fn = fn

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"value": self._fn(torch.full((3,), float(index)))}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        value = self._fn(torch.stack([item["value"] for item in items]))
        return {"value": value, "pid": os.getpid(), "stats": self._fn.stats, "state": self._fn.state}


def load(fn: Function, context: str) -> list[dict[str, Any]]:
    rows = Rows(fn)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, num_workers=1, collate_fn=rows.collate, timeout=60, multiprocessing_context=context
    )
    return list(loader)


def assert_loaded(batches: list[dict[str, Any]], eager: Callable[[torch.Tensor], torch.Tensor]) -> None:
    rows = [eager(torch.full((3,), float(index))) for index in range(4)]
    for batch, expected in zip(batches, (rows[:2], rows[2:]), strict=True):
        torch.testing.assert_close(batch["value"], eager(torch.stack(expected)))
        assert batch["pid"] != os.getpid()


@pytest.mark.parametrize("before", ["nothing", "success", "failure, then due", "failure, held off"])
def test_data_loader_workers_that_are_forked(before: str) -> None:
    """Workers continue from the parent's state with correct results, and count and attempt on their own."""
    compiler = Compiler(first(1) if before.startswith("failure") else lambda inputs: None)
    policy = RetryPolicy(wait=None, wait_calls=2) if before == "failure, then due" else HELD_OFF
    fn = compile_with_fallback(sine, backend=compiler, policy=policy)
    if before != "nothing":
        fn(X)
    parent = fn.stats, fn.state
    batches = load(fn, "fork")
    assert_loaded(batches, sine)
    stats = batches[-1]["stats"]
    assert (stats.calls - fn.stats.calls, stats.failures) == (6, fn.stats.failures)
    if before == "failure, held off":
        assert (stats.attempts, batches[-1]["state"]) == (fn.stats.attempts, CompileState.FALLBACK)
    else:
        assert stats.compiled_calls > fn.stats.compiled_calls
        assert batches[-1]["state"] is CompileState.COMPILED
    assert (fn.stats, fn.state) == parent


def test_a_loader_inside_a_decorated_function() -> None:
    """Workers that are forked in the middle of a retry end up compiled, and so does the parent."""
    inner = compile_with_fallback(sine, backend=Compiler(first(1)), policy=EVERY_CALL)
    inner(X)
    loaded: list[dict[str, Any]] = []

    def read() -> None:
        loaded[:] = load(inner, "fork")

    def epoch(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch.compiler.disable(read)()
        return y.cos()

    outer = compile_with_fallback(epoch, backend=Compiler(first(1)), policy=EVERY_CALL)
    for _ in range(3):
        torch.testing.assert_close(outer(X), X.sin().cos())
    assert_loaded(loaded, sine)
    assert loaded[-1]["state"] is outer.state is CompileState.COMPILED
    assert inner.stats.calls == 1


def test_data_loader_workers_that_are_spawned() -> None:
    """A decorated function passed by reference starts from scratch in a spawned process."""
    with fail_compiles(OSError, function="double"):
        module_level.double(X)
    parent = module_level.double.stats, module_level.double.state
    batches = load(module_level.double, "spawn")
    assert_loaded(batches, lambda x: 2 * x)
    assert batches[-1]["state"] is CompileState.COMPILED
    assert (batches[-1]["stats"].calls, batches[-1]["stats"].failures) == (6, 0)
    assert (module_level.double.stats, module_level.double.state) == parent
    module_level.double.reset()


def calls(fn: Function, *shapes: int) -> Callable[[], tuple[bool, CompileState]]:
    """Return, from a child, if all results are correct, and the function's state."""

    def work() -> tuple[bool, CompileState]:
        xs = [torch.ones(n) for n in shapes]
        return all(torch.equal(fn(x), x.sin()) for x in xs), fn.state

    return work


def test_forked_while_another_thread_is_in_the_backend() -> None:
    """In the child, compiled code runs compiled, and held-off code runs eagerly."""

    def fails(inputs: list[Any]) -> Exception | None:
        elsewhere.gate()
        return full_disk() if inputs[0].shape[0] == 4 else None

    fn = compile_with_fallback(
        sine, backend=Compiler(fails), dynamic=False, policy=RetryPolicy(wait=None, wait_calls=4)
    )
    elsewhere = Elsewhere(lambda: fn(torch.ones(5)))
    fn(X)
    with elsewhere:
        assert in_child(calls(fn, 3, 3)) == (True, CompileState.COMPILED)
    fn(torch.ones(4))
    fn(X), fn(X), fn(X)
    elsewhere = Elsewhere(lambda: fn(torch.ones(4)))
    with elsewhere:
        assert in_child(calls(fn, 3, 4, 5, 3, 4)) == (True, CompileState.FALLBACK)
    assert (fn.stats.failures, fn.stats.calls) == (2, 7)


def test_forked_while_another_thread_is_in_the_backend_and_a_new_shape() -> None:
    """The child compiles the new shape. With stock torch.compile it would wait forever for a lock that nobody holds."""

    def fails(inputs: list[Any]) -> None:
        if os.getpid() == parent:
            elsewhere.gate()

    parent = os.getpid()
    fn = compile_with_fallback(sine, backend=Compiler(fails), dynamic=False)
    elsewhere = Elsewhere(lambda: fn(X))
    with elsewhere:
        assert in_child(calls(fn, 5, 5)) == (True, CompileState.COMPILED)


def test_forked_while_another_thread_runs_its_retry() -> None:
    """The child does not wait for the probe, whose thread does not exist there."""

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        torch.compiler.disable(elsewhere.gate)()
        return y.sin()

    fn = compile_with_fallback(step, backend=Compiler(first(1)), policy=EVERY_CALL)
    elsewhere = Elsewhere(lambda: fn(X))
    fn(X)
    with elsewhere:
        assert in_child(calls(fn, 3, 3, 3, 3)) == (True, CompileState.COMPILED)
    assert fn.stats.calls == 2


def test_forked_while_another_thread_is_in_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's first call is inside torch.compile(); the child makes its own."""
    stock = torch.compile

    def slow(*args: Any, **kwargs: Any) -> Any:
        elsewhere.gate()
        return stock(*args, **kwargs)

    fn = compile_with_fallback(sine, backend="eager")
    elsewhere = Elsewhere(lambda: fn(X))
    monkeypatch.setattr(torch, "compile", slow)
    with elsewhere:
        assert in_child(calls(fn, 3, 3)) == (True, CompileState.COMPILED)


def test_forked_while_another_thread_reads_the_stats() -> None:
    """A thread that reads the stats, as metrics exporters do, does not leave them locked in a child."""
    # In a separate process, because coverage's tracer has a lock that such a thread may leave locked in a fork.
    code = """
import os, signal, threading, torch
from compile_retry import compile_with_fallback
fn = compile_with_fallback(torch.sin, backend="eager")
fn(torch.ones(3))
done = threading.Event()

def scrape():
    while not done.is_set():
        fn.stats

thread = threading.Thread(target=scrape)
thread.start()
try:
    for _ in range(30):
        if (child := os.fork()) == 0:
            signal.alarm(5)
            os._exit(fn.stats.calls != 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
finally:
    done.set()
    thread.join(60)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=200)
