"""The journal of one function: turns what happens into counts, events and log lines, in the right order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from compile_retry._failures import CompileFailure, Location, in_words, qualified_name, summary
from compile_retry._locks import Lock
from compile_retry._schedule.breaker import Breaker
from compile_retry._schedule.episode import Episode, NextRetry
from compile_retry._stats import CompileState
from compile_retry._switches import is_strict
from compile_retry.events import (
    AttemptFailed,
    AttemptPostponed,
    AttemptStarted,
    Bypassed,
    CacheMoved,
    Compiled,
    DeviceLost,
    Event,
    GaveUp,
    PartlyTuned,
    RecompileLimit,
    Recovered,
    RequestFailed,
    RetryScheduled,
    StillCompiling,
    StillEager,
    SweptAway,
    Tuned,
    publish,
)

from .heartbeat import heartbeat
from .history import CallPath, History, Sample
from .record import Record, Records

# Seconds of hold-off before the first reminder; the next ones come after twice as many, four times as many, and so on.
FIRST_REMINDER = 60.0


_reasons_told: set[str] = set()  # for which the library had no effect on a call of any function


def start_anew() -> None:
    """Forget what has been told once in this process. Tests need that."""
    _reasons_told.clear()


def _in_words(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    return f"{qualified_name(error).removeprefix('builtins.')}: {error}".partition("\n")[0].removesuffix(": ")


class _Unpublished(threading.local):
    """This thread's events that are still to be published. They lack the function's state."""

    def __init__(self) -> None:
        self.events: list[partial[Event]] = []


class Journal:
    """Counts, logs and publishes what happens to one function, or to several that share their compiled code.

    Events are noted where they occur, possibly under locks. `tell` publishes them after the thread has released its
    locks. An event has no log line if another event's line says the same. If ranks agree on the function's attempts,
    the lines of all but the first rank are for debugging, except those about failures of their own.

    Attributes:
        name: The function's name.
        records: The records of the functions that share.
        bypassed: The reasons for which the library had no effect on a call, in words.
        rank: This process's rank, if the function has a group of ranks.
    """

    def __init__(self, name: str, breaker: Breaker, state: Callable[[], CompileState]) -> None:
        self.name = name
        self.records = Records()
        self.bypassed: dict[str, None] = {}  # in the order in which they were found
        self._breaker, self._policy, self._state = breaker, breaker.policy, state
        self._unpublished = _Unpublished()
        self._not_compiled_before = 0  # the episode
        self._reminders = Lock()
        self._reminder: tuple[float, float] | None = None  # the episode's start, and the due time of the next reminder
        self.rank: int | None = None
        self._ranks, self._leads = 1, True

    def speaks_for(self, rank: int, ranks: int, *, leads: bool) -> None:
        """Set this process's rank, the number of ranks in the group, and whether it is the first one."""
        self.rank, self._ranks, self._leads = rank, ranks, leads

    def tell(self) -> None:
        """Publish the events noted in this thread. Call it only while holding no lock."""
        events = self._unpublished.events
        while events:
            self._publish(events.pop(0)(state=self._state()))

    def _publish(self, event: Event) -> None:
        records = self.records.alive()
        for record in records:
            record.history.add_event(event)
        publish(event, *(record.hooks for record in records))

    def _not_compiled(self) -> int:
        """Count the calls of all functions that ran eagerly, at least in part."""
        totals = self.records.totals()
        return totals.eager_calls + totals.mixed_calls

    def _who(self) -> dict[str, Any]:
        """Return the fields of an event that say whose it is."""
        records = self.records.alive()
        fqns = tuple(dict.fromkeys(record.fqn for record in records if record.fqn))  # a model's copy has the same ones
        return {"function": self.name, "functions": len(records), "fqns": fqns, "rank": self.rank}

    def _note(
        self,
        kind: type[Event],
        call: int,
        message: str,
        level: int | None,
        time: float | None = None,
        *,
        is_own: bool = False,
        **details: Any,
    ) -> None:
        if level is not None and not (self._leads or is_own):
            level = logging.DEBUG
        time = self._policy.clock() if time is None else time
        event = partial(
            kind,
            **self._who(),
            call=call,
            time=time,
            message=message,
            level=level,
            **details,
        )
        self._unpublished.events.append(event)

    def attempt_started(self, call: int, graph: int) -> AbstractContextManager[None]:
        """Publish the start of an attempt at once. While the returned context lasts, report that it still runs."""
        message = f"compiling graph {graph} of call {call}"
        self._note(AttemptStarted, call, message, None, graph=graph)
        self.tell()

        def report(seconds: float) -> None:
            message = f"still compiling graph {graph} of call {call} after {seconds:.0f} s"
            event = StillCompiling(
                **self._who(),
                call=call,
                time=self._policy.clock(),
                state=self._state(),
                message=message,
                level=logging.WARNING,
                graph=graph,
                seconds=seconds,
            )
            self._publish(event)

        return heartbeat(report)

    def compiled(self, record: Record, call: int, graph: int, seconds: float, *, first: bool) -> None:
        next(record.books.attempts)
        message = f"compiled in call {call}"
        self._note(Compiled, call, message, logging.INFO if first else None, graph=graph, seconds=seconds)

    def failed(self, record: Record, failure: CompileFailure, *, began: float, seconds: float, how_long: str) -> None:
        """Note a failed attempt when its call is over. The event's time is the time of the failure.

        Args:
            record: The record of the function in whose call it failed.
            failure: The failure.
            began: The policy's clock when the attempt began.
            seconds: The attempt's duration.
            how_long: For a permanent failure, when the frame runs eagerly, in words.
        """
        self._count_failure(record, seconds)
        time = began + seconds
        if failure.attempt == 1:
            self._not_compiled_before = self._not_compiled()
        what, where = summary(failure), in_words(failure.frame)
        is_own = failure.rank is not None and failure.rank == self.rank
        eagerly = "running eagerly" if failure.rank is None else f"all {self._ranks} ranks run eagerly"
        due = self._breaker.next_retry(failure.call)
        if is_strict():
            message, gave_up = f"{what}; strict mode raises", ""
        elif failure.kind == "permanent":
            message = what
            on = "" if failure.rank is None else f" on rank {failure.rank}"
            gave_up = f"{where} cannot be compiled{on}: {failure}; it runs eagerly {how_long} and will not be retried"
        elif due is None and self._breaker.episode is not None:
            message, gave_up = what, f"{what}; giving up, {eagerly} until reset() or retry_now()"
        else:
            # There is no due moment if another thread's call has ended the episode in the meantime.
            message, gave_up = f"{what}; {eagerly}, next attempt {due or 'on its next call'}", ""
        level = None if gave_up else logging.WARNING
        self._note(AttemptFailed, failure.call, message, level, time, is_own=is_own, failure=failure, seconds=seconds)
        if gave_up:
            self._note(GaveUp, failure.call, gave_up, logging.ERROR, time, is_own=is_own, failure=failure)
        elif due is not None:
            self._note(RetryScheduled, failure.call, f"next attempt {due}", None, time, next_retry=due)

    def _count_failure(self, record: Record, seconds: float) -> None:
        next(record.books.attempts)
        next(record.books.failures)
        record.books.add_seconds(seconds)

    def failed_in_place(self, record: Record, failure: CompileFailure, *, began: float, seconds: float) -> None:
        """Note a failed attempt that is retried in place, without a log line: the ranks' agreement logs its own."""
        self._count_failure(record, seconds)
        message = f"{summary(failure)}; retrying in place because other ranks are waiting"
        self._note(AttemptFailed, failure.call, message, None, began + seconds, failure=failure, seconds=seconds)

    def gave_up_together(self, failure: CompileFailure) -> None:
        """Note that all ranks run the function eagerly, without a log line for the same reason."""
        message = f"{in_words(failure.frame)} cannot be compiled on any rank: {failure}; all ranks run it eagerly"
        self._note(GaveUp, failure.call, message, None, failure=failure)

    def cannot_agree(self, failure: CompileFailure) -> None:
        """Note that the ranks of a group cannot agree, so that this one runs the function eagerly from now on."""
        message = (
            f"the ranks do not agree in call {failure.call}: {failure.message}; running eagerly until retry_now() or"
            " reset() is called on all ranks"
        )
        self._note(GaveUp, failure.call, message, logging.ERROR, is_own=True, failure=failure)

    def request_failed(self, call: int, request: str, trouble: str) -> None:
        """Note that the ranks of a group did not all ask for a retry, so that nothing changes."""
        message = f"{request}() has no effect in call {call}, because not all ranks have called it: {trouble}"
        self._note(RequestFailed, call, message, logging.WARNING, is_own=True)

    def postponed(self, call: int, next_retry: NextRetry, *, is_first: bool) -> None:
        """Note that something which has not failed is not attempted now, because other functions' attempts failed.

        Only the first function that says so does it as a warning: with a broken compiler, all of them say so.
        """
        message = (
            "attempts of other functions have failed, so what is not compiled yet runs eagerly; next attempt"
            f" {next_retry}"
        )
        level = logging.WARNING if is_first else logging.INFO
        self._note(AttemptPostponed, call, message, level, next_retry=next_retry)

    def missed(self, failure: CompileFailure, call: int) -> None:
        """Note that a graph was held off in the only call in which torch passes it to the backend."""
        message = (
            f"a graph that takes sizes was held off in call {call}; torch does not compile it again, so it runs"
            " eagerly until torch.compiler.reset()"
        )
        self._note(GaveUp, call, message, logging.ERROR, failure=failure)

    def partly_tuned(
        self,
        record: Record,
        call: int,
        location: Location,
        *,
        timed: int,
        candidates: int,
        reason: BaseException,
        due: NextRetry | None,
    ) -> None:
        """Note an attempt whose autotuning could not time all candidates.

        Args:
            record: The record of the function in whose call it was made.
            call: The call.
            location: The frame.
            timed: How many autotuning candidates were timed.
            candidates: The number of candidates.
            reason: Why a candidate could not be timed.
            due: The due moment of the attempt to tune it again; None if there will be none.
        """
        next(record.books.partly_tuned)
        error, then = _in_words(reason), f"tuning again {due}" if due else "it will not be tuned again"
        how_many = f"only {timed} of {candidates} autotuning candidates could be timed"
        message = f"{in_words(location)} is compiled, but {how_many}: {error}; {then}"
        self._note(
            PartlyTuned,
            call,
            message,
            logging.WARNING,
            timed=timed,
            candidates=candidates,
            error=error,
            next_retry=due,
        )

    def retuning_failed(
        self, record: Record, failure: CompileFailure, due: NextRetry | None, *, began: float, seconds: float
    ) -> None:
        """Note that tuning again has failed, so that the code stays as it is."""
        self._count_failure(record, seconds)
        then = f"tuning again {due}" if due else "it will not be tuned again"
        message = f"{summary(failure)}; its code stays in use, {then}"
        self._note(
            AttemptFailed, failure.call, message, logging.WARNING, began + seconds, failure=failure, seconds=seconds
        )

    def tuned(self, call: int, location: Location) -> None:
        message = f"{in_words(location)} is tuned in call {call}, and all autotuning candidates were timed"
        self._note(Tuned, call, message, logging.WARNING)

    def lost_device(self, call: int, error: BaseException) -> None:
        self._not_compiled_before = self._not_compiled()
        what = _in_words(error)
        message = f"the accelerator's context is lost in call {call}: {what}; nothing is compiled until reset()"
        self._note(DeviceLost, call, message, logging.ERROR, error=what)

    def recovered(self, record: Record, call: int, episode: Episode, time: float) -> None:
        next(record.books.recoveries)
        seconds = time - episode.started
        attempts = "1 failed attempt" if episode.failures == 1 else f"{episode.failures} failed attempts"
        self._note(
            Recovered,
            call,
            f"recovered in call {call}, after {attempts} and {seconds:.3g} s; running compiled code",
            logging.WARNING,
            time,
            seconds=seconds,
            failures=episode.failures,
            attempt_seconds=episode.spent,
            eager_calls=self.eager_calls,
        )

    def swept_away(self, call: int, time: float) -> None:
        message = "nothing left to retry: the fallback is gone, or torch.compile skips it"
        self._note(SweptAway, call, message, logging.INFO, time)

    @property
    def eager_calls(self) -> int:
        """The number of calls that ran eagerly, at least in part, since the episode began."""
        return self._not_compiled() - self._not_compiled_before

    def over_limit(self, call: int, location: Location) -> None:
        message = (
            f"{in_words(location)} reached the recompile limit; calls that do not match its compiled code run eagerly"
            " from now on"
        )
        self._note(RecompileLimit, call, message, logging.WARNING)

    def moved(self, call: int, directory: str) -> None:
        message = (
            f"compiled in call {call} using another cache directory, because files in {directory} are damaged or not"
            " writable; this process keeps using it. Other processes will fail in the old directory too: delete it or"
            " make it writable once no process uses it"
        )
        self._note(CacheMoved, call, message, logging.WARNING, directory=directory)

    def found_bypassed(self, call: int, reason: str) -> None:
        """Note, once for each reason, that the library has no effect on a call.

        Args:
            call: The call's number.
            reason: The reason, in words.
        """
        if reason not in self.bypassed:
            self.bypassed[reason] = None
            level = logging.INFO if reason in _reasons_told else logging.WARNING  # most apply to all functions
            _reasons_told.add(reason)
            self._note(Bypassed, call, f"bypassed: {reason}", level, reason=reason)

    def took(self, record: Record, call: int, path: CallPath, began: float, *, attempted: bool) -> None:
        """Record a call that was timed, or that made an attempt, and is over.

        Args:
            record: The function's record.
            call: The call's number.
            path: The code that ran: compiled, eager or both.
            began: The policy's clock when the call began, or the first attempt of a call that was not timed.
            attempted: Whether the call made an attempt.
        """
        now = self._policy.clock()
        record.history.add(Sample(now, call, path, now - began, attempted=attempted))
        self._remind(record.history, call)

    def _remind(self, history: History, call: int) -> None:
        """Note that the function still runs eagerly, if a reminder is due."""
        episode, now = self._breaker.episode, self._breaker.policy.clock()
        if episode is None or now < episode.started + FIRST_REMINDER:
            return
        with self._reminders:
            of, due = self._reminder or (None, 0.0)
            if of == episode.started and now < due:
                return
            self._reminder = episode.started, now + (now - episode.started)
        eager, compiled = history.seconds_per_call("eager"), history.seconds_per_call("compiled")
        calls, seconds, lost, slowdown = self.eager_calls, now - episode.started, None, None
        message = f"still running eagerly, {calls} calls in the {seconds:.0f} s since the first failure"
        if eager and compiled:
            slowdown, lost = eager / compiled, max(0.0, calls * (eager - compiled))
            message += f"; an eager call takes {slowdown:.2g} times as long as a compiled one, {lost:.0f} s lost so far"
        next_retry = self._breaker.next_retry(call)
        message += f"; next attempt {next_retry}" if next_retry else "; no retry will come"
        self._note(
            StillEager,
            call,
            message,
            logging.WARNING,
            eager_calls=calls,
            seconds=seconds,
            slowdown=slowdown,
            seconds_lost=lost,
            next_retry=next_retry,
        )
