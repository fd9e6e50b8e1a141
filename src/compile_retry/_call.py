"""What one thread knows of its current call of a decorated function, and of the frame that it is compiling."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from functools import partial
    from types import CodeType

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
    fallback: Fallback | None = None
    gave_way: bool = False
    raised: bool = False


@dataclass(frozen=True)
class Attempt:
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
        self.call = 0  # its number; 0 if there is none
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


class PerThread(threading.local):
    """Where each thread finds its tally."""

    def __init__(self) -> None:
        self.tally = Tally()
