"""Agreement between ranks on a frame with collectives that some rank cannot compile.

Eager and compiled code may issue different collectives, so a rank must not run such a frame eagerly while others run it
compiled. `settle_together` repeats the attempt in place until the frame compiles, all ranks have agreed to run it
eagerly, or time is up.

The agreement is a two-phase commit in the key-value store of the default group:

1. A rank that has failed several times writes a *hello* with a nonce, and keeps retrying.
2. When all ranks have written one, rank 0 writes an *invitation* to a round, with all nonces. A rank that finds its own
   nonce in it *accepts*: it stops retrying, and waits.
3. The last rank to accept writes the round's outcome: eager. Until then, any rank may write the other outcome: off. The
   first write wins, and all ranks follow it.

So a rank runs eagerly only after every rank has stopped retrying, and resumes only if that round can no longer end in
eager. Keys left in the store by an earlier run of the job do no harm, because nonces and round names are never reused.

All ranks of the default group must take part, even if the collectives belong to a subgroup. Only ranks that issue the
same collectives everywhere stay in step, and a graph does not show which groups the code around it uses. A subgroup
with a shorter timeout ends the wait sooner, with its own error.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from compile_retry._failures import Location, in_words, is_fatal, qualified_name, release, root_cause
from compile_retry._torch import distributed
from compile_retry.events import log

T = TypeVar("T")

# Failed attempts before a rank is ready to give up, so that a short failure passes first.
_ATTEMPTS = 3
# Seconds between attempts (first and longest), and between polls of the store.
_FIRST_PAUSE, _LONGEST_PAUSE, _POLL = 0.1, 5.0, 0.05

_EAGER, _OFF = "eager", "off"
_AWAY = "null"
_INVITATION = "invitation"
# Maximum length of a cause's message in an error message.
_LINE = 200


class RanksDisagreeError(RuntimeError):
    """Raised if a frame may not run compiled on this rank, and not all ranks agree to run it eagerly.

    Running the frame eagerly on this rank alone could hang the job, or give wrong results without an error.
    """


def settle_together(
    frame: Location,
    call: int,
    collectives: tuple[str, ...],
    attempt: Callable[[], T],
    *,
    heal: Callable[[], object],
    spent: float = 0.0,
    world: distributed.World | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> T | None:
    """Repeat an attempt in place until a frame compiles or all ranks have agreed to run it eagerly.

    Call it after a failure, before any of the frame has run. It starts no attempt after half the group's timeout.

    Args:
        frame: The frame's function, file and line.
        call: Number of the decorated function's call. Only ranks in the same call can agree.
        collectives: Names of the collectives in this frame, for messages.
        attempt: Compiles the frame and returns the result, which is not None, or raises.
        heal: Called before each attempt.
        spent: Duration of the failed first attempt, in seconds.
        world: The process group; by default the default group. Tests pass their own.
        clock: A monotonic clock in seconds.
        sleep: Waits for the given number of seconds.

    Returns:
        The result of `attempt`; None if all ranks run the frame eagerly from now on.

    Raises:
        RanksDisagreeError: Neither happened in time.
    """
    world = distributed.world() if world is None else world
    patience = world.timeout / 2
    where, what = in_words(frame), ", ".join(collectives)
    log.warning(
        "%s contains collectives (%s) and could not be compiled on rank %d; retrying for up to %.4g s",
        *(where, what, world.rank, patience),
    )
    meeting = _Meeting(world, frame, call)
    meeting.open()
    attempts = _Attempts(meeting, attempt, heal, clock, sleep)
    try:
        compiled = attempts.make(patience, spent)
    finally:
        meeting.leave()
    if meeting.agreed:  # even if there is code by now: the other ranks run eagerly already
        log.error("%s could not be compiled on any rank; all ranks run it eagerly from now on", where)
        return None
    if compiled is not None:
        log.warning("%s: compiled on rank %d after all", where, world.rank)
        return compiled
    raise RanksDisagreeError(
        f"{where} could not be compiled on rank {world.rank} within {patience:.4g} s, half of the process group's "
        f"timeout. It contains collectives ({what}), and not all {world.size} ranks have given up compiling it. "
        "So it must not run eagerly here: eager and compiled code may issue different collectives. The last attempt "
        f"failed with {attempts.failure}.{meeting.trouble} Repair the compiler on this rank and restart from a "
        "checkpoint. With `group=`, all ranks of a group fall back and retry together. A larger `timeout` of "
        "`init_process_group` leaves more time for attempts. To run without a compiler, set "
        "TORCH_COMPILE_DISABLE=1 on every rank."
    )


class _Attempts(Generic[T]):
    """One rank's attempts, and the pauses between them, in which it takes part in the meeting."""

    def __init__(
        self,
        meeting: _Meeting,
        attempt: Callable[[], T],
        heal: Callable[[], object],
        clock: Callable[[], float],
        sleep: Callable[[float], object],
    ) -> None:
        self.failure = ""
        self._meeting = meeting
        self._attempt = attempt
        self._heal = heal
        self._clock = clock
        self._sleep = sleep

    def make(self, patience: float, spent: float) -> T | None:
        """Repeat the attempt until one succeeds, the meeting agrees or time is up."""
        deadline = self._clock() + patience - spent
        failed, longest, pause = 0, 0.0, _FIRST_PAUSE
        while True:
            began = self._clock()
            compiled = self._attempt_once()
            if compiled is not None:
                return compiled
            now = self._clock()
            failed, longest = failed + 1, max(longest, now - began)
            pause_ends = now + pause
            is_last = pause_ends + longest > deadline
            if is_last or failed >= _ATTEMPTS:
                self._meeting.attend()
            self._wait(max(pause_ends, deadline) if is_last else pause_ends, deadline)
            if self._meeting.agreed or self._clock() >= deadline:
                self._meeting.call_off()
                return None
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _attempt_once(self) -> T | None:
        try:
            self._heal()
            return self._attempt()
        except Exception as exc:
            if is_fatal(exc):
                raise
            root = root_cause(exc)
            self.failure = f"{qualified_name(root)}: {root}".removeprefix("builtins.").removesuffix(": ")[:_LINE]
            release(exc)
            return None

    def _wait(self, pause_ends: float, deadline: float) -> None:
        """Pause. While this rank is bound to a round of the meeting, wait for the outcome instead."""
        while True:
            self._meeting.look()
            end = max(pause_ends, deadline) if self._meeting.bound else pause_ends
            left = end - self._clock()
            if self._meeting.agreed or left <= 0:
                return
            self._sleep(min(left, _POLL))


