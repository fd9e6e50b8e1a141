"""What the call path, the frame callback and the graph backend of one decorated function share.

Holds no reference to the function: Dynamo keeps every backend for the life of the process, and the backend holds this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _looks
from ._breaker import WATCHED_CALLS, Breaker, Episode
from ._call import Calls, Conversion, Doubt, Location, Tally
from ._failures import (
    CompileFailure,
    FailureKind,
    FailureStage,
    format_traceback,
    qualified_name,
    root_cause,
    suggests_damaged_cache,
)
from ._fallbacks import Fallback, Fallbacks, Fingerprint
from ._journal import Journal
from ._policy import RetryPolicy
from ._stats import Books, CompileState
from ._steps import Step
from ._strict import is_strict
from ._torch_eager import may_run_again
from ._turns import Turns
from .events import log

if TYPE_CHECKING:
    from types import CodeType

    from ._torch_internals import CachedFrame


class Control:
    """The state of one decorated function, without the function."""

    def __init__(self, name: str, location: Location, policy: RetryPolicy) -> None:
        self.name = name
        self.location = location
        self.policy = policy
        self.breaker = Breaker(policy)
        self.calls = Calls()
        lane = self.calls.lane
        self.books = Books(lambda: lane.passed)
        self.journal = Journal(name, self.breaker, self.books, lambda: self.state)
        self.fallbacks = Fallbacks()
        self.last_failure: CompileFailure | None = None
        self.has_code = False
        self.turns = Turns()
        self.step = Step()
        # Whether the last failure suggests that the compiler's files on disk are damaged.
        self.suspects_cache = False
        # Whether an attempt was interrupted: what it left may have to be healed too.
        self.interrupted = False
        # Frames that Dynamo wants skipped for good, with the state it keeps for them.
        self.given_up: dict[CodeType, dict[object, object]] = {}
        self._compiles: dict[Fingerprint, int] = {}
        self._code: dict[CodeType, list[CachedFrame]] = {}
        # All that Dynamo has cached for this function, fallbacks too.
        self.entries: list[CachedFrame] = []
        # Since the last failure: whether something was compiled, and for how many calls everything that ran was.
        self._progress = False
        self._clean_calls = 0

    @property
    def state(self) -> CompileState:
        """How the function stands."""
        episode = self.breaker.episode
        if episode is not None:
            return CompileState.GAVE_UP if episode.stopped else CompileState.FALLBACK
        if self.fallbacks.any_permanent():
            return CompileState.GAVE_UP
        return CompileState.COMPILED if self.has_code else CompileState.PENDING

    def may_attempt(self, tally: Tally, who: Fingerprint) -> bool:
        """Whether this thread's call may run the compiler now for this frame."""
        episode = self.breaker.episode
        if episode is None or (tally.probing is episode and not tally.exclusive):
            return True
        return who in tally.claims

    def is_open(self, tally: Tally) -> bool:
        """Whether this thread's call may run the compiler now for any frame at all."""
        episode = self.breaker.episode
        return episode is None or tally.probing is episode or bool(tally.claims)

    def goes_straight(self, episode: Episode, call: int) -> bool:
        """Whether a call that may not attempt has nothing to do with Dynamo, and is the eager function's alone."""
        return not self.has_code and call > episode.watched_until and not may_run_again()

    def hold_off(self, episode: Episode, call: int) -> None:
        """A call is over that was made during an episode. If it went straight, the next ones may do so unasked."""
        if self.goes_straight(episode, call):
            before_call, before_time = episode.nothing_due_before(call)
            # Nothing has been compiled, so no call has gone through the lane, and calls and numbers are the same.
            self.breaker.hold_off(min(before_call, self.journal.history.next_call), before_time)
            if self.breaker.episode is not episode:  # another thread has replaced it, and had calls ask, meanwhile
                self.breaker.have_calls_ask()

    def open_lane(self) -> None:
        """A call is over that was timed. If all is well, those until the next one that is timed need not be watched."""
        if self.has_code:
            self.calls.open_lane(self.journal.history.next_call, unless=lambda: self.breaker.episode)

    def probe_begins(self, tally: Tally, call: int, episode: Episode) -> None:
        """This thread's call has been let through during an episode."""
        tally.probing = episode
        tally.claims = frozenset() if self.breaker.is_long_overdue(call) else self.turns.claimants
        tally.exclusive = bool(tally.claims) and not self.turns.claimants_follow

    def compiles(self, fingerprint: Fingerprint) -> int:
        """How often such a frame has been compiled."""
        return self._compiles.get(fingerprint, 0)

    def compiled(self, entry: CachedFrame) -> None:
        """A frame has been compiled."""
        self._note(entry)
        self._compiles[entry.fingerprint] = self.compiles(entry.fingerprint) + 1
        self.turns.served(entry.fingerprint)
        self.fallbacks.remove(None, entry.fingerprint)
        self._code[entry.code] = [*(known for known in self._code.get(entry.code, ()) if known.alive), entry]
        if any(isinstance(frame, tuple) and frame[0] is entry.code for frame in self.step.eager_frames()):
            # It may also fit what has run eagerly in this step, which then has to go on like that.
            entry.use_only_if(lambda f_locals: not self._has_run_eagerly(entry.code, f_locals))

    def _has_run_eagerly(self, code: CodeType, f_locals: dict[str, object]) -> bool:
        return self.step.has_begun() and self.step.has_run_eagerly(_looks.of_frame(code, f_locals, gradients=False))

    def fell_back_to(self, entry: CachedFrame) -> None:
        """A frame has been compiled into code that runs a graph of it eagerly."""
        self._note(entry)
        entry.leave_uncounted()
        entry.use_only_if(lambda f_locals: self._is_wanted(entry, f_locals))

    def _note(self, entry: CachedFrame) -> None:
        self.entries = [*(known for known in self.entries if known.alive), entry]

    def _is_wanted(self, entry: CachedFrame, f_locals: dict[str, object]) -> bool:
        """Asked by Dynamo when a cached fallback fits the call: use it? If not, compiled code does or is made."""
        if any(code.fits(f_locals) for code in self._code.get(entry.code, ())):
            return False  # a fallback with dynamic shapes also fits the shapes of code that is there
        if self.step.matters():
            frame = _looks.of_frame(entry.code, f_locals, gradients=False)
            if self.step.has_run_plainly(frame):
                return False
            if not self.step.must_stay_eager(frame) and self._is_due(entry):
                return False
            self.step.ran_eagerly(frame, plainly=False)
            return True
        return not self._is_due(entry)

    def _is_due(self, entry: CachedFrame) -> bool:
        tally, who = self.calls.tally, entry.fingerprint
        if self.fallbacks.is_permanent(entry):
            return False
        if self.may_attempt(tally, who):
            tally.retrying = entry
            return True
        self.turns.ask(who, tally.call)
        return False

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

    def failed(self, exc: BaseException, stage: FailureStage, conversion: Conversion, tally: Tally) -> CompileFailure:
        """An attempt failed: hold off as the policy says, and book it."""
        seconds = self._seconds(conversion)
        failure = self._judge(exc, stage, conversion, tally)
        self._book(failure, conversion, seconds, tally)
        if is_strict():
            self.fallbacks.remove(None, conversion.fingerprint)
        return failure

    def doubt(self, exc: BaseException, conversion: Conversion, tally: Tally) -> CompileFailure:
        """Something failed inside Dynamo: hold off at once, but book it only when the call is over."""
        before, seconds = self.breaker.episode, self._seconds(conversion)
        tally.attempts += 1
        failure = self._judge(exc, "trace", conversion, tally)
        fallback = None
        if self.compiles(conversion.fingerprint) == conversion.compiles:  # otherwise another thread has compiled it
            fallback = Fallback(conversion.fingerprint if failure.kind == "transient" else conversion.coarse)
            if conversion.retrying is not None:
                self.fallbacks.remove(conversion.retrying)
            self.fell_back(fallback, failure.kind, tally)
        if fallback is None or fallback.fingerprint != conversion.fingerprint:
            self.fallbacks.remove(None, conversion.fingerprint)
        tally.unsettled = True
        doubt = Doubt(exc, failure, seconds, fallback, conversion, before, self.breaker.episode)
        tally.doubts.append(doubt)
        return failure

    def fell_back(self, fallback: Fallback, kind: FailureKind, tally: Tally) -> None:
        """Something runs eagerly from now on."""
        self.fallbacks.add(fallback, kind)
        tally.fallen.append(fallback)
        tally.unsettled = True

    def settle(self, tally: Tally, looks: _looks.Looks, *, program_raised: bool) -> None:
        """The call is over. If the program raised too, what failed inside Dynamo was the program's own error.

        Args:
            tally: Of this thread.
            looks: What the call looked like.
            program_raised: Whether it raised.
        """
        doubts, tally.doubts = tally.doubts, []
        skipped, tally.skipped = tally.skipped, []
        fallen, tally.fallen = tally.fallen, []
        tally.unsettled = False
        for fallback in fallen:
            fallback.looks, fallback.new = looks, False
        if program_raised:
            for doubt in reversed(doubts):
                if doubt.fallback is not None:  # pragma: no branch  # otherwise another thread has compiled it
                    self.fallbacks.remove(None, doubt.fallback.fingerprint)
                    if doubt.conversion.retrying is not None:  # it waits as before
                        waits = Fallback(doubt.conversion.fingerprint, doubt.conversion.retrying, looks, new=False)
                        self.fallbacks.add(waits, "transient")
                self.breaker.withdraw(doubt.during, doubt.before)
            return
        self.given_up.update(skipped)
        for doubt in doubts:
            self._book(doubt.failure, doubt.conversion, doubt.seconds, tally)
        if doubts and is_strict():
            raise doubts[0].exc

    def probe_ended(self, tally: Tally, looks: _looks.Looks | None) -> None:
        """A call that was let through during an episode is over; it may have been the recovery.

        Args:
            tally: Of this thread.
            looks: What the call looked like if it ran compiled code only, otherwise None.
        """
        probed, tally.probing, tally.claims = tally.probing, None, frozenset()
        self.breaker.probe_ended()
        if probed is None or probed is not self.breaker.episode:  # an attempt failed in it, or another call ended it
            return
        if looks is not None:
            self._clean_calls += 1
            if self._progress:
                # Something new is compiled and all of this call is. Whatever fell back in a call that looked like it is
                # over and done with, though its own graph may never be asked for again: an optimizer's first step, for
                # one, has a graph of its own.
                self.fallbacks.forget(waiting=True, looks=looks)
        if self.fallbacks.any_waiting() and self._clean_calls < WATCHED_CALLS:
            return
        now = self.policy.clock()  # before another thread's failure can begin the next episode
        if self.breaker.end(probed) is None:
            return
        self.fallbacks.forget(waiting=True)
        self.turns.forget()
        if self._progress or looks is not None:
            next(self.books.recoveries)
            self.journal.recovered(tally, probed, now)
        else:
            self.journal.swept_away(tally, now)

    # What users may do

    def retry_now(self) -> None:
        """Make everything that runs eagerly due."""
        self.fallbacks.forget(permanent=True)
        self.breaker.retry_now()

    def reset(self) -> None:
        """Forget that anything has failed."""
        self.fallbacks.forget(waiting=True, permanent=True)
        self.turns.forget()
        self.breaker.end()
        self.last_failure = None

    # The record

    def _judge(self, exc: BaseException, stage: FailureStage, conversion: Conversion, tally: Tally) -> CompileFailure:
        root, attempt, retry, last = root_cause(exc), 1, True, self.breaker.episode
        # Before the episode begins: another thread's call must not take it for one that has no cause, or is over.
        self.fallbacks.add(Fallback(conversion.fingerprint), "transient")
        if last is None:
            self._progress, self._clean_calls = False, 0
        if not is_strict():
            try:
                attempt, retry = self.breaker.failed(root, tally.call, conversion.began)
            except Exception:
                log.exception("%s: the retry policy raised; no attempt will be made any more", self.name)
        self.suspects_cache = suggests_damaged_cache(root, attempt)
        if retry:
            tally.probing = None
            tally.claims = frozenset() if tally.exclusive else tally.claims - {conversion.fingerprint}
            self._progress, self._clean_calls = False, 0
            if last is not None:
                self.turns.due_moment_used(conversion.fingerprint, last.failed_in_call, self.fallbacks.waits)
        return CompileFailure(
            kind="transient" if retry else "permanent",
            error_type=qualified_name(root),
            message=str(root),
            stage=stage,
            frame=conversion.location,
            attempt=attempt,
            call=tally.call,
            traceback=format_traceback(exc),
        )

    def _book(self, failure: CompileFailure, conversion: Conversion, seconds: float, tally: Tally) -> None:
        next(self.books.attempts)
        next(self.books.failures)
        self.last_failure = failure
        self.journal.failed(tally, failure, began=conversion.began, seconds=seconds)

    def _seconds(self, conversion: Conversion) -> float:
        return self.policy.clock() - conversion.began
