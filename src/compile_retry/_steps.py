"""What ran eagerly where a backward pass may run it again, and so has to stay eager until the training step is over.

Activation checkpointing runs a part of the forward pass once more during the backward pass. If that part runs eagerly
the one time and compiled the other, the backward pass finds other tensors saved than it needs, or other random numbers
drawn. The step is over when an optimizer has stepped, or when the training loop says so.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from ._locks import Lock
from ._torch_eager import in_backward, may_run_again, on_optimizer_step, repeater

# Stands for frames that ran below an eager frame, unseen.
UNSEEN = "frames below an eager frame"


class _EagerRun(NamedTuple):
    """That a frame has run eagerly.

    Attributes:
        plainly: As it stands, not as a captured graph.
        until: What lives as long as a backward pass may run the frame again; None stands for the step's end.
    """

    plainly: bool
    until: frozenset[weakref.ref[Any] | None]

    @property
    def may_be_repeated(self) -> bool:
        return bool(self.still_until)

    @property
    def still_until(self) -> frozenset[weakref.ref[Any] | None]:
        return frozenset(ref for ref in self.until if ref is None or ref() is not None)


class Step:
    """What one decorated function has run eagerly in the training step that each thread is in.

    A thread's step is its own: another one's optimizer does not end it.
    """

    def __init__(self) -> None:
        # Empty if nothing has run that may run again. Replaced as a whole, never changed: it is read without a lock.
        self.ran: dict[threading.Thread, dict[Hashable, _EagerRun]] = {}

    @staticmethod
    def is_watched() -> bool:
        """Whether a backward pass may run again what runs now."""
        return may_run_again() and not in_backward()

    def matters(self) -> bool:
        """Whether frames have to be told apart: what runs now may run again, or runs again what ran before."""
        return may_run_again() or bool(self.ran)

    def ran_eagerly(self, *frames: Hashable, plainly: bool) -> None:
        """Note that these run eagerly now, if a backward pass may run them again.

        Args:
            frames: By whatever names them.
            plainly: Whether they run as they stand, not as captured graphs.
        """
        if self.is_watched():
            until = repeater()
            with _lock:
                this, ran = threading.current_thread(), self._living()
                mine = {frame: run for frame, run in ran.get(this, {}).items() if run.may_be_repeated}
                for frame in frames:
                    run = mine.get(frame, _EagerRun(plainly, frozenset()))
                    mine[frame] = _EagerRun(run.plainly, run.still_until | {until})
                self.ran = {**ran, this: mine}
                _unfinished.add(self)
                _watch_optimizers()

    def has_begun(self) -> bool:
        """Whether a step is under way in which something has run eagerly that may run again."""
        return bool(self.ran) and bool(self._living())

    def must_stay_eager(self, frame: Hashable) -> bool:
        """Whether compiling this now could make a backward pass run it, or another frame, differently."""
        return self.has_begun() and (in_backward() or self.has_run_eagerly(frame) or self.has_run_eagerly(UNSEEN))

    def eager_frames(self) -> list[Hashable]:
        """What has run eagerly and may run again."""
        return [frame for ran in self._living().values() for frame, run in ran.items() if run.may_be_repeated]

    def has_run_eagerly(self, frame: Hashable) -> bool:
        """Whether this frame has run eagerly and may run again."""
        return any(run.may_be_repeated for run in self._runs(frame))

    def has_run_plainly(self, frame: Hashable) -> bool:
        """Whether this frame has run as it stands, and may run again."""
        return any(run.plainly and run.may_be_repeated for run in self._runs(frame))

    def end(self) -> bool:
        """End this thread's step. Returns whether no other thread is in one."""
        this = threading.current_thread()
        self.ran = {thread: ran for thread, ran in self._living().items() if thread is not this}
        return not self.ran

    def _runs(self, frame: Hashable) -> Iterator[_EagerRun]:
        return (ran[frame] for ran in self._living().values() if frame in ran)

    def _living(self) -> dict[threading.Thread, dict[Hashable, _EagerRun]]:
        return {thread: ran for thread, ran in self.ran.items() if thread.is_alive()}


_lock = Lock()
_unfinished: weakref.WeakSet[Step] = weakref.WeakSet()
_watching: list[RemovableHandle] = []


def mark_step_end() -> None:
    """Say that a training step is over: forward pass, backward pass, and the update of the weights.

    Only functions that are called under activation checkpointing need to know. What has run eagerly in a checkpointed
    forward pass is not compiled before the backward pass has run it again, and a step of any ``torch.optim`` optimizer
    shows that this is over. Call this once per step, in the thread that trains, if your loop updates its weights in
    another way: by hand, inside the backward pass, or in compiled code.
    """
    with _lock:
        for step in tuple(_unfinished):
            if step.end():
                _unfinished.discard(step)
        if not _unfinished:
            while _watching:
                _watching.pop().remove()


def _watch_optimizers() -> None:
    if not _watching:
        _watching.append(on_optimizer_step(_optimizer_stepped))


def _optimizer_stepped(*args: Any) -> None:
    # Traced as part of somebody's compiled code this does nothing. During a backward pass some optimizers update the
    # weights that are done; the step goes on.
    if not is_dynamo_compiling() and not in_backward():
        mark_step_end()
