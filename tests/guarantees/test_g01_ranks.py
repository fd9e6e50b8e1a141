"""G1 on many ranks, end to end: training with gloo, one process per rank, next to an eager twin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

SECONDS = 60.0
PROGRAM = Path(__file__).with_name("ranks_program.py")
# For each scenario, the kinds of calls on the last rank, which fails, and on the others. c: compiled, e: eager.
AS_EAGER = {
    # A compile fails on the last rank, and a retry succeeds.
    "healthy": ("ccc", "ccc"),
    "first_attempt_passes": ("cc", "cc"),
    "recompile_passes": ("cccc", "cccc"),
    "recompile_passes_inside_dynamo": ("ccc", "ccc"),
    "recompile_before_a_graph_break_passes": ("ccc", "ccc"),
    "backward_passes": ("cc", "cc"),
    "dtensor_passes": ("cc", "cc"),
    # All ranks fail.
    "first_attempt_shared": ("eee", "eee"),
    "recompile_shared": ("ceeeee", "ceeeee"),
    "recompile_shared_then_uneven": ("cee", "cee"),
    "backward_shared": ("ee", "ee"),
    # The last rank fails, in a graph without collectives.
    "plain_module": ("ee", "cc"),
    "ddp": ("ee", "cc"),
    "fsdp2": ("ee", "cc"),
}


# By rank and scenario.
Results = list[dict[str, Any]]


def train(size: int, timeout: float, *scenarios: str) -> Results:
    """Start one process per rank, with the store in this process, as torchrun's agent does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
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
    return results


def assert_as_eager(results: Results, scenario: str) -> None:
    last, others = AS_EAGER[scenario]
    for result in results:
        assert "raised" not in result[scenario], result[scenario]["message"]
        assert result[scenario]["difference"] < 1e-6
    assert [result[scenario]["calls"] for result in results] == [others] * (len(results) - 1) + [last]


def assert_raised_on_last_rank(results: Results, scenario: str) -> None:
    *others, last = [result[scenario] for result in results]
    assert last["raised"] == "RanksDisagreeError", last["message"]
    for part in ("body (", "ranks_program.py", "all_reduce", "MemoryError", "restart from a checkpoint", "`group=`"):
        assert part in last["message"]
    assert all("raised" in other for other in others)


@pytest.mark.usefixtures("measured")
def test_two_ranks(subtests: pytest.Subtests) -> None:
    """A transient or shared failure changes no value, and a permanent failure of one rank raises on that rank.

    A transient failure is retried while the other rank waits. After a shared failure, both ranks run the frame eagerly,
    even for values for which one of them has compiled code. Without collectives in the graph, a rank falls back alone.
    """
    results = train(2, 10, *AS_EAGER, "first_attempt_stays")
    for scenario in AS_EAGER:
        with subtests.test(scenario):
            assert_as_eager(results, scenario)
    with subtests.test("first_attempt_stays"):
        assert_raised_on_last_rank(results, "first_attempt_stays")


@pytest.mark.long
def test_four_ranks() -> None:
    """Four ranks behave like two."""
    results = train(4, 12, "recompile_passes", "recompile_shared", "recompile_stays")
    assert_as_eager(results, "recompile_passes")
    assert_as_eager(results, "recompile_shared")
    assert_raised_on_last_rank(results, "recompile_stays")
