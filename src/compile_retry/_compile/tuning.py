"""Tuning again: code that was chosen while some of Inductor's autotuning candidates could not be timed.

Such code is used at once, and its frame is compiled again when an attempt is due. Until that succeeds, Dynamo keeps the
code: only the call that tunes again passes it by, because of a guard that fails in that call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compile_retry._locks import Lock
from compile_retry._record.journal import Journal
from compile_retry._schedule.breaker import Breaker
from compile_retry._schedule.episode import NextRetry
from compile_retry._schedule.policy import RetryPolicy
from compile_retry._torch.eager import may_run_again
from compile_retry.events import log

from .admission import Admission
from .call import Conversion, PartlyTuned, Tally, Turn

if TYPE_CHECKING:
    from compile_retry._torch.cache_entries import CachedFrame


class Retuning:
    """The code of one function that is to be tuned again, and the schedule for it.

    Attributes:
        breaker: Decides when an attempt is due. Nothing is held off meanwhile.
    """

    def __init__(self, policy: RetryPolicy, admission: Admission, journal: Journal) -> None:
        self.breaker = Breaker(policy, "tuning")
        self._admission, self._journal = admission, journal
        self._lock = Lock()
        self._waiting: tuple[PartlyTuned, ...] = ()  # in the order of their turns; replaced, never mutated

    def next_retry(self, calls: int) -> NextRetry | None:
        """Return the next due moment, after `calls` calls; None if nothing is to be tuned again."""
        return self.breaker.next_retry(calls)

    # Calls

    def begin(self, tally: Tally, call: int) -> Turn | None:
        """Let a call tune a frame again, if that is due. Follow it by `end`.

        Not if a backward pass may repeat the call, or if the user does not want recompiles: the frame would run eagerly
        in this call if the attempt failed.
        """
        episode, waiting = self.breaker.episode, self._waiting
        if episode is None or not waiting or not episode.is_due(call, self.breaker.policy.clock):
            return None
        from compile_retry._torch.functions import recompiles_freely

        if tally.turn is not None or may_run_again() or not recompiles_freely():
            return None
        probe = self.breaker.let_through(call) if self._admission.admits(tally, waiting[0].key) else None
        if probe is None:
            return None
        tally.turn = turn = Turn(waiting[0], probe)
        return turn

    def end(self, tally: Tally, turn: Turn) -> None:
        """End a call's turn. The next one goes to the next frame."""
        turn.close()
        tally.turn = None
        self.breaker.probe_ended()
        if turn.old in self._waiting:
            self._wait(without=turn.old, new=turn.old if turn.old.entry.alive else None)
        if turn.superseded is not None:
            turn.superseded.drop_now()

    def retry_now(self) -> None:
        """Make an attempt due now."""
        self.breaker.retry_now()

    def stop(self) -> None:
        """Leave all code as it is."""
        with self._lock:
            self._waiting = ()
        self.breaker.end()

    # Attempts

    def compiled(self, conversion: Conversion, tally: Tally, entry: CachedFrame | None, seconds: float) -> None:
        """Record that a frame is compiled, and schedule another attempt if candidates could not be timed.

        Args:
            conversion: The frame.
            tally: This thread's tally.
            entry: Its entry in Dynamo's cache; None if the code must not be tuned again.
            seconds: The attempt's duration.
        """
        turn, reason = tally.turn if conversion.is_retuning else None, conversion.tuning.reason
        if reason is None:
            if turn is not None:
                self._supersede(turn)
                self._journal.tuned(tally.call, conversion.location)
            return
        due = None
        # If nothing is known about the reason, one more attempt is enough to see if it was a passing one.
        has_not_helped = turn is not None and not conversion.tuning.is_explained
        if entry is not None and not has_not_helped and self._schedule(reason, conversion, tally, seconds)[1]:
            self._add(PartlyTuned(conversion, entry), turn)
            due = self.next_retry(tally.call)
        elif turn is not None:
            self._supersede(turn)
        self._journal.partly_tuned(
            tally.record,
            tally.call,
            conversion.location,
            timed=conversion.tuning.timed,
            candidates=conversion.tuning.candidates,
            reason=reason,
            due=due,
        )

    def failed(self, reason: BaseException, conversion: Conversion, tally: Tally, seconds: float) -> tuple[int, bool]:
        """Record that tuning again has failed. The code stays in use.

        Args:
            reason: The root cause.
            conversion: The frame.
            tally: This thread's tally.
            seconds: The attempt's duration.

        Returns:
            The attempt's number, and whether another one will be made.
        """
        attempt, retry = self._schedule(reason, conversion, tally, seconds)
        if tally.turn is not None and not retry:
            self._wait(without=tally.turn.old)
        return attempt, retry

    def _schedule(
        self, reason: BaseException, conversion: Conversion, tally: Tally, seconds: float
    ) -> tuple[int, bool]:
        try:
            return self.breaker.failed(reason, tally.call, conversion.began, seconds)
        except Exception:
            log.exception("%s: the retry policy raised; its code is not tuned again", self._journal.name)
            return 1, False

    def _add(self, new: PartlyTuned, turn: Turn | None) -> None:
        if turn is not None and turn.old.is_better_than(new):
            turn.superseded = new.entry
            return
        new.entry.add_guard(new.may_run)
        self._wait(new=new)
        if turn is not None:
            self._supersede(turn)

    def _supersede(self, turn: Turn) -> None:
        turn.superseded = turn.old.entry
        self._wait(without=turn.old)

    def _wait(self, *, without: PartlyTuned | None = None, new: PartlyTuned | None = None) -> None:
        """Change what waits. When nothing does, there is nothing to schedule."""
        with self._lock:
            rest = tuple(code for code in self._waiting if code is not without)
            self._waiting = rest if new is None else (*rest, new)
        if not self._waiting:
            self.breaker.end()
