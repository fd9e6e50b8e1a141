"""The agreement of a group's ranks on the attempts of one function, through a key-value store.

There is one *vote* per attempt of a frame. Each rank names the frame, writes its failure if it has one, and adds one to
a counter. The rank that makes the counter complete writes the *verdict*, the worst outcome of all. If the counter stays
incomplete for too long, any waiting rank may write a verdict instead: no agreement. Only the first write counts, so all
ranks read the same verdict.

Between votes, only the first rank speaks: it publishes the number of the call in which the next attempt is due, and the
others read it. See `breaker`.

The first vote is preceded by a handshake, in which the ranks choose a prefix for their keys, their *life*. So keys that
an earlier run of the job has left in the store are never read.

All waiting is polling. A blocking operation would hold up other threads that use the same connection, among them NCCL's
watchdog. If the store fails, there is no agreement.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple, Protocol

from compile_retry._record.heartbeat import heartbeat

log = logging.getLogger("compile_retry")

# Bounds of the pause between two polls, in seconds. In between it is a fixed share of the time waited so far.
_SHORTEST_PAUSE, _LONGEST_PAUSE, _SHARE = 0.0002, 0.25, 0.05
# Seconds that a rank waits for others at most, although they are still compiling.
LONGEST_COMPILE = 3600.0
# Seconds between signs of life at most.
_LONGEST_PERIOD = 2.0

COMPILED, TRANSIENT, PERMANENT, NONE = "compiled", "transient", "permanent", "none"
_GO, _OFF = "go", "off"
_NOBODY = "-"


class Store(Protocol):
    """The methods of a ``torch.distributed.Store`` that are used. A `get` of a missing key would block."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def check(self, keys: list[str], /) -> bool: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def delete_key(self, key: str, /) -> bool: ...


class Failure(NamedTuple):
    """A rank's failed attempt, as the other ranks need to know it.

    Attributes:
        outcome: ``"transient"`` or ``"permanent"``.
        error_type: Qualified name of the root cause's class.
        message: The root cause's message.
        stage: The failing stage: see `CompileFailure`.
    """

    outcome: str
    error_type: str
    message: str
    stage: str


class Verdict(NamedTuple):
    """The outcome of a vote, the same on all ranks.

    Attributes:
        outcome: ``"compiled"`` if the frame is compiled on all ranks; ``"transient"`` or ``"permanent"`` if it failed
            on some, the worst of all failures; ``"none"`` if there is no agreement.
        rank: The name of the rank that has failed.
        failure: Its failure.
        text: For no agreement, the reason in words.
        may_run_eagerly: For no agreement, whether it is certain that no other rank runs compiled code instead.
    """

    outcome: str
    rank: int | None = None
    failure: Failure | None = None
    text: str = ""
    may_run_eagerly: bool = True


class Due(NamedTuple):
    """The first rank's announcement.

    Attributes:
        call: The call in which it was made.
        next_call: The call of the next attempt or, unless `sure`, of the next announcement.
        sure: Whether that call is an attempt.
        seconds: About how many seconds are left until the attempt; None if the policy counts calls.
        stop: Whether there will be no attempt.
    """

    call: int
    next_call: int
    sure: bool
    seconds: float | None = None
    stop: bool = False


