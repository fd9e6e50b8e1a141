"""G4, G10 and G11 in long runs: leaks after many calls and failures, and eight threads amid faults."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections.abc import Iterator
from multiprocessing.pool import Pool

import pytest
import torch

import soak
from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from support import no_log_records, wait_until_in


@pytest.fixture(autouse=True, scope="module")
def _no_log_records() -> Iterator[None]:
    with no_log_records():
        yield


@pytest.fixture(scope="module")
def process() -> Iterator[Pool]:
    """A separate process, without anything that grows because of other tests."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=logging.disable) as pool:
        yield pool


@pytest.mark.long
@pytest.mark.parametrize("regime", soak.REGIMES)
def test_held_off_calls_leave_nothing_behind(process: Pool, regime: soak.Regime) -> None:
    """A hundred thousand held-off calls leave no file, thread, callback or object behind, and hardly any memory."""
    growth = process.apply(soak.held_off, (regime, 100_000))
    print(growth)  # noqa: T201  # for the docs
    assert (growth.files, growth.threads, growth.callbacks) == (0, 0, 0)
    assert growth.objects < 0.001
    assert growth.blocks < 0.01
    assert growth.rss < 100


@pytest.mark.long
@pytest.mark.parametrize("position", soak.POSITIONS)
def test_failed_attempts_leave_no_more_behind_than_torch_does(process: Pool, position: soak.Position) -> None:
    """Hundreds of failed attempts leave no file, thread or callback behind, and no more objects than under stock."""
    ours, stock = process.apply(soak.failed_attempts, (position, 200))
    print(f"{position}\n  ours  {ours}\n  stock {stock}")  # noqa: T201  # for the docs
    assert (ours.files, ours.threads, ours.callbacks) == (0, 0, 0)
    assert ours.objects < stock.objects + 3  # torch's own number varies by one or two
    assert ours.blocks < stock.blocks + 5


@pytest.mark.long
def test_eight_threads() -> None:
    """Eight threads get eager's results amid faults, one of them attempts at a time, and the counters add up."""
    ran = soak.eight_threads(8)
    assert (ran.wrong, ran.stuck) == ([], 0)
    assert ran.states == {CompileState.COMPILED}
    assert ran.failures >= ran.rounds
    booked = [ran.total(figure) for figure in ("calls", "attempts", "failures")]
    assert booked == [ran.calls, ran.attempts, ran.failures]
    assert ran.most_at_once == 1
    assert ran.early == []  # no attempt failed before it was due


@pytest.mark.parametrize("position", ["first graph", "inside Dynamo"])
def test_threads_that_begin_together(position: soak.Position) -> None:
    """Threads that wait for Dynamo while the first of them fails are held off too, so there is only one failure."""
    x, begun = torch.ones(3), threading.Barrier(4)
    failed: list[str] = []

    def fail() -> None:
        failed.append(threading.current_thread().name)
        for thread in threads if len(failed) == 1 else ():
            if thread is not threading.current_thread():
                wait_until_in(thread, "compile_wrapper")
        raise soak.full_disk()

    def backend(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        fail()
        return graph_module

    def work() -> None:
        begun.wait(20)
        torch.testing.assert_close(fn(x), x.sin().cos())

    def frame(name: str) -> None:
        if position == "inside Dynamo":
            fail()

    fn = compile_with_fallback(soak.two_graphs, backend=backend, policy=RetryPolicy(wait=1e9))
    threads = [threading.Thread(target=work) for _ in range(4)]
    with soak.dynamo_calls(frame):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert fn.stats.calls == 4
    assert fn.stats.failures == len(failed) == 1
