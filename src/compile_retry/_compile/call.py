"""The calls of a decorated function that are under way: what each has run so far, and the frame that it compiles."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from functools import partial
    from types import CodeType

    from compile_retry._failures import FailureStage
    from compile_retry._schedule.breaker import Episode
    from compile_retry.events import Event

    from .frame_key import FrameKey

# Function, file and line.
Location: TypeAlias = tuple[str, str, int]


@dataclass
class Conversion:
    """One frame that Dynamo is compiling in this thread, and what came of its graph.

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


class Doubt:
    """A failure that may yet turn out to be the program's own error: the rest of the call will tell.

    Attributes:
        root: The root cause, without its traceback.
        conversion: What was being compiled.
        seconds: How long it took, by the policy's clock.
        can_be_retried: Whether another attempt could be made at all.
        traceback: As text.
        exc: What is raised in strict mode; None otherwise, because it would keep the call's tensors alive.
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
        self.root, self.conversion, self.seconds = root, conversion, seconds
        self.traceback, self.exc, self.can_be_retried = traceback, exc, can_be_retried
        self._process = os.getpid()

    @property
    def is_open(self) -> bool:
        """False in a forked child: it does not have the thread whose call this is."""
        return self._process == os.getpid()


class Tally:
    """What one thread's current call of the function has run, and what it may do."""

    __slots__ = (
        "__weakref__",
        "attempts",
        "call",
        "claims",
        "compiled",
        "conversion",
        "doubt",
        "eager",
        "exclusive",
        "given_up",
        "models",
        "probing",
        "skipped",
        "untold",
    )

    def __init__(self) -> None:
        self.call = 0  # its number; 0 if there is none
        self.compiled = 0  # graphs that ran compiled
        self.eager = 0  # graphs and frames that ran eagerly
        self.given_up = 0  # of these, the frames that are given up, where the call is watched
        self.attempts = 0  # of all this thread's calls
        self.probing: Episode | None = None  # let through during this one
        # In a probe: who has a claim to an attempt, and whether nobody else may make one.
        self.claims: frozenset[Hashable] = frozenset()
        self.exclusive = False
        self.conversion: Conversion | None = None
        # Modules among the variables of frames that ran eagerly, outermost first: parts of theirs have a name.
        self.models: list[weakref.ref[Any]] = []
        # What is left to settle when the call is over.
        self.doubt: Doubt | None = None
        self.skipped: list[tuple[CodeType, dict[object, object]]] = []
        # Events that are told when no lock is held: what makes them, given the function's state, and their log levels.
        self.untold: list[tuple[partial[Event], int | None]] = []

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
