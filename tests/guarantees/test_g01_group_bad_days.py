"""G1 on many ranks with `group=`: slow compiles, dead ranks, restarts, ranks that do different things, no store."""

from __future__ import annotations

import pytest
from group_runs import assert_together, of, train
from torch._C._distributed_c10d import TCPStore


@pytest.mark.long
def test_slow_compile() -> None:
    """A rank may compile for twice as long as the process group's timeout. The log says who is waited for."""
    waiting, slow = assert_together(train(2, 6, "slow_compile"), "slow_compile", "cc")
    (line,) = [line for level, line in waiting["lines"] if level == "WARNING"]
    assert "for rank 1, still compiling" in line
    assert all(level == "DEBUG" for level, _ in slow["lines"])


@pytest.mark.usefixtures("measured")
@pytest.mark.long
def test_killed_rank() -> None:
    """If a rank is killed in its attempt, the others leave the vote, with an error that names the rank."""
    (other,) = of(train(2, 30, "killed", killed=1), "killed")
    error, message = other["error"]
    assert error == "RanksDisagreeError"
    for part in ("rank 1 did not vote", "all_reduce", "restart from a checkpoint"):
        assert part in message
    assert other["took"] < 8 + 5
    assert other["state"] == "gave up"


@pytest.mark.long
def test_restarts_on_the_same_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rank was killed in a vote, restarted ranks are not misled by keys of earlier lives, three times."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for life in range(4):
        monkeypatch.setenv("LIFE", str(life))
        keys = store.num_keys()
        results = train(2, 30, "restarted", store=store, killed=1 if life < 3 else None)
        assert_together(results, "restarted", "eeecc" if life < 3 else "eeeccc")
        assert store.num_keys() > keys > 0 or life == 0


@pytest.mark.usefixtures("measured")
@pytest.mark.long
def test_different_frames() -> None:
    """Ranks that attempt different frames are told so at once. Both frames are named, and nothing of them runs."""
    for result in of(train(2, 30, "different_frames"), "different_frames"):
        error, message = result["error"]
        assert error == "RanksDisagreeError"
        assert "rank 0 attempted one (group_program.py" in message or "rank 1 attempted other (group_pro" in message
        assert "one (" in message
        assert "other (" in message
        assert result["took"] < 10


@pytest.mark.long
def test_different_shapes() -> None:
    """If only one rank has to compile, it does not run eagerly while the others run compiled code."""
    first, _ = of(train(2, 30, "different_shapes"), "different_shapes")
    error, message = first["error"]
    assert error == "RanksDisagreeError"
    assert "arguments of the same shapes" in message


@pytest.mark.usefixtures("measured")
@pytest.mark.long
def test_without_collectives(subtests: pytest.Subtests) -> None:
    """Where nothing is communicated, ranks that cannot agree go on eagerly, and say why in an error of the log."""
    gone = {"store_gone": "ceeee", "store_gone_while_held_off": "eeee", "lost_announcement": "eee"}
    results = train(2, 30, "unequal_calls", "uneven_checks", "absent", *gone)
    with subtests.test("absent"):
        present, _ = of(results, "absent")
        assert (present["calls"], present["state"]) == ("ee", "gave up")
        assert "rank 1 did not come to the first attempt within 5 s" in errors(present)[0]
    with subtests.test("unequal_calls"):
        often, rarely = of(results, "unequal_calls")
        assert often["calls"] == "e" * 12
        assert often["state"] == "gave up"
        assert "rank 1 did not vote on it within 5 s" in errors(often)[0]
        assert rarely["state"] == "fallback"
    with subtests.test("uneven_checks"):
        _, late = of(results, "uneven_checks")
        assert late["state"] == "gave up"
        assert "rank 0 did not say when" in errors(late)[0]
    for scenario, calls in gone.items():
        with subtests.test(scenario):
            for result in assert_together(results, scenario, calls):
                assert result["state"] == "gave up"
                assert "the group's store has failed: Connection reset by peer" in errors(result)[-1]


def errors(result: dict[str, list[tuple[str, str]]]) -> list[str]:
    return [line for level, line in result["lines"] if level == "ERROR"]


@pytest.mark.usefixtures("measured")
@pytest.mark.long
def test_requests(subtests: pytest.Subtests) -> None:
    """`retry_now()` and `reset()` take effect if all ranks call them. Otherwise a warning names who did not."""
    results = train(2, 30, "retry_on_all", "retry_on_one", "reset_after_giving_up", "retry_of_nothing")
    with subtests.test("retry_on_all"):
        assert_together(results, "retry_on_all", "ecc")
    with subtests.test("retry_on_one"):
        asked, _ = assert_together(results, "retry_on_one", "eee")
        assert any("retry_now() has no effect in call 2" in line and "rank 1" in line for _, line in asked["lines"])
    with subtests.test("reset_after_giving_up"):
        assert_together(results, "reset_after_giving_up", "eecc")
    with subtests.test("retry_of_nothing"):
        assert_together(results, "retry_of_nothing", "cc")


@pytest.mark.usefixtures("measured")
@pytest.mark.long
def test_strict() -> None:
    """In strict mode, a failure on one rank raises on all ranks, and says where it occurred."""
    other, failed = assert_together(train(2, 30, "strict"), "strict", "c")
    assert failed["strict"][0] == "BackendCompilerFailed"
    assert other["strict"] == ["PeerFailedError", "rank 1: builtins.MemoryError: "]


@pytest.mark.usefixtures("measured")
@pytest.mark.long
def test_what_is_seen() -> None:
    """Events, log lines, the report and metrics have the rank. Only the first rank and those that fail write lines."""
    results = assert_together(train(3, 30, "seen"), "seen", "eeec")
    kinds = ["attempt started", "failed", "retry scheduled", "attempt started", "compiled", "recovered"]
    for rank, result in enumerate(results):
        assert result["events"] == [[kind, rank] for kind in kinds]
        assert result["event_failed_on"] == [2]
        assert result["report"] == {"group": "world", "rank": rank, "ranks": [0, 1, 2]}
        assert f"seen [rank {rank} of world: 0 ... 2]" in result["table"]
        assert f'rank="{rank}"' in result["metrics"]
        levels = [level for level, _ in result["lines"]]
        assert levels == [["WARNING", "INFO", "WARNING"], ["DEBUG"] * 3, ["WARNING", "DEBUG", "DEBUG"]][rank]
        assert "attempt 1 failed on rank 2 in call 1: MemoryError" in result["lines"][0][1]
        assert "all 3 ranks run eagerly, next attempt in 3 calls" in result["lines"][0][1]
