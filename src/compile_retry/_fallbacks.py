"""What runs eagerly now: what waits for another attempt, and what is never tried again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ._locks import Lock

if TYPE_CHECKING:
    from ._failures import FailureKind
    from ._looks import Looks
    from ._torch_internals import CachedFrame

# Which frame it is, where no cache entry says so: its code and what its variables look like.
Fingerprint: TypeAlias = tuple[object, ...]

# The call of torch.compile() itself, where that fails.
CREATION: Fingerprint = ("torch.compile",)


@dataclass(eq=False)
class Fallback:
    """Something that runs eagerly.

    Attributes:
        fingerprint: The frame.
        entry: Dynamo's cache entry for it; None where Dynamo itself failed and made none.
        looks: What the call that it fell back in looked like; known when that call is over.
        new: That call is not over. Dynamo may not have stored the entry yet.
    """

    fingerprint: Fingerprint
    entry: CachedFrame | None = None
    looks: Looks | None = None
    new: bool = True

    @property
    def alive(self) -> bool:
        """Whether it still runs eagerly. A reset of Dynamo by the user sweeps cache entries away."""
        return self.new or self.entry is None or self.entry.alive


class Fallbacks:
    """What runs eagerly now: what waits for another attempt, and what does not."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: list[Fallback] = []
        self._permanent: list[Fallback] = []

    def add(self, fallback: Fallback, kind: FailureKind) -> None:
        """Note that this runs eagerly from now on, in place of what was noted of it before."""
        with self._lock:
            self.remove(fallback.entry, fallback.fingerprint)
            (self._waiting if kind == "transient" else self._permanent).append(fallback)

    def remove(self, entry: CachedFrame | None, fingerprint: Fingerprint | None = None) -> None:
        """Strike out what this entry stands for, and what has this fingerprint and no entry."""
        with self._lock:
            for fallbacks in (self._waiting, self._permanent):
                fallbacks[:] = [
                    f for f in fallbacks if (f.fingerprint != fingerprint if f.entry is None else f.entry is not entry)
                ]

    def forget(self, *, waiting: bool = False, permanent: bool = False, looks: Looks | None = None) -> None:
        """Strike these out. Their cache entries stay until there is better code: called again, they are compiled.

        With `looks`, only what fell back in calls that looked so.
        """
        with self._lock:
            if waiting:
                self._waiting = [f for f in self._waiting if looks is not None and f.looks != looks]
            if permanent:
                self._permanent = [f for f in self._permanent if looks is not None and f.looks != looks]

    def any_waiting(self) -> bool:
        """Whether anything that runs eagerly is to be tried again."""
        with self._lock:
            self._waiting = [f for f in self._waiting if f.alive]
            return bool(self._waiting)

    def any_permanent(self) -> bool:
        """Whether anything runs eagerly for good."""
        return any(f.alive for f in tuple(self._permanent))

    def waits(self, fingerprint: Fingerprint) -> bool:
        """Whether this frame is among those that failed and wait."""
        return any(f.fingerprint == fingerprint for f in tuple(self._waiting))

    def is_hopeless(self, fingerprint: Fingerprint) -> bool:
        """Whether Dynamo cannot compile this frame and is not to be asked again."""
        return any(f.entry is None and f.fingerprint == fingerprint for f in tuple(self._permanent))

    def is_permanent(self, entry: CachedFrame) -> bool:
        """Whether the graph behind this entry is never tried again."""
        return any(f.entry is entry for f in tuple(self._permanent))
