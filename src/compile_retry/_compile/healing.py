"""Healing: clear what torch remembers of a failure before the next attempt, so that a recovery leaves no trace.

In the process, Inductor probes the compiler once and caches the result. A failed probe means code without vector
instructions, several times slower than normal. On disk, a truncated file fails every later compile, in every process.
Then the attempt uses another directory.
"""

from __future__ import annotations

import atexit
import functools
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


class _Probes:
    """Holds the flag that the failed probes that Inductor remembers have been repeated since the last failure."""

    are_repeated = False


_probes = _Probes()
# An environment variable holds the directory, so only one thread at a time may change it.
_moving = Lock()


def heal() -> None:
    """Make torch repeat the probes that it made while something was broken."""
    inductor.forget_failures()
    inductor.replace_dead_workers(all_graph_compilers=True)
    _probes.are_repeated = False


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


@contextmanager
def reliable_probes() -> Iterator[None]:
    """Keep an attempt from using the answer of a compiler probe that failed for another reason than the processor.

    Nothing is probed ahead of Inductor: it probes if a kernel needs the answer. Answers that were remembered before the
    attempt are forgotten once if they say that instructions are missing.
    """
    if not _probes.are_repeated and inductor.remembers_failed_probes():
        inductor.forget_failures()
        _probes.are_repeated = True
    with inductor.judging_failed_probes(_repeat):
        yield


def _repeat(probe: inductor.Probe) -> bool:
    """Decide about a failed probe: repeat it in an empty directory, if the compiler works at all.

    Otherwise the compiler's error leaves the attempt, before Inductor stores slower code on disk. There it would be
    found by healthy processes too.
    """
    with (
        _moving,
        tempfile.TemporaryDirectory(prefix="compile_retry_", ignore_cleanup_errors=True) as directory,
        inductor.caching_in(directory),
    ):
        inductor.compile_plain_program(directory)
        found = probe()
    _probes.are_repeated = True
    if found and not probe():  # once more, in the usual directory
        _report_damaged_probes(inductor.cache_directory())
    return found


@functools.cache
def _report_damaged_probes(directory: str) -> None:
    log.warning(
        "damaged files in %s keep Inductor from finding vector instructions; delete it once no process uses it",
        directory,
    )


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
