"""Records of the calls in progress: what each has run so far, and which frame it is compiling."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from compile_retry._failures import FailureStage, Location
from compile_retry._record.record import Record
from compile_retry._schedule.breaker import Probe, Unsettled

from .frame_key import FrameKey


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
    ) -> None:
        super().__init__()
        self.root, self.conversion, self.seconds = root, conversion, seconds
        self.traceback, self.exc, self.can_be_retried = traceback, exc, can_be_retried


# Between calls: a tally must not keep alive the record of a function that is gone, and with it its hooks.
NOBODY = Record(time.monotonic)


class Tally:
    """Counts of what one thread's current call has run, and its permission to attempt."""

    __slots__ = (
        "__weakref__",
        "_probe",
        "at_end",
        "attempts",
        "call",
        "compiled",
        "conversion",
        "doubt",
        "eager",
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
        self.attempts = 0  # of all this thread's calls
        self._probe: weakref.ref[Probe] | None = None
        self.conversion: Conversion | None = None
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
