"""Periodic reports of attempts that are still running, from one thread that exists only while there are any."""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from compile_retry._locks import Lock

# Seconds until the first report; the next ones come after twice as many, four times as many, and so on.
FIRST = 60.0

Report = Callable[[float], None]


@dataclass(eq=False)
class _Running:
    report: Report
    every: float | None
    began: float = field(default_factory=time.monotonic)
    next: float = 0.0


class _Watch:
    def __init__(self) -> None:
        self._lock = Lock()
        self._running: list[_Running] = []
        self._wake = threading.Event()
        self._process = 0  # the process that has a watching thread; 0 if none has

    def add(self, running: _Running) -> None:
        with self._lock:
            # A forked child does not have the parent's thread.
            if self._process not in (0, os.getpid()):  # pragma: no cover  # test_g02_g04_g11_processes.py
                self._running, self._wake, self._process = [], threading.Event(), 0
            if not self._process:
                # Not `threading.Thread`: its start() waits forever if the new thread finds no memory to begin.
                _thread.start_new_thread(self._run, ())
            self._running.append(running)
            self._wake.set()

    def remove(self, running: _Running) -> None:
        with self._lock:
            self._running = [other for other in self._running if other is not running]
            self._wake.set()

    def _run(self) -> None:
        with self._lock:
            if self._process == os.getpid():  # another one was started before this one ran
                return
            self._process = os.getpid()
        while True:
            with self._lock:
                if not self._running:
                    self._process = 0
                    return
                self._wake.clear()
                now = time.monotonic()
                due = [running for running in self._running if running.next <= now]
                for running in due:
                    running.next = now + (running.every or now - running.began)
                wait = min(running.next for running in self._running) - now
                wake = self._wake
            for running in due:
                running.report(now - running.began)
            wake.wait(max(0.0, wait))


_watch = _Watch()


@contextmanager
def heartbeat(report: Report, *, every: float | None = None) -> Iterator[None]:
    """Call `report` after one minute, two, four and so on while the block runs.

    Args:
        report: Takes the seconds since the block began. It is called from another thread.
        every: Seconds between calls, if they should be regular.
    """
    running = _Running(report, every)
    running.next = running.began + (every or FIRST)
    try:
        _watch.add(running)
    except RuntimeError:  # no thread can be started, so there are no reports
        yield
        return
    try:
        yield
    finally:
        _watch.remove(running)
