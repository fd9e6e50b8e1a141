"""Activation checkpointing: keep code eager until the training step is over if a backward pass may run it again.

Checkpointing runs part of the forward pass a second time during the backward pass. If that part runs eagerly one time
and compiled the other, the saved tensors or the random numbers differ. The step is over when an optimizer has stepped,
or when the training loop calls `mark_step_end`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from typing import Any, TypeAlias

from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from compile_retry._locks import Lock
from compile_retry._torch.eager import in_backward, may_run_again, on_optimizer_step, repeater

# Represents the frames below an eager frame, which the frame callback does not see.
UNSEEN = "frames below an eager frame"

# Objects that live as long as a backward pass may run a frame again; None stands for the end of the step.
_Until: TypeAlias = frozenset["weakref.ref[Any] | None"]


class Step:
    """Code that one decorated function has run eagerly in each thread's current training step.

    Frames are identified by code object only, because compiled code for one frame key may fit another one as well.
    Each thread has its own step: an optimizer in another thread does not end it.
    """

    def __init__(self) -> None:
        # Empty if nothing that ran may run again. Replaced, never mutated, because it is read without a lock.
        self._ran: dict[threading.Thread, dict[Hashable, _Until]] = {}

    def ran_eagerly(self, *codes: Hashable) -> None:
        """Record that this code runs eagerly now, if a backward pass may run it again."""
        if may_run_again() and not in_backward():
            until = repeater()
            with _lock:
                this, ran = threading.current_thread(), self._living()
                mine = {code: left for code, refs in ran.get(this, {}).items() if (left := _still(refs))}
                for code in codes:
                    mine[code] = mine.get(code, frozenset()) | {until}
                self._ran = {**ran, this: mine}
                _unfinished.add(self)
                _watch_optimizers()

    def must_stay_eager(self, code: Hashable) -> bool:
        """Return True if compiling this code now could make a backward pass run it, or another frame, differently."""
        if not self._ran:
            return False
        ran = self._living().values()
        return in_backward() or any(_still(mine.get(known, frozenset())) for mine in ran for known in (code, UNSEEN))

    def end(self) -> bool:
        """End this thread's step. Return True if no other thread is in a step."""
        this = threading.current_thread()
        self._ran = {thread: ran for thread, ran in self._living().items() if thread is not this}
        return not self._ran

    def _living(self) -> dict[threading.Thread, dict[Hashable, _Until]]:
        return {thread: ran for thread, ran in self._ran.items() if thread.is_alive()}


def _still(until: _Until) -> _Until:
    return frozenset(ref for ref in until if ref is None or ref() is not None)


_lock = Lock()
_unfinished: weakref.WeakSet[Step] = weakref.WeakSet()
_watching: list[RemovableHandle] = []


def mark_step_end() -> None:
    """Mark the end of a training step: forward pass, backward pass and weight update.

    This only matters for functions called under activation checkpointing. A frame that ran eagerly in a checkpointed
    forward pass is not compiled until the backward pass has run it again. The library recognizes the end of the step by
    the step of any ``torch.optim`` optimizer. If your loop updates its weights in another way (by hand, inside the
    backward pass, or in compiled code), call this once per step, in the training thread.
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
    # Do nothing if Dynamo traces this as part of compiled code. Optimizers that step during the backward pass update
    # only the weights whose gradients are ready; the step is not over.
    if not is_dynamo_compiling() and not in_backward():
        mark_step_end()
