"""Outcomes: what follows from attempts, for the schedule, the ledger and the record."""

from __future__ import annotations

from contextlib import AbstractContextManager

from compile_retry._failures import (
    CompileFailure,
    FailureKind,
    Location,
    format_traceback,
    qualified_name,
    release,
    root_cause,
    suggests_damaged_cache,
)
from compile_retry._record.journal import Journal
from compile_retry._schedule.breaker import WATCHED_CALLS, Breaker
from compile_retry._strict import is_strict
from compile_retry.events import log

from .admission import Admission
from .call import Conversion, Doubt, Tally
from .frame_key import CREATION, FrameKey
from .ledger import Ledger
from .turns import Turns


class Outcomes:
    """Books what the attempts of one function end in.

    Holds no reference to the function: Dynamo keeps every backend for the life of the process, and the backend holds
    this.

    Attributes:
        name: Of the function.
        last_failure: The last failed attempt, until a reset.
        suspects_cache: The last failure suggests that the compiler's files on disk are damaged.
        collectives: Operations in any graph so far that move data between ranks.
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
    ) -> None:
        self.name = journal.name
        self._location, self._policy = location, breaker.policy
        self._breaker, self._ledger, self._turns = breaker, ledger, turns
        self._admission, self._journal = admission, journal
        self.last_failure: CompileFailure | None = None
        self.suspects_cache = False
        self.collectives: tuple[str, ...] = ()
        self._interrupted = False  # what an interrupted attempt has left may have to be healed too
        # Since the last failure: whether something was compiled, and for how many calls everything that ran was, or is
        # given up.
        self._progress = False
        self._clean_calls = 0

    # Attempts

    def begin(self, key: FrameKey, location: Location | None = None, *, is_covered: bool = False) -> Conversion:
        """Begin an attempt for a frame; by default at the function's own location."""
        return Conversion(location or self._location, key, self._policy.clock(), is_covered=is_covered)

    def compiler_runs(self, tally: Tally, conversion: Conversion) -> AbstractContextManager[None]:
        """Note that the compiler is about to run; in the returned context it does."""
        tally.attempts += 1
        conversion.graph, conversion.stage = tally.graphs_before + 1, "backend"
        return self._journal.attempt_started(tally.call, conversion.graph)

    def interrupted(self) -> None:
        """Note that an attempt was left by something that is no failure, such as a ``KeyboardInterrupt``."""
        self._interrupted = True

    def takes_healing(self) -> bool:
        """True once after an interrupt, and as long as something is held off."""
        interrupted, self._interrupted = self._interrupted, False
        return interrupted or self._breaker.episode is not None

    def succeeded(self, conversion: Conversion, tally: Tally, *, left: str | None) -> None:
        """Book that the compiler produced code.

        Args:
            conversion: The frame that is being compiled.
            tally: Of this thread.
            left: The usual cache directory, if this is the first success with another one.
        """
        conversion.stage = "trace"  # if anything fails now, it is Dynamo
        self.suspects_cache = False
        self._made_progress()
        first, self._admission.has_code = not self._admission.has_code, True
        self._journal.compiled(tally.call, conversion.graph, self.seconds_since(conversion), first=first)
        self._moved(tally, left)

    def _moved(self, tally: Tally, left: str | None) -> None:
        if left is not None:
            self._journal.moved(tally.call, left)

    def _made_progress(self) -> None:
        """Note that something works that had failed, or works for the first time."""
        self._progress = True
        self._breaker.refusals.end()

    def compiled(self, conversion: Conversion) -> None:
        """Book that a frame is compiled, graphs and all."""
        self._journal.took_to_compile(self.seconds_since(conversion))
        self._turns.served(conversion.key.steady)
        self._ledger.compiled(conversion.key, is_dynamic=conversion.is_dynamic)

    def created(self, tally: Tally, *, left: str | None) -> None:
        """Note that ``torch.compile`` has returned, as in `succeeded`. If it had failed before, that is progress."""
        if self._ledger.waits(CREATION):
            self._ledger.compiled(CREATION)
            self._made_progress()
        self._moved(tally, left)

    def over_limit(self, conversion: Conversion, tally: Tally) -> None:
        """Note that torch does not compile a frame any more, because it has been compiled too often."""
        self._journal.over_limit(tally.call, conversion.location)

    def tell(self) -> None:
        """Tell hooks and the log of what has been noted in this thread. To be called where no lock is held."""
        self._journal.tell()

    def seconds_since(self, conversion: Conversion) -> float:
        """Seconds since an attempt began, by the policy's clock."""
        return self._policy.clock() - conversion.began

    # Failures

    def doubt(self, exc: BaseException, conversion: Conversion, tally: Tally, *, can_be_retried: bool = True) -> None:
        """Note a failure. Nothing more is attempted in this call; once the call is over, the failure is settled.

        Args:
            exc: Raised by the attempt. Unless strict mode is going to raise it, no more than its root cause is kept.
            conversion: The frame that was being compiled.
            tally: Of this thread.
            can_be_retried: Whether another attempt could be made at all.
        """
        if conversion.stage == "trace":  # the compiler was not even run
            tally.attempts += 1
        tally.doubt = self._doubt(exc, conversion, can_be_retried=can_be_retried)
        self._breaker.doubt(tally.doubt)

    def _doubt(self, exc: BaseException, conversion: Conversion, *, can_be_retried: bool) -> Doubt:
        root, traceback, seconds = root_cause(exc), format_traceback(exc), self.seconds_since(conversion)
        if is_strict():
            return Doubt(root, conversion, seconds, traceback, exc, can_be_retried=can_be_retried)
        release(exc)
        root.__cause__ = root.__context__ = None
        return Doubt(root, conversion, seconds, traceback, None, can_be_retried=can_be_retried)

    def settle(self, tally: Tally, *, program_raised: bool) -> None:
        """Book what a call has left open, now that it is over.

        Args:
            tally: Of this thread.
            program_raised: The call raised. Then what failed was no compile failure but the program's own error.

        Raises:
            BaseException: What the attempt raised, in strict mode.
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
        """Hold off as the policy says, and book it."""
        key, last = doubt.conversion.key, self._breaker.episode
        # Before the episode begins: another thread's call must not take it for one that has no cause, or is over.
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
        self._journal.failed(failure, began=began, seconds=doubt.seconds, how_long=how_long)

    def _schedule(self, doubt: Doubt, tally: Tally) -> tuple[int, bool]:
        """Ask the policy. Returns the attempt's number within the episode, and whether there may be another one."""
        if not doubt.can_be_retried or is_strict():
            return 1, doubt.can_be_retried
        try:
            return self._breaker.failed(doubt.root, tally.call, doubt.conversion.began, doubt.seconds)
        except Exception:
            log.exception("%s: the retry policy raised; no attempt will be made any more", self._journal.name)
            return 1, True

    def _give_up(self, doubt: Doubt, tally: Tally) -> str:
        """Never try this frame again. Returns when it runs eagerly, in words."""
        key, episode = doubt.conversion.key, self._breaker.episode
        self._turns.served(key.steady)
        for_good = self._ledger.give_up(key)
        self._breaker.refused(doubt.conversion.began + doubt.seconds, doubt.seconds)
        probe = tally.probe
        if probe is not None and probe.episode is episode:
            probe.episode = self._breaker.episode  # the same, but that the time counts
        if not doubt.can_be_retried:
            return "until torch.compiler.reset()"
        return "however it is called" if for_good else "when it is called like this"

    def no_retry_will_come(self, key: FrameKey, tally: Tally) -> None:
        """Give up a graph that was held off and that torch will not ask about again."""
        if not self._ledger.is_given_up(key):
            self._ledger.give_up(key)
            if self.last_failure is not None:  # otherwise that has been told before a reset()
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
        return failure

    # Failures where ranks move data between them

    def has_seen(self, collectives: tuple[str, ...]) -> None:
        """Note collectives of a graph. A function that has some runs eagerly on all ranks or on none."""
        if collectives:
            self.collectives = tuple(dict.fromkeys((*self.collectives, *collectives)))

    def failed_in_place(self, exc: BaseException, conversion: Conversion, tally: Tally) -> None:
        """Book a failed attempt that is repeated at once, in the same call, while other ranks wait."""
        doubt = self._doubt(exc, conversion, can_be_retried=True)
        self.suspects_cache = suggests_damaged_cache(doubt.root, attempt=1)
        failure = self._note(doubt, "transient", 1, tally)
        self._journal.failed_in_place(failure, began=conversion.began, seconds=doubt.seconds)

    def give_up_together(self, conversion: Conversion) -> None:
        """Run the function eagerly from this call on, as all ranks do."""
        self._admission.eager_together = True
        self._ledger.give_up(conversion.key)
        if self.last_failure is not None:  # pragma: no branch  # another thread's reset()
            self._journal.gave_up_together(self.last_failure)

    # Recovery

    def probe_ended(self, tally: Tally, *, clean: bool) -> None:
        """End a call that was let through during an episode; it may have been the recovery.

        Args:
            tally: Of this thread.
            clean: It ran nothing eagerly except what is given up.
        """
        probe, tally.probe = tally.probe, None
        self._breaker.probe_ended()
        episode = self._breaker.episode
        if probe is None or episode is None or probe.episode is not episode:  # it failed, or another call ended it
            return
        self._clean_calls += clean
        if self._ledger.any_waiting() and self._clean_calls < WATCHED_CALLS:
            return
        now = self._policy.clock()  # before another thread's failure can begin the next episode
        if self._breaker.end(episode) is None:
            return
        self._ledger.forget(waiting=True)
        self._turns.forget()
        if self._progress or (clean and tally.compiled):
            self._journal.recovered(tally.call, episode, now)
        elif not self._ledger.given_up:
            self._journal.swept_away(tally.call, now)

    # Users' requests

    def retry_now(self) -> None:
        """Make everything that runs eagerly due."""
        self._admission.eager_together = False
        self._ledger.forget(given_up=True)
        self._breaker.retry_now()

    def reset(self) -> None:
        """Forget that anything has failed."""
        self._admission.eager_together = False
        self._ledger.forget(waiting=True, given_up=True)
        self._turns.forget()
        self._breaker.reset()
        self.last_failure = None
