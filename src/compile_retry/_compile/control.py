"""What the call path, the frame callback and the graph backend of one decorated function share.

Holds no reference to the function: Dynamo keeps every backend for the life of the process, and the backend holds this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compile_retry._failures import (
    CompileFailure,
    FailureKind,
    format_traceback,
    qualified_name,
    release,
    root_cause,
    suggests_damaged_cache,
)
from compile_retry._record.journal import Journal
from compile_retry._schedule.breaker import WATCHED_CALLS, Breaker, Episode
from compile_retry._schedule.policy import RetryPolicy
from compile_retry._stats import Books, CompileState, Counter
from compile_retry._strict import is_strict
from compile_retry._torch.eager import may_run_again
from compile_retry.events import log

from .call import Calls, Conversion, Doubt, Location, Tally
from .checkpointing import Step
from .ledger import Ledger
from .turns import Turns

if TYPE_CHECKING:
    from types import CodeType

    from compile_retry._torch.dynamo import CachedFrame

    from .frame_key import FrameKey


class Control:
    """The state of one decorated function, without the function."""

    def __init__(self, name: str, location: Location, policy: RetryPolicy) -> None:
        self.name = name
        self.location = location
        self.policy = policy
        self.breaker = Breaker(policy)
        self.calls = Calls()
        self.numbers = Counter()
        self.books = Books()
        self.journal = Journal(name, self.breaker, self.books, lambda: self.state)
        self.ledger = Ledger()
        self.last_failure: CompileFailure | None = None
        self.has_code = False
        self.turns = Turns()
        self.step = Step()
        # Whether the last failure suggests that the compiler's files on disk are damaged.
        self.suspects_cache = False
        # Whether an attempt was interrupted: what it left may have to be healed too.
        self.interrupted = False
        # What moves data between ranks in any graph so far, and whether all ranks have agreed to run eagerly for good.
        self.collectives: tuple[str, ...] = ()
        self.eager_together = False
        # Code that Dynamo wants skipped for good, with the state it keeps for it.
        self.skipped: dict[CodeType, dict[object, object]] = {}
        # All that Dynamo has cached for this function.
        self.entries: list[CachedFrame] = []
        # Since the last failure: whether something was compiled, and for how many calls everything that ran was, or is
        # given up.
        self._progress = False
        self._clean_calls = 0

    @property
    def state(self) -> CompileState:
        """How the function stands."""
        episode = self.breaker.episode
        if episode is not None:
            return CompileState.GAVE_UP if episode.stopped else CompileState.FALLBACK
        if self.ledger.given_up:
            return CompileState.GAVE_UP
        return CompileState.COMPILED if self.has_code else CompileState.PENDING

    # Admission

    def may_attempt(self, tally: Tally, key: FrameKey) -> bool:
        """Whether this thread's call may run the compiler now for this frame."""
        if self.breaker.is_in_doubt or self.ledger.is_given_up(key):
            return False
        episode = self.breaker.episode
        if episode is None:
            return self.breaker.affords_another_refusal()
        if tally.probing is episode and not tally.exclusive:
            return True
        return key.steady in tally.claims

    def is_open(self, tally: Tally) -> bool:
        """Whether this thread's call may run the compiler now for any frame at all."""
        if self.breaker.is_in_doubt:
            return False
        episode = self.breaker.episode
        return episode is None or tally.probing is episode or bool(tally.claims)

    def goes_straight(self, episode: Episode, call: int) -> bool:
        """Whether a call that may not attempt has nothing to do with Dynamo, and is the eager function's alone."""
        return not self.has_code and call > episode.watched_until and not may_run_again()

    def hold_off(self, episode: Episode, call: int) -> None:
        """A call is over that was made during an episode. If it went straight, the next ones may do so unasked."""
        if self.goes_straight(episode, call):
            before_call, before_time = episode.nothing_due_before(call)
            self.breaker.hold_off(min(before_call, self.journal.history.next_call), before_time)
            if self.breaker.episode is not episode:  # another thread has replaced it, and had calls ask, meanwhile
                self.breaker.have_calls_ask()

    def probe_begins(self, tally: Tally, call: int, episode: Episode) -> None:
        """This thread's call has been let through during an episode."""
        tally.probing = episode
        tally.claims = frozenset() if self.breaker.is_long_overdue(call) else self.turns.claimants
        tally.exclusive = bool(tally.claims) and not self.turns.claimants_follow

    # Outcomes of attempts

    def succeeded(self, conversion: Conversion, tally: Tally) -> None:
        """The compiler produced code."""
        self.suspects_cache = False
        next(self.books.attempts)
        self.made_progress()
        first, self.has_code = not self.has_code, True
        self.journal.compiled(tally, conversion.graph, self._seconds(conversion), first=first)

    def made_progress(self) -> None:
        """Something works again that had failed, or works for the first time."""
        self._progress = True
        self.breaker.refusals.end()

    def compiled(self, conversion: Conversion, entry: CachedFrame | None = None) -> None:
        """A frame has been compiled, graphs and all."""
        self.books.add_seconds(self._seconds(conversion))
        self.turns.served(conversion.key.steady)
        self.ledger.compiled(conversion.key, is_dynamic=conversion.is_dynamic)
        if entry is not None:
            self.entries = [*(known for known in self.entries if known.alive), entry]

    def doubt(self, exc: BaseException, conversion: Conversion, tally: Tally, *, can_be_retried: bool = True) -> None:
        """An attempt failed. Nothing is attempted any more in this call; when that is over, it is settled.

        Args:
            exc: What the attempt raised. Unless strict mode is going to raise it, no more than its root cause is kept.
            conversion: What was being compiled.
            tally: Of this thread.
            can_be_retried: Whether another attempt could be made at all.
        """
        if conversion.stage == "trace":  # the compiler was not even run
            tally.attempts += 1
        doubt = self._doubt(exc, conversion, can_be_retried=can_be_retried)
        tally.doubt = doubt
        self.breaker.doubt(doubt)

    def _doubt(self, exc: BaseException, conversion: Conversion, *, can_be_retried: bool) -> Doubt:
        root, traceback, seconds = root_cause(exc), format_traceback(exc), self._seconds(conversion)
        if is_strict():
            return Doubt(root, conversion, seconds, traceback, exc, can_be_retried=can_be_retried)
        release(exc)
        root.__cause__ = root.__context__ = None
        return Doubt(root, conversion, seconds, traceback, None, can_be_retried=can_be_retried)

    def settle(self, tally: Tally, *, program_raised: bool) -> None:
        """The call is over. If the program raised too, what failed was no compile failure but the program's own error.

        Args:
            tally: Of this thread.
            program_raised: Whether it raised.
        """
        doubt, tally.doubt = tally.doubt, None
        skipped, tally.skipped = tally.skipped, []
        if not program_raised:
            self.skipped.update(skipped)
            for code, _ in skipped:
                self.ledger.strike_out(code)  # Dynamo will not be asked again
        try:
            if doubt is not None and not program_raised:
                self._failed(doubt, tally)
        finally:
            if doubt is not None:
                self.breaker.settle(doubt)
        if doubt is not None and doubt.exc is not None and not program_raised:
            raise doubt.exc

    def _failed(self, doubt: Doubt, tally: Tally) -> None:
        """Hold off as the policy says, and book it."""
        conversion, key = doubt.conversion, doubt.conversion.key
        root, attempt, retry, last = doubt.root, 1, doubt.can_be_retried, self.breaker.episode
        # Before the episode begins: another thread's call must not take it for one that has no cause, or is over.
        if not (conversion.is_covered or is_strict()):
            self.ledger.wait(key)
        if last is None:
            self._progress, self._clean_calls = False, 0
        if retry and not is_strict():
            try:
                attempt, retry = self.breaker.failed(root, tally.call, conversion.began, doubt.seconds)
            except Exception:
                log.exception("%s: the retry policy raised; no attempt will be made any more", self.name)
        self.suspects_cache = suggests_damaged_cache(root, attempt)
        if retry and not is_strict():
            tally.probing, tally.claims = None, frozenset()
            self._progress, self._clean_calls = False, 0
            if last is not None:
                self.turns.due_moment_used(key.steady, last.failed_in_call, self.ledger.waits)
        kind: FailureKind = "transient" if retry else "permanent"
        failure = self._book(doubt, kind, attempt, tally)
        how_long = ""
        if not retry and not is_strict():
            self.turns.served(key.steady)
            how_long = "however it is called" if self.ledger.give_up(key) else "when it is called like this"
            if not doubt.can_be_retried:
                how_long = "until torch.compiler.reset()"
            self.breaker.refused(conversion.began + doubt.seconds, doubt.seconds)
            if last is not None and tally.probing is last:
                tally.probing = self.breaker.episode  # the same, but that the time counts
        self.journal.failed(tally, failure, began=conversion.began, seconds=doubt.seconds, how_long=how_long)

    def _book(self, doubt: Doubt, kind: FailureKind, attempt: int, tally: Tally) -> CompileFailure:
        next(self.books.attempts)
        next(self.books.failures)
        self.books.add_seconds(doubt.seconds)
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

    # Where ranks move data between them

    def has_seen(self, collectives: tuple[str, ...]) -> None:
        """These are in a graph of this function. From now on it runs eagerly on all ranks or on none."""
        if collectives:
            self.collectives = tuple(dict.fromkeys((*self.collectives, *collectives)))

    def failed_in_place(self, exc: BaseException, conversion: Conversion, tally: Tally) -> None:
        """An attempt failed that is made again at once, in the same call, while other ranks wait."""
        doubt = self._doubt(exc, conversion, can_be_retried=True)
        self.suspects_cache = suggests_damaged_cache(doubt.root, attempt=1)
        failure = self._book(doubt, "transient", 1, tally)
        self.journal.failed_in_place(tally, failure, began=conversion.began, seconds=doubt.seconds)

    def give_up_together(self, conversion: Conversion, tally: Tally) -> None:
        """All ranks run the function eagerly from this call on."""
        self.eager_together = True
        self.ledger.give_up(conversion.key)
        if self.last_failure is not None:  # pragma: no branch  # another thread's reset()
            self.journal.gave_up_together(tally, self.last_failure)

    def probe_ended(self, tally: Tally, *, clean: bool) -> None:
        """A call that was let through during an episode is over; it may have been the recovery.

        Args:
            tally: Of this thread.
            clean: It ran nothing eagerly except what is given up.
        """
        probed, tally.probing, tally.claims = tally.probing, None, frozenset()
        self.breaker.probe_ended()
        if probed is None or probed is not self.breaker.episode:  # an attempt failed in it, or another call ended it
            return
        self._clean_calls += clean
        if self.ledger.any_waiting() and self._clean_calls < WATCHED_CALLS:
            return
        now = self.policy.clock()  # before another thread's failure can begin the next episode
        if self.breaker.end(probed) is None:
            return
        self.ledger.forget(waiting=True)
        self.turns.forget()
        if self._progress or (clean and tally.compiled):
            next(self.books.recoveries)
            self.journal.recovered(tally, probed, now)
        elif not self.ledger.given_up:
            self.journal.swept_away(tally, now)

    # What users may do

    def retry_now(self) -> None:
        """Make everything that runs eagerly due."""
        self.eager_together = False
        self.ledger.forget(given_up=True)
        self.breaker.retry_now()

    def reset(self) -> None:
        """Forget that anything has failed."""
        self.eager_together = False
        self.ledger.forget(waiting=True, given_up=True)
        self.turns.forget()
        self.breaker.reset()
        self.last_failure = None

    def _seconds(self, conversion: Conversion) -> float:
        return self.policy.clock() - conversion.began
