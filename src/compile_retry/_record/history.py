"""How long some of a function's calls took, and what happened to it: bounded, and cheap enough to be always on.

Not every call is timed: as many as make a picture, from the first to the last, and after each event the next one.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

from compile_retry._locks import Lock
from compile_retry.events import Event

CallPath: TypeAlias = Literal["compiled", "mixed", "eager"]

# When there are so many every second sample goes, and from then on they are kept twice as far apart.
_MOST = 512
_MOST_EVENTS = 64
# How many seconds apart samples are taken at first. However fast the calls, one in so many is timed all the same, to
# see at once if they become slow; not all that are timed are kept.
_APART = 0.1
_LONGEST_STRIDE = 4096


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


_PATHS: tuple[CallPath, ...] = ("compiled", "mixed", "eager")


def _kind(sample: Sample) -> int:
    """What is drawn alike. A kind that is rare is not thinned out with one that is not."""
    return len(_PATHS) * sample.attempted + _PATHS.index(sample.path)


class _Samples:
    """A table of them: made at once, because what grows in small pieces looks like a leak."""

    def __init__(self) -> None:
        self.length = 0
        self._times, self._seconds = (array("d", bytes(8 * _MOST)) for _ in range(2))
        self._calls, self._kinds = array("q", bytes(8 * _MOST)), array("b", bytes(_MOST))

    def __getitem__(self, row: int) -> Sample:
        attempted, path = divmod(self._kinds[row], len(_PATHS))
        return Sample(self._times[row], self._calls[row], _PATHS[path], self._seconds[row], bool(attempted))

    def append(self, sample: Sample) -> None:
        self._put(self.length, sample)
        self.length += 1

    def thin_out(self) -> None:
        """Of each kind, drop every second one."""
        seen: Counter[int] = Counter()
        length, self.length = self.length, 0
        for row in range(length):
            sample = self[row]
            if seen[_kind(sample)] % 2 == 0:
                self.append(sample)
            seen[_kind(sample)] += 1

    def _put(self, row: int, sample: Sample) -> None:
        self._times[row], self._calls[row], self._seconds[row] = sample.time, sample.call, sample.seconds
        self._kinds[row] = _kind(sample)


class History:
    """What one function remembers."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        # The next call that is to be timed.
        self.next_call = 1
        self.events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self._samples: _Samples | None = None
        self._last: tuple[float, int] | None = None  # time and number of the last call that was timed
        self._kept: dict[int, float] = {}  # when the last sample of a kind was taken
        self._apart = _APART
        self._lock = Lock()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Those that are left, oldest first."""
        with self._lock:
            samples = self._samples
            return tuple(samples[row] for row in range(samples.length)) if samples is not None else ()

    def add(self, sample: Sample) -> None:
        """Remember a call that was timed."""
        with self._lock:
            if self._samples is None:
                self._samples = _Samples()
            last, self._last = self._last, (sample.time, sample.call)
            self.next_call = sample.call + (1 if last is None else self._stride(last, sample))
            if self._is_worth_keeping(sample):
                self._samples.append(sample)
                self._kept[_kind(sample)] = sample.time
            if self._samples.length == _MOST:
                self._samples.thin_out()
                self._apart *= 2

    def _is_worth_keeping(self, sample: Sample) -> bool:
        """Until the table was full every sample; then those as far from others of their kind as the old ones are."""
        kept = self._kept.get(_kind(sample))
        return kept is None or self._apart == _APART or sample.time - kept >= self._apart

    def add_event(self, event: Event) -> None:
        """Remember an event. After it the next calls may run differently, so they are timed."""
        self.events.append(event)
        self.next_call = 0

    def seconds_per_call(self, path: CallPath) -> float | None:
        """What a call of this kind took in the median; None if none has been seen that did not compile."""
        from statistics import median  # few need it, and it takes long to import

        seen = [sample.seconds for sample in self.samples if sample.path == path and not sample.attempted]
        return median(seen) if seen else None

    def _stride(self, last: tuple[float, int], sample: Sample) -> int:
        calls, seconds = max(1, sample.call - last[1]), sample.time - last[0]
        if seconds * _LONGEST_STRIDE <= calls * self._apart:
            return min(2 * calls, _LONGEST_STRIDE)
        return max(1, round(self._apart * calls / seconds))
