"""Simulated ranks: threads that run one at a time on a simulated clock, and a store whose operations let others run."""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import Store

SECONDS = 60.0


class Simulation:
    """Ranks as threads that run one at a time, on a clock that jumps to the next wake-up.

    Before and after every operation on the store, other ranks may run, for as long as `chance` decides.
    """

    def __init__(self, chance: random.Random, slowest: float) -> None:
        self._slowest = slowest
        self.now = 0.0
        self._chance = chance
        self._queue: list[tuple[float, float, threading.Semaphore]] = []
        self._idle = threading.Semaphore(0)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        turn = threading.Semaphore(0)
        heapq.heappush(self._queue, (self.now + seconds, self._chance.random(), turn))
        self._idle.release()
        assert turn.acquire(timeout=SECONDS)

    def step_aside(self) -> None:
        if self._chance.random() < 0.3:
            self.sleep(self._chance.choice((0.0, 0.01, self._slowest)))

    def run(self, works: list[Callable[[], None]]) -> None:
        def begin(work: Callable[[], None]) -> None:
            self.sleep(0)
            try:
                work()
            finally:
                self._idle.release()

        threads = [threading.Thread(target=begin, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
            assert self._idle.acquire(timeout=SECONDS)
        while self._queue:
            self.now, _, turn = heapq.heappop(self._queue)
            turn.release()
            assert self._idle.acquire(timeout=SECONDS)
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive()


class SimulatedStore:
    """A store whose operations let other ranks run, and may fail before or after they have taken effect."""

    def __init__(self, simulation: Simulation, store: Store, fails: Callable[[], bool] = lambda: False) -> None:
        self._simulation = simulation
        self._store = store
        self._fails = fails
        self.operations = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            self.operations += 1
            self._simulation.step_aside()
            if self._fails():
                raise RuntimeError("Connection reset by peer")
            if name in ("get", "multi_get"):  # would block
                assert self._store.check(args[0] if name == "multi_get" else [args[0]])
            result = getattr(self._store, name)(*args)
            self._simulation.step_aside()
            if self._fails():
                raise RuntimeError("Connection reset by peer")
            return result

        return operation
