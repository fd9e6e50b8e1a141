"""What ran eagerly where a backward pass may run it again, and so has to stay eager until the training step is over.

Activation checkpointing runs a part of the forward pass once more during the backward pass. If that part runs eagerly
the one time and compiled the other, the backward pass finds other tensors saved than it needs, or other random numbers
drawn. The step is over when an optimizer has stepped, or when the training loop says so.
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

# Stands for frames that ran below an eager frame, unseen.
UNSEEN = "frames below an eager frame"

# What live as long as a backward pass may run a frame again; None stands for the step's end.
_Until: TypeAlias = frozenset["weakref.ref[Any] | None"]


class Step:
    """What one decorated function has run eagerly in the training step that each thread is in.

    Known by its code: compiled code for one look of a frame may fit another look of it as well. A thread's step is its
    own: another one's optimizer does not end it.
    """

    def __init__(self) -> None:
        # Empty if nothing has run that may run again. Replaced as a whole, never changed: it is read without a lock.
        self._ran: dict[threading.Thread, dict[Hashable, _Until]] = {}

    def ran_eagerly(self, *codes: Hashable) -> None:
        """Note that these run eagerly now, if a backward pass may run them again."""
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
        """Whether compiling this now could make a backward pass run it, or another frame, differently."""
        if not self._ran:
            return False
        ran = self._living().values()
        return in_backward() or any(_still(mine.get(known, frozenset())) for mine in ran for known in (code, UNSEEN))

    def end(self) -> bool:
        """End this thread's step. Returns whether no other thread is in one."""
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
