"""Healing: clear what torch remembers of a failure before the next attempt, so that a recovery leaves no trace.

In the process, Inductor probes the compiler once and caches the result. A failed probe means code without vector
instructions, several times slower than normal. On disk, a truncated file fails every later compile, in every process.
Then the attempt uses another directory.
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

# Maps each cache directory that did not work to the one that did, for the rest of the process.
_replacements: dict[str, str] = {}


class _Probing:
    """Holds the flag that no further probe for vector instructions makes sense since the last failure."""

    is_done = False


_probing = _Probing()
# An environment variable holds the directory, so only one thread at a time may change it.
_moving = Lock()


def heal() -> None:
    """Make torch repeat the probes that it made while something was broken."""
    inductor.forget_failures()
    inductor.replace_dead_workers(all_graph_compilers=True)
    _probing.is_done = False


@contextmanager
def working_cache(*, damaged: bool) -> Iterator[str | None]:
    """Run an attempt in the usual cache directory, or in another one if the usual one is damaged.

    Args:
        damaged: Whether the last failure suggests that it is.

    Yields:
        The usual directory if another one is used for the first time, otherwise None.
    """
    inductor.replace_dead_workers()
    usual = inductor.cache_directory()
    known = _replacements.get(usual)
    if damaged:
        with _moving, _another_directory() as another:
            with inductor.caching_in(another):
                yield usual
            _replacements[usual] = another
    elif known is not None:
        with _moving, inductor.caching_in(known):
            yield None
    else:
        yield None


def find_vector_instructions() -> None:
    """Probe again if the compiler seems to lack vector instructions that the processor has.

    Results of successful probes are cached on disk, so only the missing ones cost a compile. If no instruction set is
    found at all, a damaged file may be the reason, so the probes run once more in an empty directory.
    """
    if _probing.is_done or not _lacks_some():
        return
    inductor.forget_failures()
    _probing.is_done = _lacks_some()
    if not _probing.is_done or _instruction_sets().usable:
        return
    with _moving, tempfile.TemporaryDirectory(prefix="compile_retry_") as directory, inductor.caching_in(directory):
        inductor.forget_failures()
        _probing.is_done = _lacks_some()
    if _instruction_sets().usable:
        log.warning(
            "damaged files in %s keep Inductor from finding vector instructions; delete it once no process uses it",
            inductor.cache_directory(),
        )


def _lacks_some() -> bool:
    found = _instruction_sets()
    return len(found.usable) < len(found.there)


def _instruction_sets() -> inductor.InstructionSets:
    try:
        return inductor.instruction_sets()
    except Exception:  # the compile that follows will fail in the same way and report it
        return inductor.InstructionSets([], [], [])


@contextmanager
def _another_directory() -> Iterator[str]:
    """Create a directory. Keep it until the process exits if the block succeeds, otherwise delete it."""
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
