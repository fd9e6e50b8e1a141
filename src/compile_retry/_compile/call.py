"""Records of the calls in progress: what each has run so far, and which frame it is compiling."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from compile_retry._failures import FailureStage, Location
from compile_retry._ranks.agreement import Verdict
from compile_retry._record.record import Record
from compile_retry._schedule.episode import Probe, Unsettled
from compile_retry._torch.autotuning import Tuning

from .frame_key import FrameKey

if TYPE_CHECKING:
    from types import CodeType

    from compile_retry._torch.cache_entries import CachedFrame


@dataclass
class Conversion:
    """One frame that Dynamo is compiling in this thread.

    Attributes:
        location: The frame's function, file and line.
        key: The frame's key.
        began: The policy's clock when the compile began.
        graph: Number of the graph in this call, from 1, counting all graphs that ran before it.
        stage: The stage that it has reached.
        is_dynamic: Whether its graph was captured with dynamic shapes.
        runner: The function that runs the compiled graph.
        is_covered: Whether another thread compiled such a frame while this one waited for its turn.
        gave_way: Whether the backend raised `HeldOffError` to make the frame run eagerly.
        is_retuning: Whether the frame has code, which is to be tuned again.
        tuning: The autotuning of its graphs.
        once_agreed: Called when all ranks have compiled the frame, if the function has a group.
    """

    location: Location
    key: FrameKey
    began: float = 0.0
    graph: int = 1
    stage: FailureStage = "trace"
    is_dynamic: bool = False
    runner: Callable[..., Any] | None = None
    is_covered: bool = False
    gave_way: bool = False
    is_retuning: bool = False
    tuning: Tuning = field(default_factory=Tuning)
    once_agreed: Callable[[], object] = lambda: None


class Attempt(NamedTuple):
    """One run of the compiler.

    Attributes:
        function: Name of the decorated function.
        graph: Number of the graph in its call, from 1, counting all graphs that ran before it.
    """

    function: str
    graph: int


class Doubt(Unsettled):
    """A failure that may still turn out to be the program's own error. The end of the call decides.

    Attributes:
        root: The root cause, without its traceback.
        conversion: The frame that was being compiled.
        seconds: The attempt's duration, by the policy's clock.
        can_be_retried: Whether another attempt is possible at all.
        traceback: The traceback as text.
        exc: The exception to raise in strict mode; None otherwise, because it would keep the call's tensors alive.
        verdict: The verdict of all ranks, if the function has a group.
    """

    def __init__(
        self,
        root: BaseException,
        conversion: Conversion,
        seconds: float,
        traceback: str,
        exc: BaseException | None,
        *,
        can_be_retried: bool,
        verdict: Verdict | None = None,
    ) -> None:
        super().__init__()
        self.root, self.conversion, self.seconds = root, conversion, seconds
        self.traceback, self.exc, self.can_be_retried = traceback, exc, can_be_retried
        self.verdict = verdict


class PartlyTuned:
    """A frame's code that is to be tuned again.

    Attributes:
        key: The frame's key.
        entry: The code's entry in Dynamo's cache.
        candidates: The number of candidates of the operations that lack some.
        timed: How many of them were timed.
        turn: Returns the turn of the call that tunes it again now; None if there is none.
    """

    def __init__(self, conversion: Conversion, entry: CachedFrame) -> None:
        self.key, self.entry = conversion.key, entry
        self.candidates, self.timed = conversion.tuning.candidates, conversion.tuning.timed
        self.turn: Callable[[], Turn | None] = lambda: None

    def may_run(self, variables: object) -> bool:
        """Guard of the code, evaluated if all others have passed."""
        turn = self.turn()
        if turn is None or turn.thread != threading.get_ident():
            return True
        turn.was_passed_by = True
        return False

    def is_better_than(self, other: PartlyTuned) -> bool:
        """Return True if a larger share of its candidates was timed."""
        return self.timed * other.candidates > other.timed * self.candidates


class Turn:
    """One call's turn to tune a frame again. Only the call holds it, and with it the permission.

    Attributes:
        old: The code to replace.
        thread: The call's thread.
        was_passed_by: Whether the call has come to the frame, with arguments that the code fits.
        superseded: The cache entry to drop when the call is over; None if there is none.
    """

    def __init__(self, old: PartlyTuned, probe: Probe) -> None:
        self.old, self._probe = old, probe
        self.thread = threading.get_ident()
        self.was_passed_by = False
        self.superseded: CachedFrame | None = None
        old.turn = weakref.ref(self)

    def comes_to(self, code: CodeType) -> bool:
        """Return True, once, for the frame that passed the old code by."""
        comes = self.was_passed_by and self.old.key.code is code
        if comes:
            self.close()
        return comes

    def close(self) -> None:
        """Let the old code run again."""
        self.old.turn = lambda: None
        self.was_passed_by = False


# Between calls: a tally must not keep alive the record of a function that is gone, and with it its hooks.
NOBODY = Record(time.monotonic)


class Tally:
    """Counts of what one thread's current call has run, and its permission to attempt."""

    __slots__ = (
        "__weakref__",
        "_probe",
        "_turn",
        "at_end",
        "call",
        "compiled",
        "conversion",
        "doubt",
        "eager",
        "first_attempt",
        "given_up",
        "models",
        "record",
    )

    def __init__(self) -> None:
        self.record = NOBODY  # while a call is under way, that of its function
        self.call = 0  # its number; 0 if there is none
        self.compiled = 0  # graphs that ran compiled
        self.eager = 0  # graphs and frames that ran eagerly
        self.given_up = 0  # given-up frames among them; only counted in `CompiledFunction._watched`
        self.first_attempt: float | None = None  # the policy's clock when the call's first attempt began
        self._probe: weakref.ref[Probe] | None = None
        self.conversion: Conversion | None = None
        self._turn: weakref.ref[Turn] | None = None
        # Modules among the variables of frames that ran eagerly, outermost first. They give names to their submodules.
        self.models: list[weakref.ref[Any]] = []
        # To settle when the call is over: a failure, and callbacks to run if the program does not raise.
        self.doubt: Doubt | None = None
        self.at_end: list[Callable[[], object]] = []

    @property
    def probe(self) -> Probe | None:
        """This thread's permission to attempt during an episode. Only the probing call keeps it alive."""
        return self._probe() if self._probe is not None else None

    @probe.setter
    def probe(self, probe: Probe | None) -> None:
        self._probe = weakref.ref(probe) if probe is not None else None

    @property
    def turn(self) -> Turn | None:
        """This call's turn to tune a frame again. Only the call keeps it alive."""
        return self._turn() if self._turn is not None else None

    @turn.setter
    def turn(self, turn: Turn | None) -> None:
        self._turn = weakref.ref(turn) if turn is not None else None

    def attempted(self, conversion: Conversion) -> None:
        """Record that the call makes an attempt."""
        if self.first_attempt is None:
            self.first_attempt = conversion.began

    @property
    def graphs_before(self) -> int:
        """The number of graphs and eager frames that this call has run so far."""
        return self.compiled + self.eager


class Calls(threading.local):
    """The current calls of a function, or of several that share their compiled code, one per thread.

    Attributes:
        tally: This thread's tally.
    """

    def __init__(self) -> None:
        self.tally = Tally()
