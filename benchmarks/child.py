"""A process that waits to be told what to do, so that what happens in it can be timed from outside, side by side."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Command = Callable[[dict[str, Any]], Any]


def _obey(connection: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    kept: dict[str, Any] = {}
    while (command := connection.recv()) is not None:
        try:
            connection.send((command(kept), None))
        except Exception as exc:  # noqa: PERF203  # raised in the parent
            connection.send((None, exc))


class Child:
    """A fresh process with caches of its own.

    Args:
        environment: What is set in it from the start.
    """

    def __init__(self, **environment: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="benchmark_")
        environment = {"TORCHINDUCTOR_CACHE_DIR": self._directory.name, **environment}
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_obey, args=(theirs, environment), daemon=True)
        self._process.start()

    def do(self, command: Command) -> Any:
        """Have it run a function of a module that it can import, and wait for the answer.

        The function is handed a dictionary that lasts as long as the process.
        """
        self._connection.send(command)
        answer, exc = self._connection.recv()
        if exc is not None:
            raise exc
        return answer

    def close(self) -> None:
        """End it."""
        self._connection.send(None)
        self._process.join()
        self._directory.cleanup()
