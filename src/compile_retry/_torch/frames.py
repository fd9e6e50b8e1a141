"""The protocol between Dynamo's C half and a frame callback: frames, their state, and what may be answered.

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

# The C half of Dynamo, since 2.0. Essential.
import torch._C._dynamo.eval_frame as _eval_frame
import torch._dynamo

# The protocol between the C half and a frame callback, with ConvertFrameReturn below; since 2.7. Essential.
from torch._C._dynamo.eval_frame import _FrameAction as FrameAction
from torch._C._dynamo.eval_frame import _FrameExecStrategy as FrameExecStrategy

# What to do with frames of one code object, since 2.7; and to which callback this thread's frames are shown (None for
# none; returns the one before), since 2.0. See `run_directly`. Essential.
from torch._C._dynamo.eval_frame import set_code_exec_strategy, set_eval_frame

# Counts the compiles of each frame towards `accumulated_recompile_limit`; since 2.2. Essential, because without taking
# failed compiles back out of it 256 failures would use a frame up for whoever else compiles it.
from torch._dynamo.convert_frame import FRAME_COMPILE_COUNTER
from torch._dynamo.exc import FailOnRecompileLimitHit

# Which frames Dynamo leaves alone; since 2.0. Essential for honest books: such a frame has not fallen back.
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
    "is_skipped_whatever_frame",
    "mentions_torch",
    "run_directly",
    "run_eagerly",
    "set_eval_frame",
    "settings_for_compile",
    "skip_for_good",
    "uncount_compiles",
]

_LOOKS_AT_FRAMES = "frame" in signature(_is_skipped_file).parameters  # since 2.12


Frame: TypeAlias = Any


FrameState: TypeAlias = dict[Any, Any]


class FrameCallback(Protocol):
    """What Dynamo calls for each Python frame that no cached code fits."""

    def __call__(self, frame: Frame, cache_entry: object, frame_state: FrameState) -> ConvertFrameReturn: ...


def is_skipped_file(frame: Frame) -> bool:
    """True if Dynamo passes over this frame because of the file of its code."""
    named = {"frame": frame} if _LOOKS_AT_FRAMES else {}
    return bool(_is_skipped_file(frame.f_code, **named))


def is_skipped_whatever_frame(code: CodeType) -> bool:
    """True if that holds for all frames of this code. Dynamo takes some of torch.nn's up if their module has hooks."""
    return code.co_name != "forward"


def mentions_torch(frame: Frame) -> bool:
    """True if the frame's code names torch or NumPy: reason enough for Dynamo to compile it."""
    modules = (value for name in frame.f_code.co_names if type(value := frame.f_globals.get(name)) is ModuleType)
    return any(module.__name__.partition(".")[0] in ("torch", "numpy") for module in modules)


def run_directly(runner: Callable[..., Any], code: CodeType, names: dict[str, object]) -> None:
    """Have code that Dynamo has made call a graph's runner itself, not through the wrapper that Dynamo puts round it.

    That wrapper switches Dynamo off while the graph runs. The runner does so, too: going through both would cost each
    graph in each call half of what the library costs. Dynamo's code finds the wrapper among the global variables; so it
    has since 2.0. What is not found there stays as it is, and only takes longer.

    Args:
        runner: Runs the graph, with Dynamo switched off by `set_eval_frame`.
        code: What Dynamo has made of a frame in which the graph was captured.
        names: The global variables of that frame.
    """
    for name in code.co_names:
        wrapper = names.get(name)
        if isinstance(wrapper, FunctionType) and getattr(wrapper, "_torchdynamo_orig_callable", None) is runner:
            names[name] = runner
            # Nor is Dynamo to take the runner for a frame to compile.
            set_code_exec_strategy(runner.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.DEFAULT))


def run_eagerly(*, inner_frames: bool | None) -> ConvertFrameReturn:
    """Tell Dynamo to run this frame eagerly, this once. It remembers nothing.

    Args:
        inner_frames: Whether frames below this one may be compiled. If not, they still use cached code; if None, they
            do not even do that.
    """
    count_for_fullgraph()
    return _EAGERLY[inner_frames]


