"""Admission: which calls and frames of one function may be compiled now."""

from __future__ import annotations

from collections.abc import Hashable
from types import CodeType

from compile_retry._schedule.breaker import Breaker, Episode, Probe
from compile_retry._stats import CompileState
from compile_retry._torch.eager import may_run_again

from .call import Tally
from .checkpointing import Step
from .frame_key import FrameKey
from .ledger import Ledger
from .turns import Turns


class Admission:
    """Decides for one function. Asked by the call path, the frame callback and the backend alike.

    Attributes:
        has_code: Some graph has been compiled.
        eager_together: All ranks have agreed to run the function eagerly for good.
    """

    def __init__(self, breaker: Breaker, ledger: Ledger, turns: Turns) -> None:
        self._breaker, self._ledger, self._turns = breaker, ledger, turns
        self._step = Step()
        self.has_code = False
        self.eager_together = False

    @property
    def state(self) -> CompileState:
        """How the function stands."""
        episode = self._breaker.episode
        if episode is not None:
            return CompileState.GAVE_UP if episode.stopped else CompileState.FALLBACK
        if self._ledger.given_up:
            return CompileState.GAVE_UP
        return CompileState.COMPILED if self.has_code else CompileState.PENDING

    # Frames

    def admits(self, tally: Tally, key: FrameKey) -> bool:
        """Allow an attempt for this frame, unless it may not be made or a backward pass needs the frame eager."""
        return self.may_attempt(tally, key) and not self._step.must_stay_eager(key.code)

    def may_attempt(self, tally: Tally, key: FrameKey) -> bool:
        """Allow this thread's call to run the compiler now for this frame."""
        if self._breaker.is_in_doubt or self._ledger.is_given_up(key):
            return False
        episode = self._breaker.episode
        if episode is None:
            return self._breaker.affords_another_refusal()
        probe = tally.probe
        if probe is None:
            return False
        return (probe.episode is episode and not probe.exclusive) or key.steady in probe.claims

    def is_open(self, tally: Tally) -> bool:
        """Allow this thread's call to run the compiler now for some frame at least."""
        if self._breaker.is_in_doubt:
            return False
        episode, probe = self._breaker.episode, tally.probe
        return episode is None or (probe is not None and (probe.episode is episode or bool(probe.claims)))

    def refused(self, tally: Tally, key: FrameKey) -> None:
        """Note that this frame would have been attempted in this call."""
        if self._ledger.is_given_up(key):
            tally.given_up += 1
        else:
            self._turns.ask(key.steady, tally.call)

    def ran_eagerly(self, *codes: Hashable) -> None:
        """Keep these eager until no backward pass can run them again."""
        self._step.ran_eagerly(*codes)

    def strike_out(self, code: CodeType) -> None:
        """Forget this code, which will never run again as a frame that Dynamo asks about."""
        self._ledger.strike_out(code)

    # Calls

    def let_through(self, tally: Tally, call: int) -> Probe | None:
        """Make a call the probe of the episode; None if it may not be."""
        probe = self._breaker.let_through(call)
        if probe is not None:
            probe.claims = frozenset() if self._breaker.is_long_overdue(call) else self._turns.claimants
            probe.exclusive = bool(probe.claims) and not self._turns.claimants_follow
        tally.probe = probe
        return probe

    def goes_straight(self, episode: Episode, call: int) -> bool:
        """True if a call that may not attempt has nothing to do with Dynamo, and is the eager function's alone."""
        return not self.has_code and call > episode.watched_until and not may_run_again()

    def hold_off(self, episode: Episode, call: int, before_call: float) -> None:
        """Let calls after this one go straight without asking, if it did and nothing is due.

        Args:
            episode: The episode in which the call began.
            call: Its number.
            before_call: Calls from this one on ask in any case.
        """
        if self.goes_straight(episode, call):
            due_call, due_time = episode.nothing_due_before(call)
            self._breaker.hold_off(min(due_call, before_call), due_time)
            if self._breaker.episode is not episode:  # another thread has replaced it, and had calls ask, meanwhile
                self._breaker.have_calls_ask()
