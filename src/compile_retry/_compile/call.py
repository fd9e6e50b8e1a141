"""Records of the calls that are under way: what each has run so far, and which frame it compiles."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from compile_retry._failures import FailureStage, Location
from compile_retry._schedule.breaker import Probe, Unsettled

from .frame_key import FrameKey


@dataclass
class Conversion:
    """One frame that Dynamo is compiling in this thread.

    Attributes:
        location: The frame's function, file and line.
        key: What it is known by.
        began: The policy's clock when the compile began.
        graph: Which graph of the call it is, from 1, counting all that have run before it.
        stage: How far it got.
        is_dynamic: Its graph was captured with dynamic shapes.
        runner: What runs the compiled graph.
        is_covered: Another thread has compiled such a frame while this one waited for its turn.
        gave_way: The backend raised to have the frame run eagerly, because no attempt may be made now.
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
        graph: Which graph of the call it is, from 1, counting all that have run before it.
    """

    function: str
    graph: int


class Doubt(Unsettled):
    """A failure that may yet turn out to be the program's own error: the rest of the call will tell.

    Attributes:
        root: The root cause, without its traceback.
        conversion: The frame that was being compiled.
        seconds: How long it took, by the policy's clock.
        can_be_retried: Whether another attempt could be made at all.
        traceback: As text.
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


class Tally:
    """What one thread's current call of the function has run, and what it may do."""

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
    )

    def __init__(self) -> None:
        self.call = 0  # its number; 0 if there is none
        self.compiled = 0  # graphs that ran compiled
        self.eager = 0  # graphs and frames that ran eagerly
        self.given_up = 0  # of these, the frames that are given up, where the call is watched
        self.attempts = 0  # of all this thread's calls
        self._probe: weakref.ref[Probe] | None = None
        self.conversion: Conversion | None = None
        # Modules among the variables of frames that ran eagerly, outermost first: parts of theirs have a name.
        self.models: list[weakref.ref[Any]] = []
        # Left to settle when the call is over: a failure, and what else to do if the program does not raise.
        self.doubt: Doubt | None = None
        self.at_end: list[Callable[[], object]] = []

    @property
    def probe(self) -> Probe | None:
        """This thread's leave to attempt during an episode. Only the call that was let through keeps it alive."""
        return self._probe() if self._probe is not None else None

    @probe.setter
    def probe(self, probe: Probe | None) -> None:
        self._probe = weakref.ref(probe) if probe is not None else None

    @property
    def graphs_before(self) -> int:
        """How many graphs this call has run so far."""
        return self.compiled + self.eager


class Calls(threading.local):
    """The calls that are under way.

    Attributes:
        tally: Of this thread.
    """

    def __init__(self) -> None:
        self.tally = Tally()
