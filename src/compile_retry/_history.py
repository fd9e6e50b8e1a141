"""How long some of a function's calls took, and what happened to it: bounded, and cheap enough to be always on.

Not every call is timed: as many as make a picture, and all of the slow ones.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

from ._locks import Lock
from .events import Event

CallPath: TypeAlias = Literal["compiled", "mixed", "eager"]

# Beyond this every second sample goes, and samples are taken half as often.
_MOST = 512
_MOST_EVENTS = 256
# How many seconds apart samples are taken at first, and how many calls at most where the clock stands still.
_APART = 0.02
_LONGEST_STRIDE = 1024


class Sample(NamedTuple):
    """One call.

    Attributes:
        time: When it ended, by the policy's clock.
        call: Its number.
        path: What ran in it.
        seconds: How long it took.
        attempted: Whether something was compiled in it, or failed to be.
    """

    time: float
    call: int
    path: CallPath
    seconds: float
    attempted: bool


# The clock when a call began, and how many attempts its thread had made before.
Began: TypeAlias = tuple[float, int]


class History:
    """What one function remembers."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        # The next call that is to be timed.
        self.next_call = 1
        self.events: deque[tuple[float, Event]] = deque(maxlen=_MOST_EVENTS)
        self._samples: list[Sample] = []
        self._apart = _APART
        self._lock = Lock()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Those that are left, oldest first."""
        return tuple(self._samples)

    def add(self, sample: Sample) -> None:
        with self._lock:
            last = self._samples[-1] if self._samples else None
            self._samples.append(sample)
            if len(self._samples) > _MOST:
                self._samples, self._apart = self._samples[::2], self._apart * 2
            self.next_call = sample.call + (1 if last is None else self._stride(last, sample))

    def add_event(self, event: Event) -> None:
        """After an event the next calls may run differently."""
        self.events.append((self.clock(), event))
        self.next_call = 0

    def seconds_per_call(self, path: CallPath) -> float | None:
        """What a call of this kind took in the median; None if none has been seen that did not compile."""
        seen = [sample.seconds for sample in self._samples if sample.path == path and not sample.attempted]
        return statistics.median(seen) if seen else None

    def _stride(self, last: Sample, sample: Sample) -> int:
        calls, seconds = max(1, sample.call - last.call), sample.time - last.time
        if seconds * _LONGEST_STRIDE <= calls * self._apart:
            return min(2 * calls, _LONGEST_STRIDE)
        return max(1, round(self._apart * calls / seconds))
