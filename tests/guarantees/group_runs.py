"""Runs of group_program.py, for test_g01_group_*.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

SECONDS = 240.0
PROGRAM = Path(__file__).with_name("group_program.py")

# By rank and scenario.
Results = list[dict[str, Any]]


def train(
    size: int, timeout: float, *scenarios: str, killed: int | None = None, store: TCPStore | None = None
) -> Results:
    """Start one process per rank, with the store in this process, as torchrun's agent does.

    Args:
        size: The number of ranks.
        timeout: The process group's timeout.
        scenarios: What they train, one after the other.
        killed: A rank that does not survive. It has no results.
        store: The store; by default a new one.
    """
    store = store or TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
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
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=SECONDS)
            assert (process.returncode == 0) is (rank != killed), err
            results.append(json.loads(out) if rank != killed else {})
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return results


def of(results: Results, scenario: str) -> Results:
    """Return each rank's results of one scenario. None may have raised."""
    each = [result[scenario] for result in results if result]
    for result in each:
        assert "raised" not in result, result.get("message")
    return each


def assert_together(results: Results, scenario: str, calls: str) -> Results:
    """All ranks ran the same kinds of calls, with the values of an eager run, and attempted in the same calls."""
    each = of(results, scenario)
    for result in each:
        assert result["difference"] < 1e-5
        assert result["calls"] == calls
        assert result["attempts"] == each[0]["attempts"]
        assert result["state"] == each[0]["state"]
    return each
