"""Outcomes: update the schedule, the ledger and the record after each attempt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from compile_retry._failures import (
    CompileFailure,
    FailureKind,
    FailureStage,
    Location,
    format_traceback,
    in_words,
    qualified_name,
    release,
    root_cause,
    suggests_damaged_cache,
)
from compile_retry._ranks.agreement import COMPILED, NONE, PERMANENT, TRANSIENT, Agreement, Failure, Verdict
from compile_retry._ranks.breaker import GroupBreaker
from compile_retry._record.journal import Journal
from compile_retry._schedule.breaker import Breaker
from compile_retry._schedule.episode import WATCHED_CALLS
from compile_retry._switches import is_strict
from compile_retry.events import log

from .admission import Admission
from .call import Conversion, Doubt, Tally
from .frame_key import CREATION, FrameKey
from .ledger import Ledger
from .ranks import RanksDisagreeError
from .team import Team
from .tuning import Retuning
from .turns import Turns

T = TypeVar("T")

# Seconds that a rank waits for the others after `retry_now` or `reset`. All ranks should call it at the same point.
_PATIENCE = 10.0


class PeerFailedError(RuntimeError):
    """An attempt failed on another rank of the function's group. Raised in strict mode."""


class Outcomes:
    """Records the outcomes of one function's attempts.

    It holds no reference to the function, because the backend holds this object and Dynamo keeps every backend for the
    life of the process.

    Attributes:
        name: The function's name.
        last_failure: The last failed attempt since the start or the last reset.
        suspects_cache: Whether the last failure suggests that the compiler's files on disk are damaged.
        collectives: The collectives in all graphs captured so far.
        retuning: Code that is to be tuned again.
    """

    def __init__(
        self,
        location: Location,
        *,
        breaker: Breaker,
        ledger: Ledger,
        turns: Turns,
        admission: Admission,
        journal: Journal,
        retuning: Retuning,
        team: Team | None = None,
    ) -> None:
        self.name = journal.name
        self._location, self._policy = location, breaker.policy
        self._breaker, self._ledger, self._turns = breaker, ledger, turns
        self._admission, self._journal, self.retuning = admission, journal, retuning
        self._team = team
        self._request = ""
        if isinstance(breaker, GroupBreaker):
            breaker.on_disagreement = self._disagree
        self.last_failure: CompileFailure | None = None
        self.suspects_cache = False
        self.collectives: tuple[str, ...] = ()
        # Since the last failure: whether anything was compiled, and the number of calls that ran nothing eagerly except
        # given-up frames.
        self._progress = False
        self._clean_calls = 0

    # Attempts

    def begin(self, key: FrameKey, location: Location | None = None, *, is_covered: bool = False) -> Conversion:
        """Begin an attempt for a frame; by default at the function's own location."""
        return Conversion(location or self._location, key, self._policy.clock(), is_covered=is_covered)

    def compiler_runs(self, tally: Tally, conversion: Conversion) -> AbstractContextManager[None]:
        """Record that the compiler is about to run. Run it inside the returned context."""
        tally.attempted(conversion)
        conversion.graph, conversion.stage = tally.graphs_before + 1, "backend"
        return self._journal.attempt_started(tally.call, conversion.graph)

    @property
    def functions(self) -> int:
        """The number of functions that share their compiled code."""
        return len(self._journal.records.alive())

    @property
    def is_held_off(self) -> bool:
        """True from a first failure to the recovery."""
        return self._breaker.episode is not None

    def succeeded(self, conversion: Conversion, tally: Tally, *, left: str | None) -> None:
        """Record that the compiler produced code.

        Args:
            conversion: The frame that is being compiled.
            tally: This thread's tally.
            left: The usual cache directory, if this is the first success with another one.
        """
        conversion.stage = "trace"  # a later failure is in Dynamo
        self.suspects_cache = False
        self._made_progress()
        first, self._admission.has_code = not self._admission.has_code, True
        self._journal.compiled(tally.record, tally.call, conversion.graph, self.seconds_since(conversion), first=first)
        self._moved(tally, left)

    def _moved(self, tally: Tally, left: str | None) -> None:
        if left is not None:
            self._journal.moved(tally.call, left)

    def _made_progress(self) -> None:
        """Record that something compiled that had failed or had not been compiled before."""
        self._progress = True
        self._breaker.succeeded()

    def compiled(self, conversion: Conversion, tally: Tally) -> None:
        """Record that a whole frame is compiled."""
        tally.record.books.add_seconds(self.seconds_since(conversion))
        self._turns.served(conversion.key.steady)
        self._ledger.compiled(conversion.key, is_dynamic=conversion.is_dynamic)

    def created(self, tally: Tally, *, left: str | None) -> None:
        """Record that ``torch.compile`` has returned, which is progress if it had failed before. See `succeeded`."""
        if self._ledger.waits(CREATION):
            self._ledger.compiled(CREATION)
            self._made_progress()
        self._moved(tally, left)

    def over_limit(self, conversion: Conversion, tally: Tally) -> None:
        """Record that a frame has reached torch's recompile limit."""
        self._journal.over_limit(tally.call, conversion.location)

    def postponed(self, tally: Tally) -> None:
        """Record that an attempt was refused. Note it once if failures of other functions are the reason."""
        postponed = self._breaker.newly_postponed()
        if postponed is not None:
            next_retry, is_first = postponed
            self._journal.postponed(tally.call, next_retry, is_first=is_first)

    def tell(self) -> None:
        """Publish this thread's recorded events to hooks and the log. Call it only while holding no lock."""
        self._journal.tell()

    def seconds_since(self, conversion: Conversion) -> float:
        """Return the seconds since an attempt began, by the policy's clock."""
        return self._policy.clock() - conversion.began

    # Failures

    def doubt(self, exc: BaseException, conversion: Conversion, tally: Tally, *, can_be_retried: bool = True) -> None:
        """Record a failure. No other attempt is made until `settle` settles it at the end of the call.

        Args:
            exc: The exception raised by the attempt. Outside strict mode only its root cause is kept.
            conversion: The frame that was being compiled.
            tally: This thread's tally.
            can_be_retried: Whether another attempt is possible at all.
        """
        tally.attempted(conversion)  # unless it has: the compiler may not have run
        tally.doubt = self._doubt(exc, conversion, can_be_retried=can_be_retried)
        self._breaker.doubt(tally.doubt)

    def _doubt(
        self, exc: BaseException, conversion: Conversion, *, can_be_retried: bool, verdict: Verdict | None = None
    ) -> Doubt:
        root, traceback, seconds = root_cause(exc), format_traceback(exc), self.seconds_since(conversion)
        kept = exc if is_strict() else None
        if kept is None:
            release(exc)
            root.__cause__ = root.__context__ = None
        return Doubt(root, conversion, seconds, traceback, kept, can_be_retried=can_be_retried, verdict=verdict)

    def settle(self, tally: Tally, *, program_raised: bool) -> None:
        """Settle a call's failure and run its callbacks, now that the call is over.

        Args:
            tally: This thread's tally.
            program_raised: Whether the call raised. If so, the failure was the program's own error.

        Raises:
            BaseException: In strict mode, the exception raised by the attempt.
        """
        doubt, tally.doubt = tally.doubt, None
        at_end, tally.at_end = tally.at_end, []
        try:
            if doubt is not None and not program_raised:
                self._failed(doubt, tally)
            for do in () if program_raised else at_end:
                do()
        finally:
            if doubt is not None:
                self._breaker.settle(doubt)
        if doubt is not None and doubt.exc is not None and not program_raised:
            raise doubt.exc

    def _failed(self, doubt: Doubt, tally: Tally) -> None:
        """Record the failure, and hold off as the policy decides."""
        key, last = doubt.conversion.key, self._breaker.episode
        # Must precede the start of the episode, or another thread's call could find nothing waiting and end it.
        if not (doubt.conversion.is_covered or is_strict()):
            self._ledger.wait(key)
        if last is None:
            self._progress, self._clean_calls = False, 0
        attempt, retry = self._schedule(doubt, tally)
        self.suspects_cache = suggests_damaged_cache(doubt.root, attempt)
        failure = self._note(doubt, "transient" if retry else "permanent", attempt, tally)
        how_long = ""
        if retry and not is_strict():
            tally.probe = None
            self._progress, self._clean_calls = False, 0
            self._turns.failed(key.steady, tally.call, last.failed_in_call if last is not None else None)
        elif not is_strict():
            how_long = self._give_up(doubt, tally)
        began = doubt.conversion.began
        self._journal.failed(tally.record, failure, began=began, seconds=doubt.seconds, how_long=how_long)

    def _schedule(self, doubt: Doubt, tally: Tally) -> tuple[int, bool]:
        """Evaluate the policy. Return the attempt's number within the episode, and True if it allows another one."""
        if not doubt.can_be_retried or is_strict():
            return 1, doubt.can_be_retried
        try:
            retry = None if doubt.verdict is None else doubt.verdict.outcome == TRANSIENT
            return self._breaker.failed(doubt.root, tally.call, doubt.conversion.began, doubt.seconds, retry=retry)
        except Exception:
            log.exception("%s: the retry policy raised; giving up", self._journal.name)
            return 1, True

    def _give_up(self, doubt: Doubt, tally: Tally) -> str:
        """Give up this frame. Return, in words, for which calls it runs eagerly."""
        key, episode = doubt.conversion.key, self._breaker.episode
        self._turns.served(key.steady)
        for_good = self._ledger.give_up(key)
        self._breaker.refused(doubt.conversion.began + doubt.seconds, doubt.seconds)
        probe = tally.probe
        if probe is not None and probe.episode is episode:
            probe.episode = self._breaker.episode  # replaced, because the time counts
        if not doubt.can_be_retried:
            return "until torch.compiler.reset()"
        return "for all arguments" if for_good else "for these arguments"

    def no_retry_will_come(self, key: FrameKey, tally: Tally) -> None:
        """Give up a graph that was held off and that torch will not pass to the backend again."""
        if not self._ledger.is_given_up(key):
            self._ledger.give_up(key)
            if self.last_failure is not None:  # otherwise it was logged before a reset()
                self._journal.missed(self.last_failure, tally.call)

    def _note(self, doubt: Doubt, kind: FailureKind, attempt: int, tally: Tally) -> CompileFailure:
        self.last_failure = failure = CompileFailure(
            kind=kind,
            error_type=qualified_name(doubt.root),
            message=str(doubt.root),
            stage=doubt.conversion.stage,
            frame=doubt.conversion.location,
            attempt=attempt,
            call=tally.call,
            traceback=doubt.traceback,
        )
        if doubt.verdict is not None and doubt.verdict.failure is not None:
            rank, of = doubt.verdict.rank, doubt.verdict.failure
            stage = cast("FailureStage", of.stage)
            self.last_failure = failure = replace(
                failure, error_type=of.error_type, message=of.message, stage=stage, rank=rank
            )
        return failure

    def doubt_retuning(self, exc: BaseException, conversion: Conversion, tally: Tally) -> None:
        """Record that tuning a frame again has failed. It counts at the end of the call, unless the program raises."""
        doubt = self._doubt(exc, conversion, can_be_retried=True)
        tally.at_end.append(partial(self._retuning_failed, doubt, tally))

    def _retuning_failed(self, doubt: Doubt, tally: Tally) -> None:
        attempt, retry = self.retuning.failed(doubt.root, doubt.conversion, tally, doubt.seconds)
        failure = self._note(doubt, "transient" if retry else "permanent", attempt, tally)
        due = self.retuning.next_retry(tally.call)
        self._journal.retuning_failed(tally.record, failure, due, began=doubt.conversion.began, seconds=doubt.seconds)

    def lost_device(self, error: BaseException, tally: Tally) -> None:
        """Give up all attempts, because the accelerator's context is gone.

        Args:
            error: The device's own error.
            tally: This thread's tally.
        """
        tally.probe = None
        self.retuning.stop()
        if self._breaker.stop(tally.call):
            self._journal.lost_device(tally.call, error)

    # Groups of ranks

    @property
    def agreement(self) -> Agreement | None:
        """The agreement with other ranks; None if the function has no group, or its group has only this process."""
        return self._team.agreement if self._team is not None else None

    def attempt_together(
        self,
        agreement: Agreement,
        compile_it: Callable[[], T],
        conversion: Conversion,
        tally: Tally,
        *,
        raises: Callable[[Exception], bool],
        counts: Callable[[T], bool] = lambda result: True,
        can_be_retried: bool = True,
    ) -> T | None:
        """Make an attempt on all ranks of the function's group, and vote on it.

        A failure counts at once, even if the program raises in the same call: otherwise ranks could differ.

        Args:
            agreement: The agreement with the other ranks.
            compile_it: Runs the compiler.
            conversion: The frame.
            tally: This thread's tally.
            raises: Returns True for exceptions that are not failures.
            counts: Returns False for results that need no vote.
            can_be_retried: Whether another attempt is possible at all.

        Returns:
            The result; None if the frame must run eagerly, as on all other ranks.

        Raises:
            RanksDisagreeError: The ranks do not agree, and another rank may run compiled code.
        """
        self._journal.speaks_for(agreement.name, agreement.size, leads=agreement.leads)
        refused, failure, result = agreement.join(), None, None
        if refused is None:
            try:
                with agreement.beating():
                    result = compile_it()
            except Exception as exc:
                if raises(exc):
                    raise
                failure = exc
            if result is not None and not counts(result):
                return result
            described = self._describe(failure, conversion, can_be_retried=can_be_retried)
            makes_code = conversion.key is not CREATION
            refused = agreement.vote(_what(conversion, tally), described, makes_code=makes_code)
        if refused.outcome == COMPILED:
            conversion.once_agreed()
            return result
        if refused.outcome == NONE:
            self._disagree(tally.call, conversion, failure)
            if not refused.may_run_eagerly:
                raise RanksDisagreeError(self._why_not_eagerly(refused.text, conversion))
        else:
            self._failed_together(refused, failure, conversion, tally)
        return None

    def _describe(self, failure: Exception | None, conversion: Conversion, *, can_be_retried: bool) -> Failure | None:
        if failure is None:
            return None
        root, outcome = root_cause(failure), PERMANENT
        try:
            if can_be_retried and self._breaker.is_worth_retry(root, self._policy.clock()):
                outcome = TRANSIENT
        except Exception:
            log.exception("%s: the retry policy raised; giving up", self._journal.name)
        return Failure(outcome, qualified_name(root), str(root), conversion.stage)

    def _failed_together(
        self, verdict: Verdict, failure: Exception | None, conversion: Conversion, tally: Tally
    ) -> None:
        tally.attempted(conversion)
        of = verdict.failure
        told = PeerFailedError(f"rank {verdict.rank}: {of.error_type}: {of.message}" if of is not None else "")
        doubt = self._doubt(failure or told, conversion, can_be_retried=True, verdict=verdict)
        self._failed(doubt, tally)
        agreement = self.agreement
        if agreement is not None and agreement.over is not None:  # on the next attempt
            self._disagree(tally.call, conversion)
        if doubt.exc is not None:
            raise doubt.exc

    def _disagree(self, call: int, conversion: Conversion | None = None, failure: Exception | None = None) -> None:
        """Run the function eagerly for good, because the ranks cannot agree."""
        self._breaker.stop(call)
        self._admission.eager_together = True
        agreement, last = self.agreement, self._breaker.episode
        text = agreement.over.text if agreement is not None and agreement.over is not None else ""
        if failure is not None:
            text += f"; here it failed with {qualified_name(root_cause(failure))}: {root_cause(failure)}"
            release(failure)
        self.last_failure = noted = CompileFailure(
            kind="permanent",
            error_type=f"{RanksDisagreeError.__module__}.{RanksDisagreeError.__qualname__}",
            message=text,
            stage="trace" if conversion is None else conversion.stage,
            frame=self._location if conversion is None else conversion.location,
            attempt=last.failures + 1 if last is not None else 1,
            call=call,
            traceback="",
        )
        self._journal.cannot_agree(noted)

    def _why_not_eagerly(self, text: str, conversion: Conversion) -> str:
        known = f" ({', '.join(self.collectives)})" if self.collectives else ""
        return (
            f"the ranks of {self.name}'s group do not agree on {in_words(conversion.location)}: {text}. So it must not "
            "run eagerly here: another rank may run it compiled, and compiled code may issue different collectives"
            f"{known}. All ranks of a group must make the same calls, with arguments of the same shapes. If a rank has "
            "died, restart from a checkpoint."
        )

    def carry_out_request(self, call: int) -> None:
        """Carry out `retry_now` or `reset` in this call, if all ranks do."""
        request, self._request = self._request, ""
        agreement = self.agreement
        trouble = agreement.start_anew(f"{request} {call}", _PATIENCE) if agreement is not None else ""
        if trouble:
            self._journal.request_failed(call, request, trouble)
        elif request == "retry_now":
            self._retry_now()
        else:
            self._reset()

    # Failures in functions with collectives

    def saw_collectives(self, collectives: tuple[str, ...]) -> None:
        """Record a graph's collectives. A function that has any runs eagerly on all ranks or on none."""
        if collectives:
            self.collectives = tuple(dict.fromkeys((*self.collectives, *collectives)))
            self.retuning.stop()  # if that failed, the frame would run eagerly on this rank alone

    def failed_in_place(self, exc: BaseException, conversion: Conversion, tally: Tally) -> None:
        """Record a failed attempt that is repeated at once, in the same call, while other ranks wait."""
        doubt = self._doubt(exc, conversion, can_be_retried=True)
        self.suspects_cache = suggests_damaged_cache(doubt.root, attempt=1)
        failure = self._note(doubt, "transient", 1, tally)
        self._journal.failed_in_place(tally.record, failure, began=conversion.began, seconds=doubt.seconds)

    def give_up_together(self, conversion: Conversion) -> None:
        """Run the function eagerly from this call on, like all other ranks."""
        self._admission.eager_together = True
        self._ledger.give_up(conversion.key)
        if self.last_failure is not None:  # pragma: no branch  # another thread's reset()
            self._journal.gave_up_together(self.last_failure)

    # Recovery

    def probe_ended(self, tally: Tally, *, clean: bool) -> None:
        """End a call that was the episode's probe. It may have been the recovery.

        Args:
            tally: This thread's tally.
            clean: Whether it ran nothing eagerly except given-up frames.
        """
        probe, tally.probe = tally.probe, None
        self._breaker.probe_ended()
        episode = self._breaker.episode
        if probe is None or episode is None or probe.episode is not episode:  # it failed, or another call ended it
            return
        self._clean_calls += clean
        # Each function that shares may be called once before one that is waiting.
        if self._ledger.any_waiting() and self._clean_calls < WATCHED_CALLS * max(1, self.functions):
            return
        now = self._policy.clock()  # before another thread's failure can begin the next episode
        if self._breaker.end(episode) is None:
            return
        self._ledger.forget(waiting=True)
        self._turns.forget()
        if self._progress or (clean and tally.compiled):
            self._journal.recovered(tally.record, tally.call, episode, now)
        elif not self._ledger.given_up:
            self._journal.swept_away(tally.call, now)

    # Users' requests

    def retry_now(self) -> None:
        """Make everything that runs eagerly due now. With a group, the next call does so, if it does on all ranks."""
        if not self._is_left_to_next_call("retry_now"):
            self._retry_now()

    def reset(self) -> None:
        """Forget all failures. With a group, the next call does so, if it does on all ranks."""
        if not self._is_left_to_next_call("reset"):
            self._reset()

    def _is_left_to_next_call(self, request: str) -> bool:
        if self.agreement is None:
            return False
        if self._breaker.episode is not None or self._ledger.given_up:  # otherwise nothing has failed, on any rank
            self._request = request
            self._breaker.resume_checks()
        return True

    @property
    def has_request(self) -> bool:
        """True if the next call must carry out a request."""
        return bool(self._request)

    def _retry_now(self) -> None:
        self._admission.eager_together = False
        self._ledger.forget(given_up=True)
        self._breaker.retry_now()
        self.retuning.retry_now()

    def _reset(self) -> None:
        self._admission.eager_together = False
        self._ledger.forget(waiting=True, given_up=True)
        self._turns.forget()
        self._breaker.reset()
        self.retuning.retry_now()
        self.last_failure = None


def _what(conversion: Conversion, tally: Tally) -> str:
    """Name an attempt alike on all ranks."""
    function, file, line = conversion.location
    # File name only, because directories may differ between hosts.
    return f"{function} ({Path(file).name}:{line}) in call {tally.call}"
