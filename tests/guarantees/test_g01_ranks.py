"""G1 on many ranks, from end to end: training on gloo, one process for each rank, beside its eager twin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

SECONDS = 60.0
PROGRAM = Path(__file__).with_name("ranks_program.py")
# By scenario: the kinds of calls of the last rank, which fails, and of the others. c: compiled, e: eager.
PASSES = {
    "healthy": ("ccc", "ccc"),
    "first_attempt_passes": ("cc", "cc"),
    "recompile_passes": ("cccc", "cccc"),
    "recompile_passes_inside_dynamo": ("ccc", "ccc"),
    "recompile_before_a_graph_break_passes": ("ccc", "ccc"),
    "backward_passes": ("cc", "cc"),
    "dtensor_passes": ("cc", "cc"),
}
SHARED = {
    "first_attempt_shared": ("eee", "eee"),
    "recompile_shared": ("ceeeee", "ceeeee"),
    "recompile_shared_then_uneven": ("cee", "cee"),
    "backward_shared": ("ee", "ee"),
}
ALONE = {"plain_module": ("ee", "cc"), "ddp": ("ee", "cc")}


@dataclass
class Run:
    """What came of each scenario on each rank, and the group's time-out."""

    timeout: float
    results: list[dict[str, Any]]

    def of(self, scenario: str) -> list[dict[str, Any]]:
        return [result[scenario] for result in self.results]


def train(measuring: dict[str, str], size: int, timeout: float, *scenarios: str) -> Run:
    """One process for each rank, with the store in this one, as an agent of torchrun has it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {**os.environ, **measuring, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(store.port), str(rank), str(size), str(timeout), *scenarios],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=2 * SECONDS)
            assert process.returncode == 0, err
            results.append(json.loads(out))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return Run(timeout, results)


@pytest.fixture(scope="module")
def two_ranks(measuring: dict[str, str]) -> Run:
    return train(measuring, 2, 10, *PASSES, *SHARED, *ALONE, "first_attempt_stays")


@pytest.fixture(scope="module")
def four_trained(measuring: dict[str, str]) -> Run:
    return train(measuring, 4, 12, "recompile_passes", "recompile_shared", "recompile_stays")


def assert_as_eager(run: Run, scenario: str, last: str, others: str) -> None:
    for result in run.of(scenario):
        assert "raised" not in result, result["message"]
        assert result["difference"] < 1e-6
    assert [result["calls"] for result in run.of(scenario)] == [others] * (len(run.results) - 1) + [last]


@pytest.mark.parametrize("scenario", PASSES)
def test_a_failure_that_passes_on_one_of_two_ranks(two_ranks: Run, scenario: str) -> None:
    """It tries again while the other waits, and every call is compiled on both."""
    assert_as_eager(two_ranks, scenario, *PASSES[scenario])


@pytest.mark.parametrize("scenario", SHARED)
def test_a_failure_that_two_ranks_share(two_ranks: Run, scenario: str) -> None:
    """They run the frame eagerly from then on, with values too for which one of them has compiled code."""
    assert_as_eager(two_ranks, scenario, *SHARED[scenario])


@pytest.mark.parametrize("scenario", ALONE)
def test_a_failure_of_one_rank_where_nothing_moves_in_the_graph(two_ranks: Run, scenario: str) -> None:
    """It falls back alone."""
    assert_as_eager(two_ranks, scenario, *ALONE[scenario])


def test_four_ranks(four_trained: Run) -> None:
    assert_as_eager(four_trained, "recompile_passes", *PASSES["recompile_passes"])
    assert_as_eager(four_trained, "recompile_shared", *SHARED["recompile_shared"])


@pytest.mark.parametrize(
    ("ranks", "scenario"), [("two_ranks", "first_attempt_stays"), ("four_trained", "recompile_stays")]
)
def test_a_failure_that_stays_on_one_rank_of_a_run(ranks: str, scenario: str, request: pytest.FixtureRequest) -> None:
    """It raises there within half the time-out, and nobody trains on wrong numbers."""
    run: Run = request.getfixturevalue(ranks)
    *others, last = run.of(scenario)
    assert last["raised"] == "RanksDisagreeError", last["message"]
    for part in ("body (", "ranks_program.py", "all_reduce", "MemoryError", "restart from a checkpoint"):
        assert part in last["message"]
    assert all("raised" in result for result in others)
