"""G1 on many ranks with `group=`: all ranks run a frame compiled or none does. Training next to eager twins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from group_runs import assert_together, of, train

# For each scenario, the kinds of calls on all ranks (c: compiled, e: eager, m: both), the number of failures, and the
# rank on which the last one occurred.
TOGETHER = {
    "first_attempt": ("eeeccc", 1, 1),
    "retry_fails": ("eeeeeecc", 2, 0),
    "recompile": ("cececc", 1, 1),
    "inside_dynamo": ("eeecc", 1, 1),
    "backward": ("eeecc", 1, 1),
    "creation": ("eeecc", 1, 1),
    "two_frames": ("mmmcc", 1, 1),
    "first_of_two_frames": ("eeecc", 1, 1),
    "permanent": ("cece", 2, 1),
    "dtensor": ("eeecc", 1, 1),
    "policy_raises": ("eeee", 1, 1),
    "predicate_raises": ("eeee", 2, 1),
    "frameless": ("ceeecc", 1, 1),
    "limit_with_fullgraph": ("ccece", 0, None),
    "over_limit": ("ccccccccee", 0, None),
    "passed_over": ("cc", 0, None),
}


@pytest.mark.usefixtures("measured")
@pytest.mark.long
def test_two_ranks(subtests: pytest.Subtests) -> None:
    """Whichever rank fails at whichever stage, both run the same frames eagerly, and both retry in the same call."""
    results = train(2, 30, *TOGETHER, "without_group")
    for scenario, (calls, failures, rank) in TOGETHER.items():
        with subtests.test(scenario):
            for result in assert_together(results, scenario, calls):
                assert result["failures"] == failures
                assert result["failed_on"] == rank


@pytest.mark.usefixtures("measured")
def test_one_rank_fails(subtests: pytest.Subtests) -> None:
    """Both ranks run eagerly and recover together. Steady calls do not use the store."""
    results = train(2, 30, "healthy", "first_attempt")
    with subtests.test("healthy"):
        for result in assert_together(results, "healthy", "c" * 22):
            assert result["operations_when_compiling"] > 0
            assert result["operations"] == 0
            assert result["steady"] == [10_001, 901]
    with subtests.test("first_attempt"):
        assert_together(results, "first_attempt", "eeeccc")


@pytest.mark.usefixtures("measured")
@pytest.mark.long
def test_arguments() -> None:
    """In a group of its own, a rank falls back alone. A timeout must be below that of the process group."""
    for result in of(train(2, 30, "arguments"), "arguments"):
        assert result["calls"] == "eeec"
        assert result["failed_on"] is None
        assert result["ranks"] == "None"
        assert result["error"] == "agree_timeout must be below the process group's own timeout, 30 s, not 30.0"


@pytest.mark.long
def test_four_ranks(subtests: pytest.Subtests) -> None:
    """Four ranks behave like two."""
    results = train(4, 30, "first_attempt", "recompile", "backward")
    for scenario in ("first_attempt", "recompile", "backward"):
        with subtests.test(scenario):
            assert_together(results, scenario, TOGETHER[scenario][0])


@pytest.mark.usefixtures("measured")
@pytest.mark.long
def test_two_groups_and_two_functions() -> None:
    """Functions and groups are independent of each other, and ranks outside a group do not take part."""
    results = train(2, 30, "two_functions")
    for result in assert_together(results, "two_functions", "eeeccc"):
        assert result["other"] == ["eecccc", 0.0]


@pytest.mark.usefixtures("measured")
@pytest.mark.long
def test_waits_in_seconds() -> None:
    """Ranks whose clocks differ attempt in the same calls, when the first rank's wait is over."""
    for size in (2, 4):
        results = of(train(size, 30, "in_seconds"), "in_seconds")
        assert all(result["attempts"] == results[0]["attempts"] for result in results)
        assert all(result["calls"] == results[0]["calls"] for result in results)
        assert all(result["calls"].endswith("cc") for result in results)
        assert all(result["next_retry"].startswith("in 0") for result in results)


def chunks() -> Iterator[Any]:
    """Yield numbers of ranks, and seeds: 40 with HYPOTHESIS_PROFILE=long, otherwise a few."""
    for size, seeds, at_once in ((2, range(16), 2), (4, range(16, 30), 1), (8, range(30, 40), 1)):
        parts = [seeds[first : first + at_once] for first in range(0, len(seeds), at_once)]
        for part in parts if os.environ.get("HYPOTHESIS_PROFILE") == "long" else parts[:1]:
            yield pytest.param(size, part, id=f"{size}-{part.start}")


@pytest.mark.long
@pytest.mark.parametrize(("size", "seeds"), [*chunks()])
def test_random_faults(size: int, seeds: range) -> None:
    """Whatever fails on whichever ranks and whenever, all ranks run the same kinds of calls, and the eager values."""
    results = train(size, 60, *(f"random_{seed}" for seed in seeds))
    for seed in seeds:
        assert_together(results, f"random_{seed}", results[0][f"random_{seed}"]["calls"])
