"""The protocol between Dynamo's C part and a frame callback: frames, their state, and the possible results.

Importing this module imports ``torch._dynamo``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from types import CodeType, FunctionType, ModuleType
from typing import Any, Protocol, TypeAlias

from . import first_import  # noqa: F401  # before anything else imports Dynamo

# isort: split
import torch

# The C part of Dynamo, since 2.0. Essential.
import torch._C._dynamo.eval_frame as _eval_frame
import torch._dynamo

# The protocol between the C part and a frame callback, with ConvertFrameReturn below; since 2.7. Essential.
from torch._C._dynamo.eval_frame import _FrameAction as FrameAction
from torch._C._dynamo.eval_frame import _FrameExecStrategy as FrameExecStrategy

# set_code_exec_strategy sets how Dynamo treats frames of one code object, since 2.7. set_eval_frame sets this thread's
# frame callback (None for none) and returns the previous one, since 2.0. See `run_directly`. Essential.
from torch._C._dynamo.eval_frame import set_code_exec_strategy, set_eval_frame

# Counts the compiles of each frame towards `accumulated_recompile_limit`; since 2.2. Essential: failed compiles must be
# removed from it, or 256 failures would exhaust the limit for all users of the frame's code.
from torch._dynamo.convert_frame import FRAME_COMPILE_COUNTER
from torch._dynamo.exc import FailOnRecompileLimitHit

# Returns True for frames that Dynamo skips; since 2.0. Essential for honest statistics: they have not fallen back.
from torch._dynamo.trace_rules import check as _is_skipped_file
from torch._dynamo.types import ConvertFrameReturn

__all__ = [
    "ConvertFrameReturn",
    "Frame",
    "FrameCallback",
    "FrameState",
    "compile_lock",
    "count_compiles",
    "count_for_fullgraph",
    "hit_recompile_limit",
    "is_deliberate_limit",
    "is_disabled",
    "is_recompile_limit",
    "is_skipped_file",
    "mentions_torch",
    "run_directly",
    "run_eagerly",
    "set_eval_frame",
    "settings_for_compile",
    "skip_for_good",
    "skips_all_frames_alike",
    "uncount_compiles",
]

_CHECKS_FRAMES = "frame" in signature(_is_skipped_file).parameters  # since 2.12


Frame: TypeAlias = Any


FrameState: TypeAlias = dict[Any, Any]


class FrameCallback(Protocol):
    """The callback that Dynamo calls for each Python frame without matching cached code."""

    def __call__(self, frame: Frame, cache_entry: object, frame_state: FrameState) -> ConvertFrameReturn: ...


def is_skipped_file(frame: Frame) -> bool:
    """Return True if Dynamo skips this frame because of its file."""
    named = {"frame": frame} if _CHECKS_FRAMES else {}
    return bool(_is_skipped_file(frame.f_code, **named))


def skips_all_frames_alike(code: CodeType) -> bool:
    """Return True if `is_skipped_file` is the same for all frames of this code.

    Dynamo compiles some ``forward`` frames of torch.nn's files only if the module has hooks.
    """
    return code.co_name != "forward"


def mentions_torch(frame: Frame) -> bool:
    """Return True if the frame's code refers to torch or NumPy, which is enough for Dynamo to compile it."""
    modules = (value for name in frame.f_code.co_names if type(value := frame.f_globals.get(name)) is ModuleType)
    return any(module.__name__.partition(".")[0] in ("torch", "numpy") for module in modules)


def run_directly(runner: Callable[..., Any], code: CodeType, names: dict[str, object]) -> None:
    """Make Dynamo's compiled code call a graph's runner directly, bypassing Dynamo's wrapper around it.

    That wrapper disables Dynamo while the graph runs, and so does the runner. Doing both would cost half of the
    library's overhead, for each graph in each call. The compiled code finds the wrapper in the global variables, since
    2.0. A wrapper that is not found there stays, and only takes longer.

    Args:
        runner: The function that runs the graph, with Dynamo disabled by `set_eval_frame`.
        code: The code that Dynamo generated for the frame in which the graph was captured.
        names: The global variables of that frame.
    """
    for name in code.co_names:
        wrapper = names.get(name)
        if isinstance(wrapper, FunctionType) and getattr(wrapper, "_torchdynamo_orig_callable", None) is runner:
            names[name] = runner
            # Dynamo must not compile the runner's frame either.
            set_code_exec_strategy(runner.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.DEFAULT))


def run_eagerly(*, inner_frames: bool | None) -> ConvertFrameReturn:
    """Return the result that makes Dynamo run this frame eagerly, this once, without remembering it.

    Args:
        inner_frames: Whether frames below this one may be compiled. If False, they still use cached code; if None, they
            do not.
    """
    count_for_fullgraph()
    return _EAGERLY[inner_frames]


