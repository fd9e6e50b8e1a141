"""G1 on many ranks: their agreement, with simulated ranks and a simulated clock.

A frame with collectives is compiled on all ranks, runs eagerly on all ranks, or raises.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import FileStore, HashStore, Store

from compile_retry._compile.ranks import RanksDisagreeError, settle_together
from compile_retry._torch.distributed import World
from simulation import SimulatedStore, Simulation

FRAME = ("Block.forward", "/somewhere/model.py", 12)
SECONDS = 60.0
TIMEOUT = 16.0


class SimulatedWorld(World):
    def substore(self, prefix: str) -> Any:
        return self.store


@dataclass
class Rank:
    """One rank: when it reaches the frame, how many of its attempts fail, and how long each takes."""

    failures: float
    comes: float = 0.0
    seconds: float = 0.1
    issued: dict[str, int] | None = field(default_factory=lambda: {"0": 3})
    timeout: float = TIMEOUT
    invocations: int = 1
    store_fails: Callable[[], bool] = lambda: False
    error: Callable[[], BaseException] = lambda: MemoryError("out of memory")
    # The outcome.
    attempts: int = 0
    healed: int = 0
    ended: float = 0.0
    results: list[str] = field(default_factory=list)
    raised: list[BaseException] = field(default_factory=list)
    operations: int = 0


def simulate(*ranks: Rank, seed: int = 0, slowest: float = 0.0, store: Store | None = None, spent: float = 0.0) -> None:
    simulation = Simulation(random.Random(seed), slowest)
    shared = HashStore() if store is None else store

    def work(number: int, rank: Rank) -> None:
        simulation.sleep(rank.comes)
        seen: Any = SimulatedStore(simulation, shared, rank.store_fails)
        world = SimulatedWorld(number, len(ranks), seen, rank.timeout, lambda: rank.issued)

        def attempt() -> str:
            rank.attempts += 1
            simulation.sleep(rank.seconds)
            if rank.attempts <= rank.failures:
                raise rank.error()
            return "compiled"

        def heal() -> None:
            rank.healed += 1

        for _ in range(rank.invocations):
            try:
                result = settle_together(
                    FRAME,
                    1,
                    ("all_reduce",),
                    attempt,
                    heal=heal,
                    spent=spent,
                    world=world,
                    clock=simulation.clock,
                    sleep=simulation.sleep,
                )
                rank.results.append(result or "eager")
            except BaseException as exc:
                rank.results.append("raised")
                rank.raised.append(exc)
            if rank.results[-1] != "raised":
                break
        rank.ended, rank.operations = simulation.now, seen.operations

    simulation.run([partial(work, number, rank) for number, rank in enumerate(ranks)])


def results(ranks: list[Rank]) -> list[list[str]]:
    return [rank.results for rank in ranks]


ALWAYS = float("inf")


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_fail_and_agree_on_eager(size: int) -> None:
    """They agree after each has failed three more times, healing before each attempt, and soon after that."""
    ranks = [Rank(ALWAYS, comes=0.2 * number) for number in range(size)]
    simulate(*ranks)
    assert results(ranks) == [["eager"]] * size
    assert all(rank.attempts >= 3 and rank.healed == rank.attempts for rank in ranks)
    assert max(rank.ended for rank in ranks) < TIMEOUT / 2


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_transient_failure(failures: int) -> None:
    """Ranks with a transient failure compile in the end, without using the store."""
    ranks = [Rank(failures), Rank(failures)]
    simulate(*ranks)
    assert results(ranks) == [["compiled"]] * 2
    assert [rank.attempts for rank in ranks] == [failures + 1] * 2
    assert ranks[1].operations == 0


def test_a_transient_failure_that_lasts() -> None:
    """A rank that was ready to run eagerly with the others still prefers compiled code if it gets any."""
    ranks = [Rank(ALWAYS), Rank(4)]
    simulate(*ranks)
    assert results(ranks) in ([["eager"], ["eager"]], [["raised"], ["compiled"]])
    ranks = [Rank(4, comes=3), Rank(4)]
    simulate(*ranks)
    assert ranks[1].results == ["compiled"]


@pytest.mark.parametrize("alone", [0, 1])
def test_a_permanent_failure_on_one_rank(alone: int) -> None:
    """If the others compile, the failing rank raises within half the timeout, and the error says what to do."""
    ranks = [Rank(0), Rank(0)]
    ranks[alone] = Rank(ALWAYS)
    simulate(*ranks)
    assert ranks[1 - alone].results == ["compiled"]
    assert ranks[alone].results == ["raised"]
    assert ranks[alone].ended <= TIMEOUT / 2 + 5
    (error,) = ranks[alone].raised
    assert isinstance(error, RanksDisagreeError)
    for part in ("Block.forward (/somewhere/model.py:12)", f"rank {alone}", "all_reduce", "8 s", "MemoryError: out of"):
        assert part in str(error)
    assert "restart from a checkpoint" in str(error)
    assert "`timeout`" in str(error)


def test_the_duration_of_the_first_attempt_counts() -> None:
    """If the first attempt has used up the time, a rank makes one more and raises."""
    ranks = [Rank(ALWAYS), Rank(0, comes=SECONDS)]
    simulate(*ranks, spent=TIMEOUT)
    assert ranks[0].results == ["raised"]
    assert ranks[0].attempts == 1


def test_ranks_agree_although_attempts_are_slow() -> None:
    """In each round, there is time for only two attempts of three seconds."""
    ranks = [Rank(ALWAYS, seconds=3, comes=0.1 * number) for number in range(3)]
    simulate(*ranks)
    assert results(ranks) == [["eager"]] * 3


def test_a_rank_that_compiles_makes_the_others_retry() -> None:
    """Rank 2 compiles while the others wait for it. They notice before their time is up, and compile later."""
    ranks = [Rank(4, comes=3.2), Rank(4, comes=3.2), Rank(3, seconds=1)]
    simulate(*ranks)
    assert results(ranks) == [["compiled"]] * 3
    assert 4.5 < ranks[0].ended < TIMEOUT / 2


def test_the_leader_dies() -> None:
    """A rank that has accepted an invitation waits for the outcome until its time is up, and then cancels it."""
    store = HashStore()

    def dies() -> bool:
        return store.check(["invitation"])  # after inviting, the leader is gone

    ranks = [Rank(ALWAYS, store_fails=dies), Rank(ALWAYS)]
    simulate(*ranks, store=store)
    assert results(ranks) == [["raised"], ["raised"]]
    assert "store has failed: Connection reset" in str(ranks[0].raised[0])
    invitation, _ = json.loads(store.get("invitation"))
    assert store.get(f"{invitation}/outcome") == b"off"


def test_ranks_compile_although_the_store_fails() -> None:
    """A failing store does not prevent a transient failure from being retried."""
    ranks = [Rank(5, store_fails=lambda: True), Rank(5, store_fails=lambda: True)]
    simulate(*ranks)
    assert results(ranks) == [["compiled"]] * 2


@pytest.mark.parametrize("counts", [({"0": 3}, {"0": 4}), ({"0": 3}, {"0": 3, "1": 7}, {"1": 8}), ({"0": 3}, None)])
def test_ranks_at_different_points_of_the_program(counts: tuple[dict[str, int] | None, ...]) -> None:
    """Ranks in the same frame of the same call do not agree if their numbers of collectives differ or are unknown."""
    ranks = [Rank(ALWAYS, issued=issued) for issued in counts]
    simulate(*ranks)
    assert results(ranks) == [["raised"]] * len(counts)


def test_members_of_different_groups() -> None:
    """With two pairs of ranks in groups of their own, the counts of each group are compared separately."""
    issued = [{"0": 3, "1": 5}, {"0": 3, "1": 5}, {"0": 3, "2": 9}, {"0": 3, "2": 9}]
    ranks = [Rank(ALWAYS, issued=counts) for counts in issued]
    simulate(*ranks)
    assert results(ranks) == [["eager"]] * 4


def test_errors_other_than_compile_failures() -> None:
    """A dead accelerator and Ctrl-C reach the caller, and the others do not wait for that rank."""

    class AcceleratorError(RuntimeError):
        pass

    ranks = [Rank(ALWAYS, error=AcceleratorError), Rank(ALWAYS, error=KeyboardInterrupt), Rank(0)]
    simulate(*ranks)
    assert [type(exc) for rank in ranks for exc in rank.raised] == [AcceleratorError, KeyboardInterrupt]


STALE = {
    "hello": {"hello/0": '["x", {"0": 3}]', "hello/1": '["x", {"0": 3}]', "hello/2": '["x", {"0": 3}]'},
    "invitation": {"invitation": '["old", ["x", "x", "x"]]'},
    "agreed": {"invitation": '["old", ["x", "x", "x"]]', "old/outcome": "eager", "old/accepted": "2"},
}


@pytest.mark.parametrize("left", [("hello",), ("invitation",), ("agreed",), ("hello", "agreed")])
@pytest.mark.parametrize("third", [0, ALWAYS])
def test_keys_of_a_former_run(left: tuple[str, ...], third: float) -> None:
    """A restarted job ignores keys that its predecessor left in the same store during an agreement."""
    store = HashStore()
    for name in left:
        for key, value in STALE[name].items():
            store.set(key, value)
    ranks = [Rank(ALWAYS), Rank(ALWAYS), Rank(third)]
    simulate(*ranks, store=store)
    assert results(ranks) == [["eager"]] * 3 if third else [["raised"], ["raised"], ["compiled"]]


def test_a_hello_of_a_former_run() -> None:
    """Rank 2 has compiled in this run. Its key from a former run does not make the others wait for it."""
    store = HashStore()
    store.set("hello/2", STALE["hello"]["hello/2"])
    ranks = [Rank(5), Rank(5), Rank(0)]
    simulate(*ranks, store=store)
    assert results(ranks) == [["compiled"]] * 3


def test_a_file_store(tmp_path: Path) -> None:
    """A store made by `init_method="file://..."` works too."""
    ranks = [Rank(ALWAYS), Rank(ALWAYS)]
    simulate(*ranks, store=FileStore(str(tmp_path / "store"), -1))
    assert results(ranks) == [["eager"]] * 2


@pytest.mark.parametrize("seed", range(150))
def test_never_eager_beside_compiled(seed: int) -> None:
    """Whatever the ranks do, in any order: if one runs eagerly, none runs compiled code."""
    chance = random.Random(seed)
    broken = chance.random() < 0.2
    ranks = [
        Rank(
            failures=chance.choice((0, 2, 3, 4, 5, 8, ALWAYS, ALWAYS, ALWAYS)),
            comes=chance.choice((0.0, 0.2, 1.0, 3.0)),
            seconds=chance.choice((0.0, 0.1, 0.5, 2.0)),
            timeout=chance.choice((4.0, 8.0)),
            invocations=chance.choice((1, 1, 2)),
            store_fails=(lambda: chance.random() < 0.02) if broken else lambda: False,
        )
        for _ in range(chance.choice((2, 3, 4)))
    ]
    simulate(*ranks, seed=seed, slowest=0.3)
    outcomes = {outcome for rank in ranks for outcome in rank.results}
    assert not outcomes >= {"eager", "compiled"}, results(ranks)
    if "eager" in outcomes and not broken:
        assert all(rank.results[-1] == "eager" for rank in ranks), results(ranks)
    for rank in ranks:
        assert all(isinstance(exc, RanksDisagreeError) for exc in rank.raised)
