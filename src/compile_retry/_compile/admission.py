"""Admission: decide which calls and frames of one function may be compiled now."""

from __future__ import annotations

from collections.abc import Hashable
from types import CodeType

from compile_retry._schedule.breaker import Breaker
from compile_retry._schedule.episode import Episode, Probe
from compile_retry._stats import CompileState
from compile_retry._torch.distributed import world_size
from compile_retry._torch.eager import may_run_again

from .call import Tally
from .checkpointing import Step
from .frame_key import FrameKey
from .ledger import Ledger
from .turns import Turns


class Admission:
    """Admission for one function. The call path, the frame callback and the backend all consult it.

    Attributes:
        has_code: Whether any graph has been compiled.
        eager_together: Whether all ranks have agreed to run the function eagerly for good.
    """

    def __init__(self, breaker: Breaker, ledger: Ledger, turns: Turns) -> None:
        self._breaker, self._ledger, self._turns = breaker, ledger, turns
        self._step = Step()
        self.has_code = False
        self.eager_together = False

    @property
    def state(self) -> CompileState:
        """The function's state."""
        episode = self._breaker.episode
        if episode is not None:
            return CompileState.GAVE_UP if episode.stopped else CompileState.FALLBACK
        if self._ledger.given_up:
            return CompileState.GAVE_UP
        return CompileState.COMPILED if self.has_code else CompileState.PENDING

    # Frames

    def admits(self, tally: Tally, key: FrameKey, *, at_no_cost: bool = False) -> bool:
        """Return True if this frame may be attempted and no backward pass needs it to stay eager.

        What costs nothing need not wait for others, unless it has failed itself.
        """
        is_free = at_no_cost and not (self._ledger.waits(key) or self._ledger.is_given_up(key))
        return (is_free or self.may_attempt(tally, key)) and not self._step.must_stay_eager(key.code)

    def may_attempt(self, tally: Tally, key: FrameKey) -> bool:
        """Return True if this thread's call may run the compiler for this frame now."""
        if self._breaker.is_in_doubt or self._ledger.is_given_up(key):
            return False
        episode = self._breaker.episode
        if episode is None:
            return self._breaker.affords_another_refusal() and self._may_begin()
        probe = tally.probe
        if probe is None:
            return False
        return (probe.episode is episode and not probe.exclusive) or key.steady in probe.claims

    def is_open(self, tally: Tally) -> bool:
        """Return True if this thread's call may run the compiler for at least some frame now."""
        if self._breaker.is_in_doubt:
            return False
        episode, probe = self._breaker.episode, tally.probe
        if episode is None:
            return self._may_begin()
        return probe is not None and (probe.episode is episode or bool(probe.claims))

    def _may_begin(self) -> bool:
        """Return True if failures of other functions do not forbid an attempt.

        With several ranks they never do: here an attempt would wait, and elsewhere perhaps not.
        """
        return world_size() > 1 or self._breaker.may_begin()

    def is_given_up(self, key: FrameKey) -> bool:
        """Return True if this frame, or a graph without one, is never attempted again."""
        return self._ledger.is_given_up(key)

    def refused(self, tally: Tally, key: FrameKey) -> None:
        """Record that this frame would have been attempted in this call."""
        if self._ledger.is_given_up(key):
            tally.given_up += 1
        else:
            self._turns.request(key.steady, tally.call)

    def ran_eagerly(self, *codes: Hashable) -> None:
        """Keep this code eager until no backward pass can run it again."""
        self._step.ran_eagerly(*codes)

    def forget_code(self, code: CodeType) -> None:
        """Forget this code, because Dynamo will never pass a frame of it to the callback again."""
        self._ledger.forget_code(code)

    # Calls

    def hold_off_first(self, tally: Tally) -> None:
        """Hold off later calls without further checks while other functions' failures forbid the first attempt."""
        if not self.has_code:
            self._breaker.hold_off_first(tally.record.history.next_call)

    def let_through(self, tally: Tally, call: int) -> Probe | None:
        """Make a call the episode's probe. Return None if it may not be."""
        probe = self._breaker.let_through(call)
        if probe is not None:
            probe.claims = frozenset() if self._breaker.is_long_overdue(call) else self._turns.claimants
            probe.exclusive = bool(probe.claims) and not self._turns.claimants_follow
        tally.probe = probe
        return probe

    def bypasses_dynamo(self, episode: Episode, call: int) -> bool:
        """Return True if a call that may not attempt can bypass Dynamo and run the eager function."""
        return not self.has_code and call > episode.watched_until and not may_run_again()

    def hold_off(self, episode: Episode, call: int, before_call: float) -> None:
        """Hold off later calls without further checks, if this call bypassed Dynamo and nothing is due.

        Args:
            episode: The episode in which the call began.
            call: The call's number.
            before_call: The first call that must check again in any case.
        """
        if self.bypasses_dynamo(episode, call):
            due_call, due_time = episode.nothing_due_before(call)
            self._breaker.hold_off(min(due_call, before_call), due_time)
            if self._breaker.episode is not episode:  # another thread has replaced it meanwhile
                self._breaker.resume_checks()
