"""G1 on many ranks: the agreement of a group, with simulated ranks, a simulated clock, and a store that counts."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, Store

from compile_retry import RetryPolicy
from compile_retry._ranks.agreement import LONGEST_COMPILE, Agreement, Due, Failure, Verdict
from compile_retry._ranks.breaker import GroupBreaker
from simulation import SimulatedStore, Simulation

TIMEOUT = 16.0
FULL = Failure("transient", "builtins.OSError", "No space left on device", "backend")
BROKEN = Failure("permanent", "builtins.NotImplementedError", "no such operator", "trace")


class Rank:
    """One simulated rank, and what came of its votes."""

    def __init__(self, simulation: Simulation, store: Store, number: int, size: int, timeout: float) -> None:
        self.store: Any = SimulatedStore(simulation, store)
        self.number, self.simulation = number, simulation
        self.names = range(100, 100 + size)
        self.timeout = timeout
        self.agreement = self.born()
        self.verdicts: list[Verdict] = []
        self.ended = 0.0

    def born(self) -> Agreement:
        return Agreement(
            self.store,
            self.number,
            self.names,
            self.timeout,
            function="step",
            clock=self.simulation.clock,
            sleep=self.simulation.sleep,
        )

    def vote(
        self, what: str, failure: Failure | None = None, *, seconds: float = 0.0, makes_code: bool = True
    ) -> Verdict:
        verdict = self.agreement.join()
        if verdict is None:
            self.simulation.sleep(seconds)
            verdict = self.agreement.vote(what, failure, makes_code=makes_code)
        self.verdicts.append(verdict)
        self.ended = self.simulation.now
        return verdict

    def compile_for(self, seconds: float) -> None:
        """Give signs of life for as long as a compile takes."""
        end = self.simulation.now + seconds
        while self.simulation.now < end:
            self.simulation.sleep(1)
            self.agreement.beat()


def simulate(
    size: int,
    work: Callable[[Rank], None],
    *,
    seed: int = 0,
    store: Store | None = None,
    timeout: float = TIMEOUT,
    slowest: float = 0.0,
) -> list[Rank]:
    simulation = Simulation(random.Random(seed), slowest)
    shared = HashStore() if store is None else store
    ranks = [Rank(simulation, shared, number, size, timeout) for number in range(size)]
    simulation.run([partial(work, rank) for rank in ranks])
    return ranks


def only(values: Any) -> Any:
    (value,) = set(values)
    return value


@pytest.mark.parametrize("seed", range(20))
def test_all_ranks_get_the_worst_outcome(seed: int) -> None:
    """Whatever fails on whichever ranks, all ranks get the same verdict: the worst of all failures."""
    chance = random.Random(seed)
    size = chance.choice((2, 3, 8))
    failures = [[chance.choice((None, None, None, FULL, BROKEN)) for _ in range(size)] for _ in range(6)]

    def work(rank: Rank) -> None:
        for vote, each in enumerate(failures):
            rank.vote(f"frame {vote}", each[rank.number], seconds=chance.random())

    ranks = simulate(size, work, seed=seed, slowest=0.5)
    for vote, each in enumerate(failures):
        verdict = only(rank.verdicts[vote] for rank in ranks)
        worst = "permanent" if BROKEN in each else "transient" if FULL in each else "compiled"
        assert verdict.outcome == worst
        if worst != "compiled":
            assert each[verdict.rank - 100] == verdict.failure


SIZES = (16, 128, 1024)


@pytest.mark.long
def test_many_ranks() -> None:
    """With 1,024 ranks, there is one answer per vote, and a vote takes as many store operations as with 16 ranks."""
    votes = 4
    per_vote: dict[int, float] = {}
    most: dict[int, int] = {}
    for size in SIZES:
        counts: list[list[int]] = []

        def work(rank: Rank, size: int = size, counts: list[list[int]] = counts) -> None:
            rank.vote("first")
            mine = []
            for vote in range(votes):
                rank.simulation.sleep(1)
                before = rank.store.operations
                failed = rank.number == (vote * 37) % size and vote % 2
                rank.vote(f"frame {vote}", FULL if failed else None)
                mine.append(rank.store.operations - before)
            counts.append(mine)

        ranks = simulate(size, work, timeout=600)
        for vote in range(votes):
            verdict = only(rank.verdicts[vote + 1] for rank in ranks)
            assert verdict.outcome == ("transient" if vote % 2 else "compiled")
        per_vote[size] = sum(map(sum, counts)) / (size * votes)
        most[size] = max(map(max, counts))
    logging.getLogger(__name__).info("operations per rank and vote: %s; at most: %s", per_vote, most)
    assert max(per_vote.values()) < 1.3 * min(per_vote.values())
    assert max(most.values()) < 100


def test_a_slow_compile_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """A rank that gives signs of life is waited for, far beyond the timeout, and a log line names it."""

    def work(rank: Rank) -> None:
        if rank.agreement.join() is None and rank.number == 1:
            rank.compile_for(10 * TIMEOUT)
        rank.vote("frame")

    ranks = simulate(3, work)
    assert only(rank.verdicts[0] for rank in ranks).outcome == "compiled"
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1
    assert "rank 100, which has waited 16 s for rank 101, still compiling" in lines[0]


def test_an_endless_compile_is_not_waited_for() -> None:
    """A rank that compiles for hours is given up, although it gives signs of life."""

    def work(rank: Rank) -> None:
        if rank.agreement.join() is None and rank.number == 1:
            rank.compile_for(2 * LONGEST_COMPILE)
        rank.vote("frame")

    ranks = simulate(2, work)
    assert only(rank.verdicts[0].outcome for rank in ranks) == "none"
    assert ranks[0].ended < LONGEST_COMPILE + TIMEOUT


@pytest.mark.parametrize("dead", [0, 1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_dead_rank(dead: int, *, compiled: bool) -> None:
    """A rank that dies in an attempt is named after the timeout, and a second attempt does not wait again.

    Before anything was compiled, the others may run eagerly. Later, the rank could be alive and run compiled code.
    """

    def work(rank: Rank) -> None:
        rank.vote("first", makes_code=compiled)
        if rank.number == dead:
            rank.agreement.join()
            rank.compile_for(5)
            return
        rank.vote("frame")
        rank.vote("again")

    ranks = [rank for rank in simulate(3, work) if rank.number != dead]
    first, second = ranks[0].verdicts[-2:]
    assert first.outcome == "none"
    assert f"rank {100 + dead} did not vote" in first.text
    assert first == second
    assert first.may_run_eagerly is not compiled
    assert all(rank.verdicts == ranks[0].verdicts for rank in ranks)
    assert max(rank.ended for rank in ranks) < 5 + TIMEOUT + 5


def test_a_rank_that_never_comes() -> None:
    """Ranks that miss another one at the first attempt wait for it once, and name it."""

    def work(rank: Rank) -> None:
        if rank.number != 2:
            rank.vote("frame")

    *present, _ = simulate(3, work)
    for rank in present:
        assert rank.verdicts[0].outcome == "none"
        assert "rank 102 did not come" in rank.verdicts[0].text
        assert rank.verdicts[0].may_run_eagerly
        assert rank.ended < TIMEOUT + 5


def test_a_late_rank_gets_the_same_answer() -> None:
    """A rank that votes after the others have stopped waiting gets their answer."""

    def work(rank: Rank) -> None:
        rank.vote("first")
        rank.vote("frame", seconds=100 if rank.number else 0)

    ranks = simulate(2, work)
    assert only(rank.verdicts[1].outcome for rank in ranks) == "none"
    assert only(rank.verdicts[1].text for rank in ranks).startswith("rank 100 attempted frame, and rank 101 did not")


def test_ranks_in_different_frames() -> None:
    """Ranks that attempt different frames are told so at once, and both frames are named."""

    def work(rank: Rank) -> None:
        rank.vote("first")
        rank.vote("forward" if rank.number < 2 else "backward")

    ranks = simulate(3, work)
    assert max(rank.ended for rank in ranks) < 1
    verdict = only(rank.verdicts[1] for rank in ranks)
    assert verdict.outcome == "none"
    for part in ("rank 102", "forward", "backward"):
        assert part in verdict.text


@pytest.mark.parametrize("lives", [3])
def test_restarts_on_the_same_store(lives: int) -> None:
    """Keys of an earlier life mislead nobody, wherever that life was killed and in whatever order ranks come back."""
    store = HashStore()
    for life in range(lives):

        def work(rank: Rank, life: int = life) -> None:
            rank.simulation.sleep(random.Random(10 * life + rank.number).random() * 5)
            for vote in range(life + 1):
                rank.vote(f"frame {vote}", FULL if life == 1 and rank.number == 1 else None)
            if life == 1 and rank.number == 2:
                return  # killed, while the others are in their next vote
            if life == 1 or rank.number:
                rank.vote("unfinished", BROKEN)
            else:
                rank.agreement.join()

        ranks = simulate(4, work, seed=life, store=store)
        for vote in range(life + 1):
            verdict = only(rank.verdicts[vote] for rank in ranks)
            assert verdict.outcome == ("transient" if life == 1 else "compiled")


def test_restart_after_a_handshake_that_was_killed() -> None:
    """A rank that finds the hellos and the invitation of an earlier life waits until all ranks of its own are there."""
    store = HashStore()

    def killed(rank: Rank) -> None:
        if rank.number != 1:
            rank.vote("frame")

    simulate(3, killed, store=store)

    def work(rank: Rank) -> None:
        rank.simulation.sleep(3 * rank.number)
        rank.vote("frame")

    ranks = simulate(3, work, store=store)
    assert only(rank.verdicts[0] for rank in ranks).outcome == "compiled"
    assert min(rank.ended for rank in ranks) > 6


class DyingStore:
    """A store that is gone after a number of operations, for one rank."""

    def __init__(self, store: Any, left: int) -> None:
        self._store, self.left = store, left

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("Connection reset by peer\nand more")
            return getattr(self._store, name)(*args)

        return operation


@pytest.mark.parametrize("left", range(24))
def test_the_store_is_gone(left: int) -> None:
    """If the store fails at any point, a rank may run eagerly only if no other rank can run compiled code."""

    def work(rank: Rank) -> None:
        if rank.number == 1:
            rank.store = DyingStore(rank.store, left)
            rank.agreement = rank.born()
        for vote in range(3):
            rank.vote(f"frame {vote}")

    other, lost = simulate(2, work)
    assert lost.verdicts[-1].outcome == "none"
    assert "store has failed: Connection reset by peer" in lost.verdicts[-1].text
    assert "\n" not in lost.verdicts[-1].text
    for mine, others in zip(lost.verdicts, other.verdicts, strict=True):
        if mine.outcome == "none" and mine.may_run_eagerly:
            assert others.outcome == "none"


def test_announcements() -> None:
    """The first rank's announcements reach the others in their order, and are deleted after the next vote."""
    heard: list[list[Due | None]] = []
    store = HashStore()

    def work(rank: Rank) -> None:
        rank.vote("first", FULL)
        mine: list[Due | None] = []
        for call in (3, 5, 9):
            if rank.agreement.leads:
                rank.simulation.sleep(1)
                mine.append(rank.agreement.announce(Due(call, 2 * call, sure=call == 9, seconds=1.5)))
            else:
                mine.append(rank.agreement.hear(call))
        heard.append(mine)
        for vote in range(20):
            rank.vote(f"frame {vote}")

    simulate(3, work, store=store)
    assert heard == [[Due(3, 6, False, 1.5), Due(5, 10, False, 1.5), Due(9, 18, True, 1.5)]] * 3
    assert store.num_keys() < 40


