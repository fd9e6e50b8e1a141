"""The ledger of what runs eagerly: frames that wait for another attempt, and frames that are given up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compile_retry._locks import Lock

if TYPE_CHECKING:
    from types import CodeType

    from .frame_key import FrameKey, Looks

# After so many looks of a frame that cannot be compiled, its code is given up whatever it looks like.
MOST_LOOKS = 8


class Ledger:
    """The ledger of one decorated function.

    Attributes:
        given_up: For each code, what its frames looked like that are never tried again.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        # Replaced as a whole, never changed, so that both can be read without the lock.
        self._waiting: tuple[FrameKey, ...] = ()
        self.given_up: dict[CodeType | None, frozenset[Looks]] = {}

    def wait(self, key: FrameKey) -> None:
        """Note that this runs eagerly until another attempt succeeds."""
        with self._lock:
            self._waiting = (*self._without(key), key.steady)

    def compiled(self, key: FrameKey, *, is_dynamic: bool = False) -> None:
        """Note that this is compiled, and with dynamic shapes what differs from it in sizes only."""
        with self._lock:
            self._waiting = self._without(key, is_dynamic=is_dynamic)

    def give_up(self, key: FrameKey) -> bool:
        """Note that this is never tried again. Returns whether that now goes for its code, however it looks."""
        with self._lock:
            self._waiting = self._without(key)
            looks = self.given_up.get(key.code, frozenset()) | {key.exact}
            self.given_up = {**self.given_up, key.code: looks}
            return len(looks) == MOST_LOOKS

    def forget(self, *, waiting: bool = False, given_up: bool = False) -> None:
        """Strike these out: when they are called again, they are attempted."""
        with self._lock:
            if waiting:
                self._waiting = ()
            if given_up:
                self.given_up = {}

    def strike_out(self, code: CodeType) -> None:
        """Forget this code, which will never run again."""
        with self._lock:
            self._waiting = tuple(key for key in self._waiting if key.code is not code)
            self.given_up = {known: looks for known, looks in self.given_up.items() if known is not code}

    def any_waiting(self) -> bool:
        """True if anything waits for another attempt."""
        return bool(self._waiting)

    def waits(self, key: FrameKey) -> bool:
        """True if this frame has failed and waits for another attempt."""
        return key.steady in self._waiting

    def is_given_up(self, key: FrameKey) -> bool:
        """True if this frame is never tried again."""
        looks = self.given_up.get(key.code)
        return looks is not None and (key.exact in looks or len(looks) >= MOST_LOOKS)

    def _without(self, key: FrameKey, *, is_dynamic: bool = False) -> tuple[FrameKey, ...]:
        if is_dynamic:
            return tuple(known for known in self._waiting if known.without_sizes != key.without_sizes)
        return tuple(known for known in self._waiting if known != key.steady)
