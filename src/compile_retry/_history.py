"""How long some of a function's calls took, and what happened to it: bounded, and cheap enough to be always on.

Not every call is timed: as many as make a picture, from the first to the last, and after each event the next one.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

from ._locks import Lock
from .events import Event

CallPath: TypeAlias = Literal["compiled", "mixed", "eager"]

# Beyond this every second sample goes, and from then on they are kept twice as far apart.
_MOST = 512
_MOST_EVENTS = 256
# How many seconds apart samples are taken at first. However fast the calls, one in so many is timed all the same, to
# see at once if they become slow; not all that are timed are kept.
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
        self._last: Sample | None = None  # that was timed
        self._kept: dict[_Kind, Sample] = {}  # the last of its kind
        self._apart = _APART
        self._lock = Lock()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Those that are left, oldest first."""
        return tuple(self._samples)

    def add(self, sample: Sample) -> None:
        with self._lock:
            last, self._last = self._last, sample
            if self._is_worth_keeping(sample):
                self._samples.append(sample)
                self._kept[_kind(sample)] = sample
            if len(self._samples) > _MOST:
                self._samples, self._apart = _every_second(self._samples), self._apart * 2
            self.next_call = sample.call + (1 if last is None else self._stride(last, sample))

    def _is_worth_keeping(self, sample: Sample) -> bool:
        """Until it is full every sample; then those that are as far from others of their kind as the old ones are."""
        kept = self._kept.get(_kind(sample))
        return kept is None or self._apart == _APART or sample.time - kept.time >= self._apart

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


# What is drawn alike. A kind that is rare is not thinned out with one that is not.
_Kind: TypeAlias = tuple[CallPath, bool]


def _kind(sample: Sample) -> _Kind:
    return sample.path, sample.attempted


def _every_second(samples: list[Sample]) -> list[Sample]:
    """Of each kind, from the oldest on."""
    seen: Counter[_Kind] = Counter()
    kept = []
    for sample in samples:
        if seen[_kind(sample)] % 2 == 0:
            kept.append(sample)
        seen[_kind(sample)] += 1
    return kept