def test_ranks_that_call_unequally_often() -> None:
    """A rank that expects an announcement in another call than the first rank is told so."""

    def work(rank: Rank) -> None:
        rank.vote("first", FULL)
        if rank.agreement.leads:
            rank.agreement.announce(Due(7, 8, sure=True))
        else:
            assert rank.agreement.hear(9) is None
            assert rank.agreement.over is not None
            rank.verdicts.append(rank.agreement.over)

    ranks = simulate(2, work)
    assert "rank 101 is in call 9, where an attempt may be due, but rank 100 is in call 7" in ranks[1].verdicts[1].text


@pytest.mark.parametrize("late", [0, 2 * TIMEOUT])
def test_the_first_rank_is_silent(late: float) -> None:
    """If the first rank announces nothing, the others stop waiting, and it is told so if it comes late."""

    def work(rank: Rank) -> None:
        rank.vote("first", FULL)
        if not rank.agreement.leads:
            assert rank.agreement.hear(3) is None
        elif late:
            rank.simulation.sleep(late)
            assert rank.agreement.announce(Due(3, 8, sure=True)) is None
        if rank.agreement.over is not None:
            rank.verdicts.append(rank.agreement.over)
            rank.ended = rank.simulation.now

    ranks = simulate(3, work)
    assert "rank 100 did not say when" in ranks[1].verdicts[1].text
    assert ranks[1].ended < TIMEOUT + 5
    assert len(ranks[0].verdicts) == (2 if late else 1)