# Made once: this is the answer to each call of a frame that is held off. Dynamo only reads it.
_EAGERLY = {
    inner_frames: ConvertFrameReturn(frame_exec_strategy=FrameExecStrategy(FrameAction.DEFAULT, b), apply_to_code=False)
    for inner_frames, b in ((True, FrameAction.DEFAULT), (False, FrameAction.RUN_ONLY), (None, FrameAction.SKIP))
}


def count_for_fullgraph() -> bool:
    """Keep ``fullgraph=True`` from raising "found no compiled frames" after the body has run, which loses its result.

    That check counts frames in a thread-local counter, negative while it is off. Since 2.12; before, there is no check.

    Returns:
        Whether the check is on and this frame is the first one that it counts.
    """
    swap = getattr(_eval_frame, "set_fullgraph_compiled_frame_count", None)
    if swap is None:
        return False
    count = swap(-1)
    swap(count + 1 if count >= 0 else count)
    return bool(count == 0)


def skip_for_good() -> ConvertFrameReturn:
    """Tell Dynamo to pass over all frames of this code, though not over those below."""
    return ConvertFrameReturn()


def is_disabled() -> bool:
    """Whether nothing is to be compiled for now.

    Switched off, Dynamo would note in the code object to pass over it even after it is on again; and under
    ``torch.export`` without Dynamo the function is to be traced as it is.
    """
    return bool(torch._dynamo.config.disable) or torch.compiler.is_exporting()


def hit_recompile_limit(result: ConvertFrameReturn) -> bool:
    """Whether Dynamo has given a frame up because it was recompiled too often. From then on it says nothing."""
    return result.guarded_code is None and result.frame_exec_strategy.cur_action == FrameAction.RUN_ONLY


def is_recompile_limit(exc: BaseException) -> bool:
    """True if Dynamo gave a frame up because it was recompiled too often, under ``fullgraph=True``."""
    return isinstance(exc, FailOnRecompileLimitHit)


def is_deliberate_limit(exc: BaseException) -> bool:
    """Whether the user asked for an error at the recompile limit."""
    return is_recompile_limit(exc) and bool(torch._dynamo.config.fail_on_recompile_limit_hit)


def settings_for_compile(compiles: int) -> AbstractContextManager[object]:
    """Dynamo's settings for this thread's next compile of a frame.

    With `suppress_errors`, which users set, an error would skip the frame's code for good. Since 2.0.
    `accumulated_recompile_limit` counts the compiles of a code object and its cache entries, whichever wrapper they are
    of, so that the wrappers of one function would use it up for each other. Here it holds for what one wrapper has
    compiled. Since 2.6.

    Args:
        compiles: How often this wrapper's frames of that code were compiled.
    """
    config = torch._dynamo.config
    changes: dict[str, Any] = {}
    if config.suppress_errors:
        changes["suppress_errors"] = False
    if compiles < config.accumulated_recompile_limit:
        changes["accumulated_recompile_limit"] = sys.maxsize
    patch: AbstractContextManager[object] = config.patch(changes) if changes else nullcontext()
    return patch


def compile_lock() -> AbstractContextManager[object]:
    """Dynamo's own lock: one thread at a time compiles a frame. Reentrant; since 2.0.

    Without it, threads that have begun to wait for it would all attempt what the first of them has seen fail.
    """
    lock: AbstractContextManager[object] = getattr(torch._dynamo.convert_frame, "compile_lock", None) or nullcontext()
    return lock


def _free_compile_lock() -> None:  # pragma: no cover  # in forked children only: tests/test_processes.py
    """In a forked child, take that lock from a thread that was compiling: it is not there, and nobody could compile."""
    lock = compile_lock()
    if isinstance(lock, type(threading.RLock())):
        if lock.acquire(blocking=False):
            lock.release()
        else:
            torch._dynamo.convert_frame.compile_lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_free_compile_lock)


def count_compiles(frame_state: FrameState) -> int:
    """How often Dynamo has compiled this frame, for its `accumulated_recompile_limit`."""
    return FRAME_COMPILE_COUNTER.get(frame_state.get("_id", -1), 0)


def uncount_compiles(frame_state: FrameState, count: int) -> None:
    """Put that number back: a failed compile should not use the frame up."""
    FRAME_COMPILE_COUNTER[frame_state.get("_id", -1)] = count
