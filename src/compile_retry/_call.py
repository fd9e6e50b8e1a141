"""The calls of a decorated function that are under way: what each has run so far, and the frame that it compiles."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ._locks import Lock
from ._stats import Counter

if TYPE_CHECKING:
    from collections.abc import Callable
    from functools import partial
    from types import CodeType
    from typing import Any

    from ._breaker import Episode
    from ._failures import CompileFailure
    from ._fallbacks import Fallback, Fingerprint
    from ._torch_internals import CachedFrame
    from .events import Event

# Function, file and line.
Location: TypeAlias = tuple[str, str, int]


@dataclass
class Conversion:
    """One frame that Dynamo is compiling in this thread, and what came of its graph.

    Attributes:
        location: The frame's function, file and line.
        fingerprint: By which it waits for another attempt where it has no cache entry.
        coarse: The same without shapes, by which it is given up.
        repeated: The same regardless of gradients, by which it is known when a backward pass runs it again.
        compiles: How often such a frame had been compiled before.
        retrying: The cached fallback that the compiled code is to replace, if this is a retry.
        began: The policy's clock when the compile began.
        graph: Which graph of the call it is, from 1, counting all that have run before it.
        attempted: The compiler was run.
        runner: What runs the compiled graph.
        fallback: The graph is going to run eagerly.
        gave_way: The backend raised to have the frame run eagerly, this once.
        raised: The backend raised to have the failure reach the user (strict mode).
    """

    location: Location
    fingerprint: Fingerprint
    coarse: Fingerprint
    repeated: Fingerprint
    compiles: int = 0
    retrying: CachedFrame | None = None
    began: float = 0.0
    graph: int = 1
    attempted: bool = False
    runner: Callable[..., Any] | None = None
    fallback: Fallback | None = None
    gave_way: bool = False
    raised: bool = False


class Attempt(NamedTuple):
    """One run of the compiler.

    Attributes:
        function: Name of the decorated function.
        graph: Which graph of the call it is, from 1, counting all that have run before it.
    """

    function: str
    graph: int


@dataclass
class Doubt:
    """A failure inside Dynamo that may yet turn out to be the program's own error: the rest of the call will tell."""

    exc: BaseException
    failure: CompileFailure
    seconds: float
    fallback: Fallback | None
    conversion: Conversion
    before: Episode | None
    during: Episode | None


class Tally:
    """What one thread's current call of the function has run, and what it may do."""

    __slots__ = (
        "__weakref__",
        "attempts",
        "call",
        "claims",
        "compiled",
        "conversion",
        "doubts",
        "eager",
        "exclusive",
        "fallen",
        "probing",
        "retrying",
        "skipped",
        "unsettled",
        "untold",
    )

    def __init__(self) -> None:
        self.call = 0  # its number; 0 if there is none, or none but one in the lane
        self.compiled = 0  # graphs that ran compiled
        self.eager = 0  # graphs and frames that ran eagerly
        self.attempts = 0  # of all this thread's calls
        self.probing: Episode | None = None  # let through during this one
        # In a probe: who has a claim to an attempt, and whether nobody else may make one.
        self.claims: frozenset[Hashable] = frozenset()
        self.exclusive = False
        self.retrying: CachedFrame | None = None
        self.conversion: Conversion | None = None
        # What is left to do when the call is over.
        self.unsettled = False
        self.doubts: list[Doubt] = []
        self.fallen: list[Fallback] = []
        self.skipped: list[tuple[CodeType, dict[object, object]]] = []
        # Events that are told when no lock is held: what makes them, given the function's state, and their log levels.
        self.untold: list[tuple[partial[Event], int | None]] = []

    @property
    def graphs_before(self) -> int:
        """How many graphs this call has run so far."""
        return self.compiled + self.eager


class Lane:
    """Where a call goes of which nothing need be known but that it ran compiled code. One call at a time.

    It costs next to nothing because it asks for no lock, and not even which thread it is. The interpreter changes
    threads only at calls and where it jumps back; so whoever looks at these and changes them, without calling anything
    in between, does so in one piece.

    Attributes:
        left: How many calls may still go through; 0 if it is closed.
        granted: How many calls might have gone through in all, so that ``granted - left`` have done so.
        graphs: 0 if no call is in it; otherwise one more than the compiled graphs which that has run.
    """

    __slots__ = ("granted", "graphs", "left")

    def __init__(self) -> None:
        self.left = self.granted = self.graphs = 0

    @property
    def passed(self) -> int:
        """How many calls have gone through it and are over."""
        return self.granted - self.left