@pytest.mark.parametrize("asking", [(0, 1, 2), (0, 1), (1,)])
def test_starting_anew(asking: tuple[int, ...]) -> None:
    """Ranks start anew after a disagreement if all do so in the same call, and otherwise know who did not."""
    answers: dict[int, str] = {}

    def work(rank: Rank) -> None:
        rank.vote("forward" if rank.number else "backward")
        if rank.number in asking:
            answers[rank.number] = rank.agreement.start_anew("retry_now 5", 10)
        if len(asking) == 3:
            rank.vote("frame")

    ranks = simulate(3, work)
    if len(asking) == 3:
        assert answers == dict.fromkeys(asking, "")
        assert only(rank.verdicts[-1] for rank in ranks).outcome == "compiled"
    else:
        assert len(answers) == len(asking)
        assert all("102 did not, within 10 s" in answer for answer in answers.values())


def test_starting_anew_in_different_calls() -> None:
    """A request in another call is another request."""
    answers: list[str] = []

    def work(rank: Rank) -> None:
        rank.vote("frame")
        answers.append(rank.agreement.start_anew(f"reset {rank.number}", 10))
        rank.vote("frame")

    ranks = simulate(2, work)
    assert all("did not" in answer for answer in answers)
    assert only(rank.verdicts[1] for rank in ranks).outcome == "compiled"


