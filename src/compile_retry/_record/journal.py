"""Puts what happens to one function into events and log lines, in the right order, and keeps its history."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from compile_retry._failures import CompileFailure, Location, in_words, summary
from compile_retry._locks import Lock
from compile_retry._schedule.breaker import Breaker, Episode
from compile_retry._stats import CompileState
from compile_retry._strict import is_strict
from compile_retry.events import (
    AttemptFailed,
    AttemptStarted,
    CacheMoved,
    Compiled,
    Event,
    GaveUp,
    RecompileLimit,
    Recovered,
    RetryScheduled,
    StillCompiling,
    StillEager,
    SweptAway,
    publish,
)

from .heartbeat import heartbeat
from .history import CallPath, History, Sample
from .live import WeakRegistry
from .record import Record

# Seconds of hold-off until the log says so again; then twice as many, and so on.
FIRST_REMINDER = 60.0


class _Untold(threading.local):
    """Events that this thread tells once it holds no lock. They still lack the function's state."""

    def __init__(self) -> None:
        self.events: list[partial[Event]] = []


class Journal:
    """Counts and tells what happens to one function, or to several that share their compiled code.

    Events are noted where things happen, under whatever locks, and told when the thread has let go of them. What the
    line of another event says as well gets no line in the log.
    """

    def __init__(self, name: str, breaker: Breaker, state: Callable[[], CompileState]) -> None:
        self.name = name
        self.records = WeakRegistry[Record]()
        self._breaker, self._policy, self._state = breaker, breaker.policy, state
        self._untold = _Untold()
        self._not_compiled_before = 0  # the episode
        self._reminders = Lock()
        self._reminder: tuple[float, float] | None = None  # of which episode, and when the next one is due

    def tell(self) -> None:
        """Tell what has been noted in this thread. To be called where no lock is held."""
        untold = self._untold.events
        while untold:
            self._publish(untold.pop(0)(state=self._state()))

    def _publish(self, event: Event) -> None:
        records = self.records.alive()
        for record in records:
            record.history.add_event(event)
        publish(event, *(record.hooks for record in records))

    def _not_compiled(self) -> int:
        """Count the calls of all functions that ran eagerly, at least in part."""
        return sum(record.books.not_compiled for record in self.records.alive())

    def _note(
        self,
        kind: type[Event],
        call: int,
        message: str,
        level: int | None,
        time: float | None = None,
        **details: Any,
    ) -> None:
        time = self._policy.clock() if time is None else time
        event = partial(
            kind,
            function=self.name,
            functions=len(self.records.alive()),
            call=call,
            time=time,
            message=message,
            level=level,
            **details,
        )
        self._untold.events.append(event)

    def attempt_started(self, call: int, graph: int) -> AbstractContextManager[None]:
        """To be told at once; and while the block lasts, now and then, that the attempt still runs."""
        message = f"compiling graph {graph} of call {call}"
        self._note(AttemptStarted, call, message, None, graph=graph)
        self.tell()

        def still(seconds: float) -> None:
            message = f"still compiling graph {graph} of call {call}, {seconds:.0f} s"
            event = StillCompiling(
                function=self.name,
                functions=len(self.records.alive()),
                call=call,
                time=self._policy.clock(),
                state=self._state(),
                message=message,
                level=logging.WARNING,
                graph=graph,
                seconds=seconds,
            )
            self._publish(event)

        return heartbeat(still)

    def compiled(self, record: Record, call: int, graph: int, seconds: float, *, first: bool) -> None:
        next(record.books.attempts)
        message = f"compiled in call {call}"
        self._note(Compiled, call, message, logging.INFO if first else None, graph=graph, seconds=seconds)

    def failed(self, record: Record, failure: CompileFailure, *, began: float, seconds: float, how_long: str) -> None:
        """Noted when the call is over, with the time at which the attempt failed.

        Args:
            record: Of the function in whose call it failed.
            failure: What is known of it.
            began: The policy's clock when the attempt began.
            seconds: How long it took.
            how_long: If it will not be tried again: when it runs eagerly.
        """
        self._count_failure(record, seconds)
        time = began + seconds
        if failure.attempt == 1:
            self._not_compiled_before = self._not_compiled()
        what, where = summary(failure), in_words(failure.frame)
        due = self._breaker.next_retry(failure.call)
        if is_strict():
            message, gave_up = f"{what}; strict mode raises", ""
        elif failure.kind == "permanent":
            message = what
            gave_up = f"{where} cannot be compiled: {failure}; it runs eagerly {how_long} and will not be tried again"
        elif due is None and self._breaker.episode is not None:
            message, gave_up = what, f"{what}; giving up, running eagerly until reset() or retry_now()"
        else:
            # Without a due moment another thread's call has ended the episode in the meantime.
            message, gave_up = f"{what}; running eagerly, next attempt {due or 'when it is called'}", ""
        level = None if gave_up else logging.WARNING
        self._note(AttemptFailed, failure.call, message, level, time, failure=failure, seconds=seconds)
        if gave_up:
            self._note(GaveUp, failure.call, gave_up, logging.ERROR, time, failure=failure)
        elif due is not None:
            self._note(RetryScheduled, failure.call, f"next attempt {due}", None, time, next_retry=due)

    def _count_failure(self, record: Record, seconds: float) -> None:
        next(record.books.attempts)
        next(record.books.failures)
        record.books.add_seconds(seconds)

    def failed_in_place(self, record: Record, failure: CompileFailure, *, began: float, seconds: float) -> None:
        """Told without a line in the log: the ranks' agreement has its own."""
        self._count_failure(record, seconds)
        message = f"{summary(failure)}; trying again in place, as other ranks wait"
        self._note(AttemptFailed, failure.call, message, None, began + seconds, failure=failure, seconds=seconds)

    def gave_up_together(self, failure: CompileFailure) -> None:
        """Told without a line in the log, too."""
        message = f"{in_words(failure.frame)} cannot be compiled on any rank: {failure}; all run it eagerly"
        self._note(GaveUp, failure.call, message, None, failure=failure)

    def missed(self, failure: CompileFailure, call: int) -> None:
        """Note that torch asked about a graph while it was held off, and will not ask again."""
        message = (
            f"a graph that takes sizes was held off in call {call}; torch does not ask about it again, so it runs"
            " eagerly until torch.compiler.reset()"
        )
        self._note(GaveUp, call, message, logging.ERROR, failure=failure)

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
        message = "nothing is left to try: what had fallen back is gone, or torch.compile passes it over"
        self._note(SweptAway, call, message, logging.INFO, time)

    @property
    def eager_calls(self) -> int:
        """How many calls ran eagerly, at least in part, since the episode began."""
        return self._not_compiled() - self._not_compiled_before

    def over_limit(self, call: int, location: Location) -> None:
        message = (
            f"torch's recompile limit is reached in {in_words(location)}; what its compiled code does not fit runs"
            " eagerly from now on"
        )
        self._note(RecompileLimit, call, message, logging.WARNING)

    def moved(self, call: int, directory: str) -> None:
        message = (
            f"compiled in call {call} with another cache directory than {directory}, where files are damaged or"
            " cannot be written; this process goes on with the other one. Other processes will fail there too: once"
            " none uses it, delete it or make it writable"
        )
        self._note(CacheMoved, call, message, logging.WARNING, directory=directory)

    def took(self, record: Record, call: int, path: CallPath, began: float, *, attempted: bool) -> None:
        """Note a call that was timed, now that it is over.

        Args:
            record: Of its function.
            call: Its number.
            path: What ran in it.
            began: The policy's clock when it began.
            attempted: Whether something was compiled in it, or failed to be.
        """
        now = self._policy.clock()
        record.history.add(Sample(now, call, path, now - began, attempted=attempted))
        self._remind(record.history, call)

    def _remind(self, history: History, call: int) -> None:
        """Say again that the function runs eagerly, if that has not been said for long."""
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
