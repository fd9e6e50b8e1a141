"""Objects in separate processes, each with its own breakable compiler and its own caches.

Torch remembers the answers of a broken compiler, in the process and on disk, so subjects must share neither.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Keep freed memory. Otherwise glibc may or may not return large blocks to the system after each use, depending on the
# history of the process: forty steps of a CNN took 180 ms in one process and 240 ms in the next.
KEEPS_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "300000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}

# Return large blocks at once, so that the size of the process is what it uses.
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}

# While broken it still prints its version, so torch takes it for a compiler without vector instructions. A machine
# without memory behaves like this.
SCRIPT = """\
#!/bin/sh
if [ -e {flag} ] && [ "$1" != --version ]; then
    echo "virtual memory exhausted: Cannot allocate memory" >&2
    exit 1
fi
exec {real} "$@"
"""


class ChildError(Exception):
    """An exception raised by a child's object, as text."""


class Child:
    """A proxy for an object in another process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def ask(self, method: str, *args: Any) -> Any:
        """Call the object's method.

        Raises:
            ChildError: The method raised.
            EOFError: The process ended.
        """
        self._connection.send((method, args))
        answer, error = self._connection.recv()
        if error is not None:
            raise ChildError(error)
        return answer


@contextmanager
def child(
    make: Callable[..., object], folder: Path, *args: Any, memory: dict[str, str] = KEEPS_MEMORY
) -> Iterator[Child]:
    """Start a process that holds ``make(folder, *args)``, with one thread and all of torch's caches in `folder`.

    Its compiler is broken while the folder contains a file `broken`. The variables `memory` tell glibc how to allocate.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, folder, *args))
    with _environment(folder, memory):
        process.start()
    theirs.close()  # so that we notice if the process ends
    try:
        yield Child(ours)
    finally:
        ours.close()  # ends the process
        process.join(timeout=10)
        process.kill()
        process.join()


def _serve(connection: Connection, make: Callable[..., object], *args: Any) -> None:
    torch.set_num_threads(1)  # more would compete with other load on the machine
    for name in ("compile_retry", "torch._dynamo"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    thing = make(*args)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((getattr(thing, method)(*arguments), None))
        except Exception as exc:
            connection.send((None, f"{type(exc).__name__}: {exc}"))


@contextmanager
def _environment(folder: Path, memory: dict[str, str]) -> Iterator[None]:
    """Set the environment for processes started in this block. Torch reads it at its first compile."""
    before = dict(os.environ)
    tmp = folder / "tmp"
    tmp.mkdir(exist_ok=True)
    os.environ.update(
        CXX=str(_compiler(folder)),
        TMPDIR=str(tmp),
        TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"),
        TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS="0",  # 150 MB for each process
        **memory,
    )
    for name in ("COMPILE_RETRY", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"):  # the second is Inductor's
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _compiler(folder: Path) -> Path:
    """Write the compiler wrapper script, not on the disk that will be full."""
    real = shutil.which("g++") or shutil.which("c++") or "c++"
    path = Path(tempfile.mkdtemp(dir=folder.parent)) / Path(real).name  # torch identifies the compiler by name
    path.write_text(SCRIPT.format(flag=shlex.quote(str(folder / "broken")), real=shlex.quote(real)))
    path.chmod(0o755)
    return path


def has_compiler() -> bool:
    """Return True if there is a compiler to break."""
    return bool(shutil.which("g++") or shutil.which("c++"))