# The schedule


class Schedule:
    """Simulated ranks that make calls, and fail in each attempt until a number of failures."""

    def __init__(self, policies: Callable[[Callable[[], float]], RetryPolicy], speed: Callable[[int], float]) -> None:
        self.attempts: dict[int, list[int]] = {}
        self.times: dict[int, list[float]] = {}
        self.operations: dict[int, int] = {}
        self._policies, self._speed = policies, speed

    def run(self, size: int, calls: int, failures: int, skew: tuple[float, ...] = (1.0, 0.6, 2.3, 3.0)) -> Schedule:
        def work(rank: Rank) -> None:
            mine: list[int] = []
            times: list[float] = []

            def clock() -> float:
                return rank.simulation.now * skew[rank.number]

            breaker = GroupBreaker(self._policies(clock), lambda: rank.agreement)
            for call in range(1, calls + 1):
                probe = breaker.let_through(call) if breaker.episode is not None else None
                if breaker.episode is None or probe is not None:
                    failed = len(mine) < failures
                    verdict = rank.vote(f"frame in call {call}", FULL if failed and rank.number == 1 else None)
                    mine.append(call)
                    times.append(rank.simulation.now)
                    if verdict.outcome == "compiled":
                        break
                    breaker.failed(OSError(28, "full"), call, clock(), 0.0, retry=True)
                    breaker.probe_ended()
                rank.simulation.sleep(self._speed(call))
            self.attempts[rank.number], self.times[rank.number] = mine, times
            self.operations[rank.number] = rank.store.operations

        simulate(size, work, timeout=60)
        return self


