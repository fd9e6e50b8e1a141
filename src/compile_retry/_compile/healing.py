"""What torch remembers of a failure, dropped before the next attempt, so that a recovery leaves no trace.

In the process: inductor probes the compiler once and keeps the answer, and a probe that failed means code without
vector instructions, several times slower than it should be. On disk: a file that was cut short fails every later
compile, in every process; then an attempt is made in another directory.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from compile_retry._locks import Lock
from compile_retry._torch import inductor
from compile_retry.events import log

# For each of inductor's directories that did not work, the one that did, for the rest of the process.
_instead: dict[str, str] = {}


class _Asked:
    """Whether the compiler has been asked for vector instructions as often as makes sense since the last failure."""

    enough = False


_asked = _Asked()
# The directory is a matter of the environment, so one thread at a time changes it.
_moving = Lock()


def heal() -> None:
    """Make torch ask again what it asked while something was broken."""
    inductor.forget_failures()
    inductor.replace_dead_workers(all_graph_compilers=True)
    _asked.enough = False


@contextmanager
def working_cache(*, damaged: bool) -> Iterator[str | None]:
    """Where an attempt keeps its files: in the usual place, unless that is damaged or was found to be.

    Args:
        damaged: Whether the last failure suggests it.

    Yields:
        The usual directory where another one is tried for the first time, otherwise None.
    """
    inductor.replace_dead_workers()
    usual = inductor.cache_directory()
    known = _instead.get(usual)
    if damaged:
        with _moving, _another_directory() as another:
            with inductor.caching_in(another):
                yield usual
            _instead[usual] = another
    elif known is not None:
        with _moving, inductor.caching_in(known):
            yield None
    else:
        yield None


def find_vector_instructions() -> None:
    """Where the compiler seems to lack vector instructions that the processor has, ask it again.

    What it has is found on disk, so only the rest costs a compile. If it seems to have none at all, a damaged file may
    have answered: then it is asked once more where there is none.
    """
    if _asked.enough or not _lacks_some():
        return
    inductor.forget_failures()
    _asked.enough = _lacks_some()
    if not _asked.enough or _instruction_sets().usable:
        return
    with _moving, tempfile.TemporaryDirectory(prefix="compile_retry_") as directory, inductor.caching_in(directory):
        inductor.forget_failures()
        _asked.enough = _lacks_some()
    if _instruction_sets().usable:
        log.warning(
            "damaged files in %s keep inductor from finding vector instructions; delete it once no process uses it",
            inductor.cache_directory(),
        )


def _lacks_some() -> bool:
    found = _instruction_sets()
    return len(found.usable) < len(found.there)


def _instruction_sets() -> inductor.InstructionSets:
    try:
        return inductor.instruction_sets()
    except Exception:  # the compile that follows meets it again, and it is that one's failure
        return inductor.InstructionSets([], [], [])


@contextmanager
def _another_directory() -> Iterator[str]:
    """A new directory, for as long as this process lives if something comes of it."""
    directory = tempfile.mkdtemp(prefix="compile_retry_")
    try:
        yield directory
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    atexit.register(_remove, directory, os.getpid())


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # pragma: no branch  # not in a fork, which still uses it
        shutil.rmtree(directory, ignore_errors=True)
