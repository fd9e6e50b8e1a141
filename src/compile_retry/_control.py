"""What the call path, the frame callback and the graph backend of one decorated function share.

Holds no reference to the function: Dynamo keeps every backend for the life of the process, and the backend holds this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._breaker import WATCHED_CALLS, Breaker, Episode
from ._call import Calls, Conversion, Doubt, Location, Tally
from ._failures import (
    CompileFailure,
    format_traceback,
    qualified_name,
    release,
    root_cause,
    suggests_damaged_cache,
)
from ._journal import Journal
from ._ledger import Ledger
from ._policy import RetryPolicy
from ._stats import Books, CompileState, Counter
from ._steps import Step
from ._strict import is_strict
from ._torch_eager import may_run_again
from ._turns import Turns
from .events import log

if TYPE_CHECKING:
    from types import CodeType

    from ._frame_key import FrameKey
    from ._torch_internals import CachedFrame


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
        root, traceback, strict = root_cause(exc), format_traceback(exc), is_strict()
        if not strict:
            release(exc)
            root.__cause__ = root.__context__ = None
        if conversion.stage == "trace":  # the compiler was not even run
            tally.attempts += 1
        seconds = self._seconds(conversion)
        doubt = Doubt(root, conversion, seconds, traceback, exc if strict else None, can_be_retried=can_be_retried)
        tally.doubt, tally.unsettled = doubt, True
        self.breaker.doubt(doubt)

    def settle(self, tally: Tally, *, program_raised: bool) -> None:
        """The call is over. If the program raised too, what failed was no compile failure but the program's own error.

        Args:
            tally: Of this thread.
            program_raised: Whether it raised.
        """
        doubt, tally.doubt = tally.doubt, None
        skipped, tally.skipped = tally.skipped, []
        tally.unsettled = False
        if not program_raised:
            self.skipped.update(skipped)
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
        if not conversion.is_covered:
            self.ledger.wait(key)
        if last is None:
            self._progress, self._clean_calls = False, 0
        if is_strict():
            self.ledger.compiled(key)
        elif retry:
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
        failure = CompileFailure(
            kind="transient" if retry else "permanent",
            error_type=qualified_name(root),
            message=str(root),
            stage=conversion.stage,
            frame=conversion.location,
            attempt=attempt,
            call=tally.call,
            traceback=doubt.traceback,
        )
        next(self.books.attempts)
        next(self.books.failures)
        self.books.add_seconds(doubt.seconds)
        self.last_failure = failure
        whole_code = False
        if not retry and not is_strict():
            self.turns.served(key.steady)
            whole_code = self.ledger.give_up(key)
            self.breaker.refused(conversion.began + doubt.seconds, doubt.seconds)
            if tally.probing is last:
                tally.probing = self.breaker.episode  # the same, but that the time counts
        self.journal.failed(tally, failure, began=conversion.began, seconds=doubt.seconds, whole_code=whole_code)

    def probe_ended(self, tally: Tally, *, clean: bool) -> None:
        """A call that was let through during an episode is over; it may have been the recovery.

        Args:
            tally: Of this thread.
            clean: Whether all that it ran was compiled, or is given up.
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
        self.ledger.forget(given_up=True)
        self.breaker.retry_now()

    def reset(self) -> None:
        """Forget that anything has failed."""
        self.ledger.forget(waiting=True, given_up=True)
        self.turns.forget()
        self.breaker.reset()
        self.last_failure = None

    def _seconds(self, conversion: Conversion) -> float:
        return self.policy.clock() - conversion.began