# Created once, because each call of a held-off frame needs it. Dynamo only reads it.
_EAGERLY = {
    inner_frames: ConvertFrameReturn(frame_exec_strategy=FrameExecStrategy(FrameAction.DEFAULT, b), apply_to_code=False)
    for inner_frames, b in ((True, FrameAction.DEFAULT), (False, FrameAction.RUN_ONLY), (None, FrameAction.SKIP))
}


def count_for_fullgraph() -> bool:
    """Keep ``fullgraph=True`` from raising "found no compiled frames" after the body has run, which loses the result.

    That check uses a thread-local counter of frames, which is negative while the check is off. Since 2.12; earlier
    versions have no check.

    Returns:
        True if the check is on and this frame is the first that it counts.
    """
    swap = getattr(_eval_frame, "set_fullgraph_compiled_frame_count", None)
    if swap is None:
        return False
    count = swap(-1)
    swap(count + 1 if count >= 0 else count)
    return bool(count == 0)


def skip_for_good() -> ConvertFrameReturn:
    """Return the result that makes Dynamo skip all frames of this code, but not the frames below them."""
    return ConvertFrameReturn()


def is_disabled() -> bool:
    """Return True if nothing may be compiled now.

    While it is disabled, Dynamo would mark the code object to be skipped even after it is enabled again. Under
    ``torch.export`` without Dynamo, the function must be traced as it is.
    """
    return bool(torch._dynamo.config.disable) or torch.compiler.is_exporting()


def hit_recompile_limit(result: ConvertFrameReturn) -> bool:
    """Return True if the frame has reached a recompile limit. Dynamo does not report the frame again after that."""
    return result.guarded_code is None and result.frame_exec_strategy.cur_action == FrameAction.RUN_ONLY


def is_recompile_limit(exc: BaseException) -> bool:
    """Return True if Dynamo raised because a frame reached a recompile limit, as it does under ``fullgraph=True``."""
    return isinstance(exc, FailOnRecompileLimitHit)


def is_deliberate_limit(exc: BaseException) -> bool:
    """Return True if the exception is the error at the recompile limit that the user's config requests."""
    return is_recompile_limit(exc) and bool(torch._dynamo.config.fail_on_recompile_limit_hit)


def settings_for_compile(compiles: int, functions: int) -> AbstractContextManager[object]:
    """Patch Dynamo's config for this thread's next compile of a frame.

    With `suppress_errors`, which users may set, an error would make Dynamo skip the frame's code for good. Since 2.0.
    `accumulated_recompile_limit` counts the compiles of a code object and its cache entries for all wrappers together,
    so the wrappers of one function would exhaust it for each other. Here it applies to each wrapper separately. Since
    2.6.

    Functions that share their compiled code share the limits too, so these grow with their number.

    Args:
        compiles: How many times frames of that code have been compiled for these functions.
        functions: How many functions share their compiled code.
    """
    config = torch._dynamo.config
    changes: dict[str, Any] = {}
    if functions > 1:
        changes["recompile_limit"] = config.recompile_limit * functions
    if config.suppress_errors:
        changes["suppress_errors"] = False
    if compiles < config.accumulated_recompile_limit * max(1, functions):
        changes["accumulated_recompile_limit"] = sys.maxsize
    patch: AbstractContextManager[object] = config.patch(changes) if changes else nullcontext()
    return patch


def compile_lock() -> AbstractContextManager[object]:
    """Return Dynamo's own lock, which lets one thread at a time compile. Reentrant; since 2.0.

    Without it, threads waiting inside Dynamo would all repeat an attempt that has failed in the first of them.
    """
    lock: AbstractContextManager[object] = getattr(torch._dynamo.convert_frame, "compile_lock", None) or nullcontext()
    return lock


def _free_compile_lock() -> None:  # pragma: no cover  # only in forked children: test_g02_g04_g11_processes.py
    """Free the lock in a forked child if another thread held it, because that thread does not exist in the child."""
    lock = compile_lock()
    if isinstance(lock, type(threading.RLock())):
        if lock.acquire(blocking=False):
            lock.release()
        else:
            torch._dynamo.convert_frame.compile_lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_free_compile_lock)


def count_compiles(frame_state: FrameState) -> int:
    """Return how many compiles of this frame Dynamo counts towards `accumulated_recompile_limit`."""
    return FRAME_COMPILE_COUNTER.get(frame_state.get("_id", -1), 0)


def uncount_compiles(frame_state: FrameState, count: int) -> None:
    """Restore that count, because a failed compile should not count towards the limit."""
    FRAME_COMPILE_COUNTER[frame_state.get("_id", -1)] = count