class _PerThread(threading.local):
    """Where each thread finds its tally."""

    def __init__(self, register: Callable[[Tally], None]) -> None:
        self.tally = Tally()
        register(self.tally)


class Calls:
    """The calls of one function: their numbers, and what those that are under way have run so far.

    A call goes through the lane, or it is watched: then everything can be noted of it, in the tally of its thread. The
    lane is closed when a watched call begins, and opened only while none is under way. A call that is in it when
    anything but compiled code wants to know of it leaves it, and is watched from then on.

    Attributes:
        lane: The lane.
        numbers: Of the calls that do not begin in the lane.
    """

    def __init__(self) -> None:
        self.lane = Lane()
        self.numbers = Counter()
        self._lock = Lock()
        self._tallies: tuple[weakref.ref[Tally], ...] = ()
        self._per_thread = _PerThread(self._register)
        self._have_left = 0  # calls that have begun in the lane and left it
        self._numbers_before = 0  # when the lane was opened last
        # The call that was in the lane when it was closed, until its own thread takes note: number and compiled graphs.
        self._adrift = 0, 0

    @property
    def tally(self) -> Tally:
        """What this thread's call has run. To be asked within a call only: if that is in the lane, it leaves it."""
        tally = self._per_thread.tally
        if not tally.call:  # so it is in the lane, or was: all others have their numbers in their threads' tallies
            with self._lock:
                self._close()
                tally.call, tally.compiled = self._adrift
                tally.eager, self._adrift = 0, (0, 0)
        return tally

    def tally_before(self, is_within_lane: Callable[[], bool]) -> Tally:
        """This thread's tally, for a call that is about to begin.

        Args:
            is_within_lane: Finds out whether it is made within a call of this thread that began in the lane.
        """
        tally = self._per_thread.tally
        may_be_within = not tally.call and (self.lane.graphs or self._adrift[0])
        return self.tally if may_be_within and is_within_lane() else tally

    def begin(self, tally: Tally, number: int) -> None:
        """A call begins that is watched.

        Args:
            tally: Of this thread.
            number: The call's, of `numbers`.
        """
        with self._lock:
            self._close()
            tally.call, tally.compiled, tally.eager = number + self._begun_in_lane, 0, 0

    def end(self, tally: Tally, outer: tuple[int, int, int]) -> None:
        """It is over.

        Args:
            tally: Of this thread.
            outer: What the call that it ran in had been and had run, as in a tally; zeros if there is none.
        """
        tally.call, compiled, eager = outer
        if tally.call:  # what it has run, the other has run too
            tally.compiled += compiled
            tally.eager += eager

    def open_lane(self, before_call: int, unless: Callable[[], object]) -> None:
        """Let the next calls go through the lane if none is under way.

        Args:
            before_call: The first one that is to be watched again.
            unless: Asked when no call is under way that could still change the answer.
        """
        with self._lock:
            if self._adrift[0] or any(tally.call for ref in self._tallies if (tally := ref()) is not None) or unless():
                return
            lane, self._numbers_before = self.lane, self.numbers.value
            left = before_call - 1 - self._numbers_before - self._begun_in_lane
            if left > 0 and _IN_ONE_PIECE:
                lane.granted, lane.left = lane.granted + left, left

    @property
    def _begun_in_lane(self) -> int:
        return self.lane.passed + self._have_left

    def _close(self) -> None:
        lane = self.lane
        if lane.left:
            lane.granted, lane.left = lane.granted - lane.left, 0  # and the next line: in one piece, see `Lane`
            graphs, lane.graphs = lane.graphs, 0
            if graphs:
                self._have_left += 1
                self._adrift = self._numbers_before + self._begun_in_lane, graphs - 1

    def _register(self, tally: Tally) -> None:
        with self._lock:
            self._tallies = (*(ref for ref in self._tallies if ref() is not None), weakref.ref(tally))


# Nothing is without the interpreter lock.
_IN_ONE_PIECE: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
