"""Objects in processes of their own, each with a compiler that can be broken and with caches of its own.

Torch remembers of a broken compiler what it asked it, in the process and on disk: what is compared must share neither.
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

# Keep memory that is freed. Otherwise glibc gives large blocks back to the system after each use, or not, depending on
# the history of the process: forty steps of a CNN took 180 ms in one process and 240 ms in the next.
KEEPS_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "300000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}

# Broken, it still tells its version: so torch takes it for a compiler that knows no vector instructions. That is what a
# machine without memory looks like.
SCRIPT = """\
#!/bin/sh
if [ -e {flag} ] && [ "$1" != --version ]; then
    echo "virtual memory exhausted: Cannot allocate memory" >&2
    exit 1
fi
exec {real} "$@"
"""


class ChildError(Exception):
    """What a child's object raised, as text."""


class Child:
    """An object in another process. Ask it for what its methods return."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def ask(self, method: str, *args: Any) -> Any:
        """Call the object's method.

        Raises:
            ChildError: It raised.
            EOFError: The process ended.
        """
        self._connection.send((method, args))
        answer, error = self._connection.recv()
        if error is not None:
            raise ChildError(error)
        return answer


@contextmanager
def child(make: Callable[..., object], folder: Path, *args: Any) -> Iterator[Child]:
    """Another process that keeps ``make(folder, *args)``, with one thread and everything that torch keeps in `folder`.

    Its compiler is broken as long as there is a file `broken` in the folder.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, folder, *args))
    with _environment(folder):
        process.start()
    theirs.close()  # so that it is noticed if the process ends
    try:
        yield Child(ours)
    finally:
        ours.close()  # ends it
        process.join(timeout=10)
        process.kill()
        process.join()


def _serve(connection: Connection, make: Callable[..., object], *args: Any) -> None:
    torch.set_num_threads(1)  # more would compete with what else the machine does
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
def _environment(folder: Path) -> Iterator[None]:
    """What a process that starts meanwhile finds. Torch asks for it when it compiles first."""
    before = dict(os.environ)
    tmp = folder / "tmp"
    tmp.mkdir(exist_ok=True)
    os.environ.update(
        CXX=str(_compiler(folder)),
        TMPDIR=str(tmp),
        TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"),
        TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS="0",  # 150 MB for each process
        **KEEPS_MEMORY,
    )
    for name in ("COMPILE_RETRY_STRICT", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"):  # the second is inductor's
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _compiler(folder: Path) -> Path:
    """The script that stands in for the compiler: not on the disk that gets full, which has to hold it."""
    real = shutil.which("g++") or shutil.which("c++") or "c++"
    path = Path(tempfile.mkdtemp(dir=folder.parent)) / Path(real).name  # torch goes by the name
    path.write_text(SCRIPT.format(flag=shlex.quote(str(folder / "broken")), real=shlex.quote(real)))
    path.chmod(0o755)
    return path


def has_compiler() -> bool:
    """Whether there is a compiler to break."""
    return bool(shutil.which("g++") or shutil.which("c++"))