class Agreement:
    """One rank's part in the agreement on one function.

    Only one thread may use it, apart from `beat`.

    Args:
        store: The group's store, with a prefix for this function.
        rank: This process's place in the group, from 0.
        names: The names of all ranks in messages: their numbers in the whole job.
        timeout: Seconds without a sign of life after which a rank is not waited for.
        function: The function's name, for messages.
        clock: A monotonic clock in seconds.
        sleep: Waits for the given number of seconds.

    Attributes:
        name: This rank's name.
        leads: Whether this is the group's first rank.
        over: The verdict that ended the agreement, if one has.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        names: Sequence[int],
        timeout: float,
        *,
        function: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._store, self._rank, self._names, self.timeout = store, rank, names, timeout
        self._function, self._clock, self._sleep = function, clock, sleep
        self._period = min(timeout / 4, _LONGEST_PERIOD)
        self.name, self.size, self.leads = names[rank], len(names), rank == 0
        self.over: Verdict | None = None
        self._has_code = False  # whether any frame has ever been compiled on all ranks
        self._life: str | None = None
        self._votes = self._announcements = 0
        self._garbage: list[str] = []

    # Votes

    def join(self) -> Verdict | None:
        """Get ready for an attempt. Return the verdict if there can be no agreement.

        The first time, wait until all ranks are there.
        """
        if self.over is None and self._life is None:
            self._join()
        return self.over

    def _join(self) -> None:
        try:
            if not self._shake_hands("", self.timeout):
                absent = self._in_words(self._without_hello(""))
                self._no_agreement(f"{absent} did not come to the first attempt within {self.timeout:.4g} s")
        except RuntimeError as exc:
            self._no_agreement(_lost(exc), may_run_eagerly=True)

    def beating(self) -> AbstractContextManager[None]:
        """Tell the ranks that wait, while the returned context lasts, that this one is still compiling."""
        return heartbeat(self.beat, every=self._period)

    def beat(self, _: float = 0.0) -> None:
        """Give a sign of life. May be called in any thread."""
        with suppress(RuntimeError):  # the vote will notice
            self._store.add(f"{self._life}/{self._votes + 1}/pulse", 1)

    def vote(self, what: str, failure: Failure | None = None, *, makes_code: bool = True) -> Verdict:
        """Vote on an attempt, and wait for the verdict. Follows `join`.

        Args:
            what: The frame and the call. It must be the same on all ranks.
            failure: How the attempt failed on this rank; None if it succeeded.
            makes_code: Whether there is code to run if it succeeds on all ranks.
        """
        self._votes += 1
        here, counted = f"{self._life}/{self._votes}", False
        try:
            first, named = json.loads(self._store.compare_set(f"{here}/what", "", json.dumps([self.name, what])))
            if named != what:
                text = f"rank {first} attempted {named} while rank {self.name} attempted {what}"
                self._store.compare_set(f"{here}/verdict", "", _dumped(Verdict(NONE, text=text)))
            else:
                self._store.set(f"{self._life}/at/{self._rank}", str(self._votes))
                if failure is not None:
                    mine = _dumped(Verdict(failure.outcome, self.name, failure))
                    self._store.compare_set(f"{here}/{failure.outcome}", "", mine)
                counted = failure is None  # if the next operation fails, it may still have been counted
                if self._store.add(f"{here}/votes", 1) == self.size:
                    self._conclude(here)
            verdict = _verdict(self._wait(f"{here}/verdict", lambda: self._silent(what), what))
            if verdict.outcome == NONE:
                return self._no_agreement(verdict.text)
        except RuntimeError as exc:
            return self._no_agreement(_lost(exc), may_run_eagerly=not counted)
        self._has_code |= makes_code and verdict.outcome == COMPILED
        self._tidy(here)
        return verdict

    def _conclude(self, here: str) -> None:
        """Write the verdict, because all have voted."""
        worst = _dumped(Verdict(COMPILED))
        for outcome in (PERMANENT, TRANSIENT):
            if self._store.check([f"{here}/{outcome}"]):
                worst = self._store.get(f"{here}/{outcome}").decode()
                break
        self._store.compare_set(f"{here}/verdict", "", worst)

    def _wait(self, key: str, otherwise: Callable[[], str], what: str = "") -> bytes:
        """Wait for a key. If no rank gives a sign of life for too long, write the other value, and return the first."""
        began = heard = looked = self._clock()
        beats: int | None = None  # some may be this rank's own, so only a later change is a sign of life
        told = False
        while not self._store.check([key]):
            now = self._clock()
            if what and now - looked >= self._period:
                new = self._store.add(f"{self._life}/{self._votes}/pulse", 0)
                heard = now if beats not in (None, new) else heard
                looked, beats = now, new
            if now - heard >= self.timeout or now - began >= LONGEST_COMPILE:
                return self._store.compare_set(key, "", otherwise())
            if not told and now - began >= self.timeout:  # so there has been a sign of life
                told = True
                self._tell_of_waiting(what, now - began)
            self._sleep(_pause(now - began))
        return self._store.get(key)

    def _tell_of_waiting(self, what: str, seconds: float) -> None:
        # Two ranks write the line, because one of them may be the one that is compiling.
        log.log(
            logging.WARNING if self._rank < 2 else logging.DEBUG,
            "%s: %s is compiled on rank %d, which has waited %.0f s for %s, still compiling; waiting further",
            *(self._function, what, self.name, seconds, self._in_words(self._not_voted())),
        )

    def _silent(self, what: str) -> str:
        absent = self._in_words(self._not_voted())
        text = f"rank {self.name} attempted {what}, and {absent} did not vote on it within {self.timeout:.4g} s"
        return _dumped(Verdict(NONE, text=text))

    def _not_voted(self) -> list[int]:
        at = self._store.multi_get([f"{self._life}/at/{rank}" for rank in range(self.size)])
        return [name for name, vote in zip(self._names, at, strict=True) if int(vote) < self._votes]

    def _no_agreement(self, text: str, *, may_run_eagerly: bool | None = None) -> Verdict:
        if may_run_eagerly is None:
            may_run_eagerly = not self._has_code
        self.over = Verdict(NONE, text=text, may_run_eagerly=may_run_eagerly)
        self._life = None
        return self.over

    def _tidy(self, here: str) -> None:
        """Delete the keys that all ranks have read: those from before the vote that is over."""
        if self.leads:
            with suppress(RuntimeError):
                for key in self._garbage:
                    self._store.delete_key(key)
            self._garbage = [f"{here}/{key}" for key in ("what", "votes", TRANSIENT, PERMANENT, "verdict", "pulse")]

    # The schedule

    def announce(self, due: Due) -> Due | None:
        """Announce, as the first rank, when the next attempt is due. Return None if the others have stopped waiting."""
        key = self._next_announcement()
        self._garbage.append(key)
        try:
            said = Due(*json.loads(self._store.compare_set(key, "", json.dumps(due))))
        except RuntimeError as exc:
            self._no_agreement(_lost(exc), may_run_eagerly=True)
            return None
        if said.stop and not due.stop:
            self._no_agreement(f"other ranks did not wait longer for rank {self.name}", may_run_eagerly=True)
            return None
        return said

    def hear(self, call: int) -> Due | None:
        """Wait for the first rank's announcement. Return None if there is none, so that there will be no attempt."""
        stop, first = json.dumps(Due(-1, -1, sure=False, stop=True)), self._names[0]
        try:
            due = Due(*json.loads(self._wait(self._next_announcement(), lambda: stop)))
        except RuntimeError as exc:
            self._no_agreement(_lost(exc), may_run_eagerly=True)
            return None
        if due.call == call:
            return due
        what = f"is in call {due.call}" if due.call >= 0 else f"did not say when, within {self.timeout:.4g} s"
        text = f"rank {self.name} is in call {call}, where an attempt may be due, but rank {first} {what}"
        self._no_agreement(text, may_run_eagerly=True)
        return None

    def _next_announcement(self) -> str:
        self._announcements += 1
        return f"{self._life}/due/{self._announcements}"

    # Starting anew

    def start_anew(self, request: str, patience: float) -> str:
        """Start a new life if all ranks do so in the same call with the same request.

        Returns:
            An empty string; if they do not, the reason in words.
        """
        try:
            if self._shake_hands(request, patience):
                self.over = None
                return ""
            return f"{self._in_words(self._without_hello(request))} did not, within {patience:.4g} s"
        except RuntimeError as exc:
            return _lost(exc)

    def _shake_hands(self, purpose: str, patience: float) -> bool:
        """Agree on a new life with all ranks that come for the same purpose. Return False if not all come in time.

        The first rank collects a *hello* from each rank, and invites them to a life. A rank that finds its own hello in
        the invitation accepts. The last one to accept starts the life, unless another has called it off before.
        """
        store, mine = self._store, f"{uuid.uuid4().hex[:16]} {purpose}"
        store.set(f"hello/{self._rank}", mine)
        began = self._clock()
        invited: list[str] | None = None
        seen = life = ""
        while True:
            if self.leads and (present := self._present(purpose)) is not None and present != invited:
                invited, offer = present, uuid.uuid4().hex
                store.set(f"{offer}/members", json.dumps(invited))
                store.set("offer", offer)
            if store.check(["offer"]) and (offer := store.get("offer").decode()) != seen:
                seen = offer
                if mine in json.loads(store.get(f"{offer}/members")):
                    life = offer
                    store.set(f"{life}/at/{self._rank}", "0")
                    if store.add(f"{life}/accepted", 1) == self.size:
                        store.compare_set(f"{life}/outcome", "", _GO)
            if life and store.check([f"{life}/outcome"]):
                break
            if (waited := self._clock() - began) >= patience:
                if life:
                    store.compare_set(f"{life}/outcome", "", _OFF)
                break
            self._sleep(_pause(waited))
        starts = bool(life) and store.get(f"{life}/outcome").decode() == _GO
        if starts:
            self._life, self._votes, self._announcements, self._garbage = life, 0, 0, []
            store.set(f"hello/{self._rank}", _NOBODY)
        return starts

    def _present(self, purpose: str) -> list[str] | None:
        """Return all hellos; None unless all ranks have come for this purpose."""
        keys = [f"hello/{rank}" for rank in range(self.size)]
        if not self._store.check(keys):
            return None
        hellos = [hello.decode() for hello in self._store.multi_get(keys)]
        return hellos if all(hello.partition(" ")[1:] == (" ", purpose) for hello in hellos) else None

    def _without_hello(self, purpose: str) -> list[int]:
        absent = []
        for rank, name in enumerate(self._names):
            key = f"hello/{rank}"
            if not self._store.check([key]) or self._store.get(key).decode().partition(" ")[1:] != (" ", purpose):
                absent.append(name)
        return absent

    def _in_words(self, ranks: list[int]) -> str:
        """Name some ranks, at most eight of them."""
        if not ranks:
            return "another rank"
        listed = ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")
        return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def _pause(waited: float) -> float:
    return min(max(waited * _SHARE, _SHORTEST_PAUSE), _LONGEST_PAUSE)


def _lost(exc: Exception) -> str:
    return f"the group's store has failed: {exc}".partition("\n")[0]


def _dumped(verdict: Verdict) -> str:
    return json.dumps(verdict)


def _verdict(text: bytes) -> Verdict:
    outcome, rank, failure, *rest = json.loads(text)
    return Verdict(outcome, rank, Failure(*failure) if failure is not None else None, *rest)


__all__ = ["COMPILED", "LONGEST_COMPILE", "NONE", "PERMANENT", "TRANSIENT", "Agreement", "Due", "Failure", "Store"]