@pytest.mark.parametrize(
    "speed", [lambda call: 0.01, lambda call: 0.001 * (call % 40), lambda call: 1.0], ids=["fast", "uneven", "slow"]
)
def test_waits_in_seconds(speed: Callable[[int], float]) -> None:
    """Ranks with clocks of different speeds attempt in the same calls, when the first rank's wait is over."""
    schedule = Schedule(lambda clock: RetryPolicy(wait=3, max_overhead=float("inf"), clock=clock), speed)
    schedule.run(4, 3000, failures=3)
    calls = schedule.attempts[0]
    assert all(each == calls for each in schedule.attempts.values())
    assert len(calls) == 4
    waits = [b - a for a, b in pairwise(schedule.times[0])]
    assert all(2.9 < wait < 6.5 for wait in waits)
    assert max(schedule.operations.values()) < 1000


def test_waits_in_calls() -> None:
    """Waits in calls need one announcement per failure."""
    schedule = Schedule(lambda clock: RetryPolicy.every(calls=50), lambda call: 0.01).run(3, 500, failures=2)
    assert all(each == [1, 51, 101] for each in schedule.attempts.values())


def test_both_waits_and_a_share() -> None:
    """Whichever wait is over first counts, and both are delayed alike by the first rank's share of the time."""
    policy = partial(RetryPolicy, wait=100, wait_calls=30, max_overhead=float("inf"))
    schedule = Schedule(lambda clock: policy(clock=clock), lambda call: 0.01).run(2, 500, failures=2)
    assert all(each == [1, 31, 61] for each in schedule.attempts.values())
    schedule = Schedule(lambda clock: policy(clock=clock), lambda call: 20.0).run(2, 500, failures=2)
    calls = schedule.attempts[0]
    assert schedule.attempts[1] == calls
    assert all(b - a < 12 for a, b in pairwise(calls))


def test_a_share_of_the_time() -> None:
    """The first rank's `max_overhead` delays an attempt beyond its call, alike on all ranks."""
    policy = partial(RetryPolicy, wait=None, wait_calls=2, max_overhead=0.1)
    due: list[list[int]] = []

    def work(rank: Rank) -> None:
        clock = rank.simulation.clock
        breaker = GroupBreaker(policy(clock=clock), lambda: rank.agreement)
        mine: list[int] = []
        for call in range(1, 200):
            if breaker.episode is None or breaker.let_through(call) is not None:
                mine.append(call)
                began = clock()
                rank.vote(f"frame in call {call}", FULL if len(mine) < 3 else None, seconds=1)
                if len(mine) == 3:
                    break
                breaker.failed(OSError(28, "full"), call, began, clock() - began, retry=True)
                assert str(breaker.next_retry(call)).startswith("in ")
                breaker.probe_ended()
            rank.simulation.sleep(0.5)
        due.append(mine)

    simulate(3, work)
    assert due[1:] == [due[0]] * 2
    first, second, _ = due[0]
    assert (second - first) * 0.5 > 8


class Disagreement:
    """Two ranks that are held off after a failure, with a policy that counts seconds."""

    def __init__(self, policy: RetryPolicy | None = None) -> None:
        self.told: list[int] = []
        self._policy = policy or RetryPolicy(wait=0.1, max_overhead=float("inf"))

    def held_off(self, rank: Rank) -> GroupBreaker:
        breaker = GroupBreaker(self._policy, lambda: rank.agreement)
        breaker.on_disagreement = self.told.append
        rank.vote("frame", FULL)
        breaker.failed(OSError(28, "full"), 1, self._policy.clock(), 0.0, retry=True)
        return breaker


