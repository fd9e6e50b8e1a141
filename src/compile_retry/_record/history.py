"""The bounded history of a function: its events, and the durations of some of its calls. It is always on.

Only some calls are timed: enough to plot the whole run, the next call after each event, and each call that attempts.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

from compile_retry._locks import Lock
from compile_retry.events import AttemptFailed, Event, GaveUp, Recovered

CallPath: TypeAlias = Literal["compiled", "mixed", "eager"]

# At this number of samples, every second one is dropped, and the interval between kept samples doubles.
_MAX_SAMPLES = 512
# Calls with an attempt are not dropped while they are at most so many of these samples.
_MAX_ATTEMPTED = _MAX_SAMPLES // 2
_MAX_EVENTS = 64
_MAX_MARKS = 512
# Initial interval between samples, in seconds.
_INTERVAL = 0.1
# The first calls are all timed: they are a short run as a whole, and the beginning of every other.
_FIRST_CALLS = 10
# At least one call in this many is timed, however fast the calls are, to notice at once if they become slow. Not every
# timed call is kept.
_MAX_STRIDE = 4096


class Sample(NamedTuple):
    """One timed call.

    Attributes:
        time: The policy's clock when the call ended.
        call: The call's number.
        path: The code that ran: compiled, eager or both.
        seconds: The call's duration; from its first attempt if nobody knew before that there would be one.
        attempted: Whether the call made an attempt.
    """

    time: float
    call: int
    path: CallPath
    seconds: float
    attempted: bool


class Mark(NamedTuple):
    """A failure, a recovery or giving up: what is left of the event when others have displaced it.

    Attributes:
        call: The number of the call.
        kind: The event's class.
    """

    call: int
    kind: type[Event]


_MARKED = AttemptFailed, Recovered, GaveUp
_PATHS: tuple[CallPath, ...] = ("compiled", "mixed", "eager")


def _kind(sample: Sample) -> int:
    """Return the sample's kind. Each kind is thinned out on its own, so that rare kinds are not lost."""
    return len(_PATHS) * sample.attempted + _PATHS.index(sample.path)


class _Samples:
    """A table of samples, allocated at once, because growth in small steps looks like a memory leak."""

    def __init__(self) -> None:
        self.length = 0
        self._times, self._seconds = (array("d", bytes(8 * _MAX_SAMPLES)) for _ in range(2))
        self._calls, self._kinds = array("q", bytes(8 * _MAX_SAMPLES)), array("b", bytes(_MAX_SAMPLES))

    def __getitem__(self, row: int) -> Sample:
        attempted, path = divmod(self._kinds[row], len(_PATHS))
        return Sample(self._times[row], self._calls[row], _PATHS[path], self._seconds[row], bool(attempted))

    def append(self, sample: Sample) -> None:
        self._put(self.length, sample)
        self.length += 1

    def thin_out(self, *, attempted: bool) -> None:
        """Drop every second sample of each kind; of those with an attempt only if `attempted`."""
        seen: Counter[int] = Counter()
        length, self.length = self.length, 0
        for row in range(length):
            sample = self[row]
            if seen[_kind(sample)] % 2 == 0 or (sample.attempted and not attempted):
                self.append(sample)
            seen[_kind(sample)] += 1

    def _put(self, row: int, sample: Sample) -> None:
        self._times[row], self._calls[row], self._seconds[row] = sample.time, sample.call, sample.seconds
        self._kinds[row] = _kind(sample)


class History:
    """The history of one function."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        # The number of the next call to time.
        self.next_call = 1
        self.events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        self.marks: deque[Mark] = deque(maxlen=_MAX_MARKS)
        self._samples: _Samples | None = None
        self._last: tuple[float, int] | None = None  # time and number of the last timed call
        self._kept: dict[int, float] = {}  # the time of the last kept sample of each kind
        self._interval = _INTERVAL
        self._attempted = 0  # the number of kept samples with an attempt, until there are too many to keep all
        self._lock = Lock()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The kept samples, oldest first."""
        with self._lock:
            samples = self._samples
            return tuple(samples[row] for row in range(samples.length)) if samples is not None else ()

    def add(self, sample: Sample) -> None:
        """Add a timed call."""
        with self._lock:
            if self._samples is None:
                self._samples = _Samples()
            last, self._last = self._last, (sample.time, sample.call)
            self.next_call = sample.call + self._stride(last, sample)
            if self._is_worth_keeping(sample):
                self._samples.append(sample)
                self._kept[_kind(sample)] = sample.time
                self._attempted += sample.attempted
            if self._samples.length == _MAX_SAMPLES:
                self._samples.thin_out(attempted=self._attempted > _MAX_ATTEMPTED)
                self._interval *= 2

    def _is_worth_keeping(self, sample: Sample) -> bool:
        """Return True for every sample until the table is full, then only if the last of its kind is old enough.

        Return True for those with an attempt as long as there are few of them.
        """
        if sample.attempted and self._attempted <= _MAX_ATTEMPTED:
            return True
        kept = self._kept.get(_kind(sample))
        return kept is None or self._interval == _INTERVAL or sample.time - kept >= self._interval

    def add_event(self, event: Event) -> None:
        """Add an event. The next call is timed, because it may run differently."""
        self.events.append(event)
        if isinstance(event, _MARKED):
            self.marks.append(Mark(event.call, type(event)))
        self.next_call = 0

    def seconds_per_call(self, path: CallPath) -> float | None:
        """Return the median duration of this path's samples without attempts, or None if there are none."""
        from statistics import median  # slow to import, and rarely needed

        seen = [sample.seconds for sample in self.samples if sample.path == path and not sample.attempted]
        return median(seen) if seen else None

    def _stride(self, last: tuple[float, int] | None, sample: Sample) -> int:
        """Return the number of calls until the next one to time."""
        if last is None or sample.call < _FIRST_CALLS:
            return 1
        calls, seconds = max(1, sample.call - last[1]), sample.time - last[0]
        if seconds * _MAX_STRIDE <= calls * self._interval:
            return min(2 * calls, _MAX_STRIDE)
        return max(1, round(self._interval * calls / seconds))
