"""The ledger of frames that run eagerly: those waiting for another attempt, and those given up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compile_retry._locks import Lock

if TYPE_CHECKING:
    from types import CodeType

    from .frame_key import FrameKey, Summaries

# After this many given-up keys of one code object, the code is given up for all arguments.
MAX_KEYS = 8


class Ledger:
    """The ledger of one decorated function.

    Attributes:
        given_up: For each code, the keys of its given-up frames.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        # Both are replaced, never mutated, so they can be read without the lock.
        self._waiting: tuple[FrameKey, ...] = ()
        self.given_up: dict[CodeType | None, frozenset[Summaries]] = {}

    def wait(self, key: FrameKey) -> None:
        """Record that this frame runs eagerly until another attempt succeeds."""
        with self._lock:
            self._waiting = (*self._without(key), key.steady)

    def compiled(self, key: FrameKey, *, is_dynamic: bool = False) -> None:
        """Record that this frame is compiled; with dynamic shapes, also frames that differ only in sizes."""
        with self._lock:
            self._waiting = self._without(key, is_dynamic=is_dynamic)

    def give_up(self, key: FrameKey) -> bool:
        """Record that this frame is never attempted again. Return True if this gives up its code altogether."""
        with self._lock:
            self._waiting = self._without(key)
            keys = self.given_up.get(key.code, frozenset()) | {key.exact}
            self.given_up = {**self.given_up, key.code: keys}
            return len(keys) == MAX_KEYS

    def forget(self, *, waiting: bool = False, given_up: bool = False) -> None:
        """Forget the waiting or the given-up frames, so that their next call attempts them."""
        with self._lock:
            if waiting:
                self._waiting = ()
            if given_up:
                self.given_up = {}

    def forget_code(self, code: CodeType) -> None:
        """Forget this code, because the frame callback will never see it again."""
        with self._lock:
            self._waiting = tuple(key for key in self._waiting if key.code is not code)
            self.given_up = {known: keys for known, keys in self.given_up.items() if known is not code}

    def any_waiting(self) -> bool:
        """Return True if anything waits for another attempt."""
        return bool(self._waiting)

    def waits(self, key: FrameKey) -> bool:
        """Return True if this frame has failed and waits for another attempt."""
        return key.steady in self._waiting

    def is_given_up(self, key: FrameKey) -> bool:
        """Return True if this frame is never attempted again."""
        keys = self.given_up.get(key.code)
        return keys is not None and (key.exact in keys or len(keys) >= MAX_KEYS)

    def _without(self, key: FrameKey, *, is_dynamic: bool = False) -> tuple[FrameKey, ...]:
        if is_dynamic:
            return tuple(known for known in self._waiting if known.without_sizes != key.without_sizes)
        return tuple(known for known in self._waiting if known != key.steady)