class _Meeting:
    """This rank's part in the agreement on one frame, through the group's store.

    Attributes:
        bound: The round that this rank has accepted; empty if none. Until its outcome is known, this rank must not
            attempt the frame.
        agreed: Whether all ranks run the frame eagerly from now on.
        trouble: A sentence that explains why ranks cannot agree, for the error message; empty if they can.
    """

    def __init__(self, world: distributed.World, frame: Location, call: int) -> None:
        function, file, line = frame
        # File name only, because directories may differ between hosts.
        self._store = world.substore(f"compile_retry/{function}:{Path(file).name}:{line}/{call}")
        self._world = world
        self._nonce = uuid.uuid4().hex
        self._present = False
        self._invited: list[str] | None = None
        self.bound = ""
        self.agreed = False
        self.trouble = ""

    def open(self) -> None:
        """Remove hellos left by an earlier run of the job. Ranks that take part now write theirs again."""
        if self._world.rank == 0:
            with self._surviving_the_store():
                for rank in range(self._world.size):
                    self._store.set(_hello(rank), _AWAY)

    def attend(self) -> None:
        """Write a hello. Repeated after each failed attempt, because the counts of collectives may have changed."""
        issued = self._world.issued()
        if issued is None:  # then ranks cannot check that they are at the same point of the program
            self.trouble = " The group's backend does not count collectives, so ranks cannot agree."
            return
        with self._surviving_the_store():
            self._present = True
            self._store.set(_hello(self._world.rank), json.dumps([self._nonce, issued]))

    def look(self) -> None:
        """Read the store and react to it."""
        if not self._present:
            return
        with self._surviving_the_store():
            leads = self._world.rank == 0
            if leads and not self.bound:
                self._invite()
            if not self.bound:
                self._accept()
            if leads and self.bound and self._nonces() != self._invited:
                self.call_off()  # a rank has left, or has left and come back
            if self.bound and self._store.check([_outcome(self.bound)]):
                self._obey(self._store.get(_outcome(self.bound)))

    def call_off(self) -> None:
        """Call off the round that this rank is bound to. If an outcome is already written, follow it instead."""
        if self.bound:
            with self._surviving_the_store():
                self._obey(self._store.compare_set(_outcome(self.bound), "", _OFF))

    def leave(self) -> None:
        """End this rank's part. Always called."""
        if self._present:
            self.call_off()
            with self._surviving_the_store():
                self._store.set(_hello(self._world.rank), _AWAY)

    @contextmanager
    def _surviving_the_store(self) -> Iterator[None]:
        # Without the store there is no agreement, but an attempt may still succeed. A bound rank stays bound.
        try:
            yield
        except RuntimeError as exc:
            self.trouble = f" The group's store has failed: {exc}."

    def _obey(self, outcome: bytes) -> None:
        self.agreed = outcome.decode() == _EAGER
        self.bound = ""

    def _invite(self) -> None:
        self._invited = self._nonces()
        if self._invited is not None:
            self._store.set(_INVITATION, json.dumps([uuid.uuid4().hex, self._invited]))

    def _accept(self) -> None:
        if not self._store.check([_INVITATION]):
            return
        invitation, nonces = json.loads(self._store.get(_INVITATION))
        if nonces[self._world.rank] == self._nonce:
            self.bound = invitation  # before the store call: if that fails, the acceptance may still have been counted
            if self._store.add(f"{invitation}/accepted", 1) == self._world.size:
                self._store.compare_set(_outcome(invitation), "", _EAGER)

    def _nonces(self) -> list[str] | None:
        """Return the nonces of all ranks; None unless all are present and at the same point of the program."""
        keys = [_hello(rank) for rank in range(self._world.size)]
        if not self._store.check(keys):
            return None
        hellos = [json.loads(hello) for hello in self._store.multi_get(keys)]
        if None in hellos or not _are_in_step([issued for _, issued in hellos]):
            return None
        return [nonce for nonce, _ in hellos]


def _are_in_step(issued: list[dict[str, int]]) -> bool:
    """Return True if the members of each group have issued the same number of collectives in it.

    If collectives do not block the host, a rank may be some calls ahead of the others and have run compiled code in
    them. Then the ranks are not at the same point of the program, although the frame is the same.
    """
    first: dict[str, int] = {}
    return all(first.setdefault(group, count) == count for counts in issued for group, count in counts.items())


def _hello(rank: int) -> str:
    return f"hello/{rank}"


def _outcome(invitation: str) -> str:
    return f"{invitation}/outcome"