def test_a_first_rank_that_is_silent_stops_the_schedule() -> None:
    """A rank that hears nothing when an attempt may be due gives up, and says so."""
    scene = Disagreement()

    def work(rank: Rank) -> None:
        breaker = scene.held_off(rank)
        if not rank.agreement.leads:
            assert breaker.let_through(2) is None
            assert breaker.episode is not None
            assert breaker.episode.stopped
            assert breaker.let_through(3) is None
            assert breaker.next_retry(3) is None

    simulate(2, work)
    assert scene.told == [2]


def test_a_retry_on_request() -> None:
    """After a request that all ranks make, the next call is an attempt, whatever the policy says."""

    def work(rank: Rank) -> None:
        breaker = Disagreement(RetryPolicy(wait=1000, max_overhead=float("inf"))).held_off(rank)
        assert breaker.let_through(2) is None
        assert rank.agreement.start_anew("retry_now 3", 10) == ""
        breaker.retry_now()
        assert breaker.let_through(3) is not None
        breaker.end()
        breaker.retry_now()  # has no effect: nothing is held off

    simulate(2, work)


def test_a_policy_that_raises_on_the_first_rank() -> None:
    """The other ranks give up together with the first one."""

    def wait(state: object) -> float:
        raise ZeroDivisionError

    def work(rank: Rank) -> None:
        breaker = GroupBreaker(RetryPolicy(wait=wait), lambda: rank.agreement)
        rank.vote("frame", FULL)
        if rank.agreement.leads:
            with pytest.raises(ZeroDivisionError):
                breaker.failed(OSError(28, "full"), 1, 0.0, 0.0, retry=True)
        else:
            breaker.failed(OSError(28, "full"), 1, 0.0, 0.0, retry=True)
        assert breaker.episode is not None
        assert breaker.episode.stopped
        assert rank.agreement.over is None

    simulate(2, work)


def test_permanent_failures() -> None:
    """After a few permanent failures in a row, all ranks stop attempting, whatever time these took."""

    def work(rank: Rank) -> None:
        breaker = GroupBreaker(RetryPolicy(), lambda: rank.agreement)
        allowed = 0
        while breaker.affords_another_refusal():
            assert breaker.failed(NotImplementedError(), 1, 0.0, rank.number, retry=False) == (1, False)
            breaker.refused(0.0, rank.number)
            allowed += 1
        assert allowed == 8

    simulate(2, work)


def test_without_other_ranks() -> None:
    """In a group of one rank, the policy decides, as without a group."""
    now = [0.0]
    breaker = GroupBreaker(RetryPolicy(wait=5, clock=lambda: now[0]), lambda: None)
    assert breaker.affords_another_refusal()
    breaker.failed(OSError(28, "full"), 1, 0.0, 0.0)
    assert str(breaker.next_retry(1)) == "in 5 s"
    assert breaker.let_through(2) is None
    now[0] = 6
    assert breaker.let_through(3) is not None
    breaker.retry_now()


@pytest.mark.parametrize("what", ["announce", "hear", "start_anew"])
def test_the_store_is_gone_between_votes(what: str) -> None:
    """A rank that loses the store between votes runs eagerly, as all ranks do at that moment."""

    def work(rank: Rank) -> None:
        rank.vote("frame", FULL)
        rank.agreement._store = DyingStore(rank.store, 0)  # as if the connection were lost
        if what == "announce":
            assert rank.agreement.announce(Due(1, 5, sure=True)) is None
        elif what == "hear":
            assert rank.agreement.hear(1) is None
        else:
            assert "store has failed" in rank.agreement.start_anew("reset 1", 10)
            return
        assert rank.agreement.over is not None
        assert rank.agreement.over.may_run_eagerly
        with rank.agreement.beating():
            rank.agreement.beat()

    simulate(2, work)
