"""G1 on many ranks: what they agree on, on simulated ranks and a simulated clock.

A frame that moves data between ranks is compiled on all of them, or eager on all, or an error.
"""

from __future__ import annotations

import heapq
import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import FileStore, HashStore, Store

from compile_retry._compile.ranks import RanksDisagreeError, settle_together
from compile_retry._torch.distributed import World

FRAME = ("Block.forward", "/somewhere/model.py", 12)
SECONDS = 60.0
TIMEOUT = 16.0


class Simulation:
    """Ranks as threads of which one runs at a time, on a clock that jumps to whoever wakes next.

    Every operation on the store is a moment at which others may go first, for as long as `chance` makes it take.
    """

    def __init__(self, chance: random.Random, slowest: float) -> None:
        self._slowest = slowest
        self.now = 0.0
        self._chance = chance
        self._queue: list[tuple[float, float, threading.Semaphore]] = []
        self._idle = threading.Semaphore(0)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        turn = threading.Semaphore(0)
        heapq.heappush(self._queue, (self.now + seconds, self._chance.random(), turn))
        self._idle.release()
        assert turn.acquire(timeout=SECONDS)

    def step_aside(self) -> None:
        if self._chance.random() < 0.3:
            self.sleep(self._chance.choice((0.0, 0.01, self._slowest)))

    def run(self, works: list[Callable[[], None]]) -> None:
        def begin(work: Callable[[], None]) -> None:
            self.sleep(0)
            try:
                work()
            finally:
                self._idle.release()

        threads = [threading.Thread(target=begin, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
            assert self._idle.acquire(timeout=SECONDS)
        while self._queue:
            self.now, _, turn = heapq.heappop(self._queue)
            turn.release()
            assert self._idle.acquire(timeout=SECONDS)
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive()


class SimulatedStore:
    """A store in which other ranks get ahead, and that may fail before or after it has done what it was asked."""

    def __init__(self, simulation: Simulation, store: Store, fails: Callable[[], bool] = lambda: False) -> None:
        self._simulation = simulation
        self._store = store
        self._fails = fails
        self.operations = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            self.operations += 1
            self._simulation.step_aside()
            if self._fails():
                raise RuntimeError("Connection reset by peer")
            if name in ("get", "multi_get"):  # would block
                assert self._store.check(args[0] if name == "multi_get" else [args[0]])
            result = getattr(self._store, name)(*args)
            self._simulation.step_aside()
            if self._fails():
                raise RuntimeError("Connection reset by peer")
            return result

        return operation


class SimulatedWorld(World):
    def substore(self, prefix: str) -> Any:
        return self.store


@dataclass
class Rank:
    """One rank: it comes to the frame, its tries fail so many times, and each takes a while."""

    failures: float
    comes: float = 0.0
    seconds: float = 0.1
    issued: dict[str, int] | None = field(default_factory=lambda: {"0": 3})
    timeout: float = TIMEOUT
    invocations: int = 1
    store_fails: Callable[[], bool] = lambda: False
    error: Callable[[], BaseException] = lambda: MemoryError("out of memory")
    # The outcome.
    tries: int = 0
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
        seen = SimulatedStore(simulation, shared, rank.store_fails)
        world = SimulatedWorld(number, len(ranks), seen, rank.timeout, lambda: rank.issued)  # type: ignore[arg-type]

        def try_again() -> str:
            rank.tries += 1
            simulation.sleep(rank.seconds)
            if rank.tries <= rank.failures:
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
                    try_again,
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

    simulation.run([lambda number=number, rank=rank: work(number, rank) for number, rank in enumerate(ranks)])  # type: ignore[misc]


def results(ranks: list[Rank]) -> list[list[str]]:
    return [rank.results for rank in ranks]


ALWAYS = float("inf")


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_fail_and_agree_on_eager(size: int) -> None:
    """Not before each has failed three more times, each time healed; and not much later."""
    ranks = [Rank(ALWAYS, comes=0.2 * number) for number in range(size)]
    simulate(*ranks)
    assert results(ranks) == [["eager"]] * size
    assert all(rank.tries >= 3 and rank.healed == rank.tries for rank in ranks)
    assert max(rank.ended for rank in ranks) < TIMEOUT / 2


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_failure_that_passes(failures: int) -> None:
    """The ranks that fail compile in the end, and have asked the store for nothing."""
    ranks = [Rank(failures), Rank(failures)]
    simulate(*ranks)
    assert results(ranks) == [["compiled"]] * 2
    assert [rank.tries for rank in ranks] == [failures + 1] * 2
    assert ranks[1].operations == 0


def test_a_failure_that_passes_late() -> None:
    """A rank that has been ready to run eagerly with the others still prefers code that it can get."""
    ranks = [Rank(ALWAYS), Rank(4)]
    simulate(*ranks)
    assert results(ranks) in ([["eager"], ["eager"]], [["raised"], ["compiled"]])
    ranks = [Rank(4, comes=3), Rank(4)]
    simulate(*ranks)
    assert ranks[1].results == ["compiled"]


@pytest.mark.parametrize("alone", [0, 1])
def test_a_failure_that_stays_on_one_rank(alone: int) -> None:
    """The others compile, so it raises within half the time-out and says what to do."""
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


def test_the_time_that_the_first_attempt_took_counts() -> None:
    ranks = [Rank(ALWAYS), Rank(0, comes=SECONDS)]
    simulate(*ranks, spent=TIMEOUT)
    assert ranks[0].results == ["raised"]
    assert ranks[0].tries == 1


def test_slow_tries_do_not_keep_ranks_from_agreeing() -> None:
    """Two of three seconds each are all that fits."""
    ranks = [Rank(ALWAYS, seconds=3, comes=0.1 * number) for number in range(3)]
    simulate(*ranks)
    assert results(ranks) == [["eager"]] * 3


def test_a_rank_that_leaves_sends_the_others_back_to_trying() -> None:
    """Rank 2 compiles just as the others wait for it. They do not wait until their time is up, and compile later."""
    ranks = [Rank(4, comes=3.2), Rank(4, comes=3.2), Rank(3, seconds=1)]
    simulate(*ranks)
    assert results(ranks) == [["compiled"]] * 3
    assert 4.5 < ranks[0].ended < TIMEOUT / 2


def test_the_leader_dies() -> None:
    """A rank that has accepted an invitation waits for its outcome until its time is up, and then calls it off."""
    store = HashStore()

    def dies() -> bool:
        return store.check(["invitation"])  # once it has invited, nothing comes from it any more

    ranks = [Rank(ALWAYS, store_fails=dies), Rank(ALWAYS)]
    simulate(*ranks, store=store)
    assert results(ranks) == [["raised"], ["raised"]]
    assert "store has failed: Connection reset" in str(ranks[0].raised[0])
    invitation, _ = json.loads(store.get("invitation"))
    assert store.get(f"{invitation}/outcome") == b"off"


def test_a_store_that_fails_does_not_keep_a_rank_from_compiling() -> None:
    ranks = [Rank(5, store_fails=lambda: True), Rank(5, store_fails=lambda: True)]
    simulate(*ranks)
    assert results(ranks) == [["compiled"]] * 2


@pytest.mark.parametrize("counts", [({"0": 3}, {"0": 4}), ({"0": 3}, {"0": 3, "1": 7}, {"1": 8}), ({"0": 3}, None)])
def test_ranks_that_are_not_at_the_same_point_of_the_program(counts: tuple[dict[str, int] | None, ...]) -> None:
    """The same frame in the same call, but one has issued a collective more; or nobody can tell."""
    ranks = [Rank(ALWAYS, issued=issued) for issued in counts]
    simulate(*ranks)
    assert results(ranks) == [["raised"]] * len(counts)


def test_members_of_different_groups() -> None:
    """Two pairs with a group each beside the one of all: each group is compared with itself."""
    issued = [{"0": 3, "1": 5}, {"0": 3, "1": 5}, {"0": 3, "2": 9}, {"0": 3, "2": 9}]
    ranks = [Rank(ALWAYS, issued=counts) for counts in issued]
    simulate(*ranks)
    assert results(ranks) == [["eager"]] * 4


def test_errors_that_are_no_compile_failures() -> None:
    """A dead accelerator and Ctrl-C reach the caller; the others do not wait for that rank."""

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
def test_keys_of_a_former_life(left: tuple[str, ...], third: float) -> None:
    """A job that was killed in a meeting and restarted on the same store: what it has left persuades nobody."""
    store = HashStore()
    for name in left:
        for key, value in STALE[name].items():
            store.set(key, value)
    ranks = [Rank(ALWAYS), Rank(ALWAYS), Rank(third)]
    simulate(*ranks, store=store)
    assert results(ranks) == [["eager"]] * 3 if third else [["raised"], ["raised"], ["compiled"]]


def test_the_hello_of_a_former_life_does_not_keep_ranks_from_trying() -> None:
    """Rank 2 has compiled in this life. Without it there is nobody to wait for."""
    store = HashStore()
    store.set("hello/2", STALE["hello"]["hello/2"])
    ranks = [Rank(5), Rank(5), Rank(0)]
    simulate(*ranks, store=store)
    assert results(ranks) == [["compiled"]] * 3


def test_a_file_store(tmp_path: Path) -> None:
    """Without a server: what `init_method="file://..."` makes."""
    ranks = [Rank(ALWAYS), Rank(ALWAYS)]
    simulate(*ranks, store=FileStore(str(tmp_path / "store"), -1))
    assert results(ranks) == [["eager"]] * 2


@pytest.mark.parametrize("seed", range(150))
def test_never_eager_beside_compiled(seed: int) -> None:
    """Whatever the ranks do and in whatever order: if one runs eagerly, all do."""
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
