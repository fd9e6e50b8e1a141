"""Every use of non-public PyTorch, each with its reason, since when it is there, and what happens without it.

Written against torch 2.13 and checked on 2.10 and 2.14. Importing this module imports ``torch._dynamo``, so it is
imported at the first attempt and not before. What inductor keeps on disk and in mind is in `inductor`.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol, TypeAlias

from . import first_import  # noqa: F401  # before anything else imports Dynamo

# isort: split
import torch

# The C half of Dynamo, since 2.0. Essential.
import torch._C._dynamo.eval_frame as _eval_frame
import torch._dynamo
import torch._functorch.config
import torch._inductor

# The protocol between the C half and a frame callback, with ConvertFrameReturn below; since 2.7. Essential.
from torch._C._dynamo.eval_frame import _FrameAction as FrameAction
from torch._C._dynamo.eval_frame import _FrameExecStrategy as FrameExecStrategy

# What to do with frames of one code object, since 2.7; and to which callback this thread's frames are shown (None for
# none; returns the one before), since 2.0. See `run_directly`. Essential.
from torch._C._dynamo.eval_frame import set_code_exec_strategy, set_eval_frame

# Counts the compiles of each frame towards `accumulated_recompile_limit`; since 2.2. Essential, because without taking
# failed compiles back out of it 256 failures would use a frame up for whoever else compiles it.
from torch._dynamo.convert_frame import FRAME_COMPILE_COUNTER

# The way in which an analysis is started again, and the way in which a backend asks for a frame to be skipped. Both
# leave a backend as exceptions without being failures. Since 2.0. Essential.
from torch._dynamo.exc import FailOnRecompileLimitHit, RestartAnalysis, SkipFrame

# What `torch.compile` itself puts round callables without a frame of their own; since 2.1. Essential.
from torch._dynamo.external_utils import wrap_inline

# What replaces the guards of a dropped cache entry; since 2.6. Essential: Dynamo has no public way to drop one entry.
from torch._dynamo.guards import DeletedGuardManagerWrapper

# Which frames Dynamo leaves alone; since 2.0. Essential for honest books: such a frame has not fallen back.
from torch._dynamo.trace_rules import check as _is_skipped_file
from torch._dynamo.types import ConvertFrameReturn

# Where forward and backward graphs are made from a captured one; see `compiling_backward_too`.
from torch._functorch._aot_autograd import graph_compile
from torch.fx import GraphModule

__all__ = [
    "CachedFrame",
    "Compiler",
    "ConvertFrameReturn",
    "Frame",
    "FrameCallback",
    "FrameState",
    "UnsupportedTorchError",
    "abandon",
    "backends",
    "compile_lock",
    "compiling_backward_too",
    "count_compiles",
    "count_for_fullgraph",
    "drop_abandoned",
    "has_dynamic_shapes",
    "hit_recompile_limit",
    "inductor_modes",
    "inductor_options",
    "innermost",
    "interpose",
    "is_deliberate_limit",
    "is_disabled",
    "is_for_dynamo",
    "is_inline_wrapper",
    "is_recompile_limit",
    "is_skipped_file",
    "is_skipped_whatever_frame",
    "isolates_recompiles",
    "make_compiler",
    "mentions_torch",
    "run_directly",
    "run_eagerly",
    "set_eval_frame",
    "settings_for_compile",
    "skip_for_good",
    "skips_guards",
    "uncount_compiles",
    "visible",
    "with_guards",
]

_LOOKS_AT_FRAMES = "frame" in signature(_is_skipped_file).parameters  # since 2.12

_GRAPH_BREAKS: tuple[type[Exception], ...] = getattr(torch._dynamo.exc, "exceptions_allowed_to_be_fallback", ())

Frame: TypeAlias = Any
FrameState: TypeAlias = dict[Any, Any]
Compiler: TypeAlias = Callable[..., Callable[..., Any]]


class FrameCallback(Protocol):
    """What Dynamo calls for each Python frame that no cached code fits."""

    def __call__(self, frame: Frame, cache_entry: object, frame_state: FrameState) -> ConvertFrameReturn: ...


class UnsupportedTorchError(RuntimeError):
    """This version of PyTorch has changed where the library must reach into it."""


def make_compiler(backend: object, mode: str | None, options: dict[str, Any] | None, dynamic: bool | None) -> Compiler:
    """The compiler that ``torch.compile`` would hand captured graphs to, built by the classes it uses itself.

    Private because ``torch.compile`` keeps what it builds to itself. Since 2.0 (``use_aoti``: 2.8). Essential: only
    these give ``mode`` and ``options`` their meaning.
    """
    options = dict(options) if options else {}
    options.pop("guard_filter_fn", None)  # for Dynamo, not for the compiler
    use_aoti = options.pop("use_aoti", False)
    if backend is None:
        default = getattr(torch._dynamo.backends.registry, "get_default_backend", None)  # 2.12
        backend = default() if default is not None else "inductor"
    if backend != "inductor":
        wrapper: Compiler = torch._TorchCompileWrapper(backend, mode, options, dynamic)
    elif use_aoti:
        wrapper = torch._TorchCompileAOTInductorWrapper(mode, options, dynamic)
    else:
        wrapper = torch._TorchCompileInductorWrapper(mode, options, dynamic)
    return wrapper


def innermost(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function below ``torch.compile`` or ``torch.compiler.disable``. Since 2.0.

    Dynamo itself unwraps what it compiles a second time, and what a backend returns. Behind our wrapper it could not
    see that the latter is disabled already, and each graph would be switched off twice in each call.
    """
    inner: Callable[..., Any] = torch._dynamo.eval_frame.innermost_fn(fn)
    return inner


def visible(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function in the form that Dynamo can capture.

    Dynamo skips frames of torch.nn's own files, so of a module's call it captures the module's ``forward``. Where that
    is torch.nn's own too, as in a Sequential, ``module.compile()`` silently compiles nothing; ``torch.compile(module)``
    adds a frame round the call, and so does this. Since 2.1. Anything else is left to ``torch.compile``, also a
    ``forward`` that has been replaced by a partial, a callable object or a compiled function.

    Before 2.12 the wrappers of one code object share a recompile limit, so there each gets a copy of the code. A
    function round a compiled one gets one too: ``functools.wraps`` has copied a mark that ``torch.compile`` refuses.
    """
    module, name = getattr(fn, "__self__", None), getattr(fn, "__name__", None)
    if isinstance(module, torch.nn.Module) and name in _MODULE_CALLS and _is_from_torch(module.forward):
        wrapped: Callable[..., Any] = wrap_inline(fn)
        return wrapped
    if isinstance(fn, FunctionType) and (hasattr(fn, "get_compiler_config") or not isolates_recompiles()):
        return _with_own_code(fn)
    return fn


# The methods of a module that `torch.compile` never adds a frame round; since 2.1.
_MODULE_CALLS = ("_call_impl", "_wrapped_call_impl", "_lazy_forward")


def _is_from_torch(forward: object) -> bool:
    """Check for a plain method from a file that Dynamo skips. Another kind of ``forward`` may have no file."""
    if not isinstance(forward, MethodType) or not isinstance(forward.__func__, FunctionType):
        return False
    return not hasattr(forward, "_torchdynamo_orig_callable") and bool(_is_skipped_file(forward))


def _with_own_code(fn: FunctionType) -> FunctionType:
    """The same function with a code object of its own, to which Dynamo ties its cache and its recompile limit."""
    twin = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__kwdefaults__ = fn.__kwdefaults__
    return twin


def is_inline_wrapper(code: CodeType) -> bool:
    """Whether this is the frame that torch puts round callables that have none of their own."""
    return code.co_filename == wrap_inline.__code__.co_filename


def backends() -> list[str]:
    """Names of the backends that can be given as a string."""
    names: list[str] = torch._dynamo.list_backends(None)
    return names


def inductor_modes() -> list[str]:
    """Names of inductor's modes. Since 2.0."""
    return list(torch._inductor.list_mode_options())


def inductor_options() -> list[str]:
    """Names of inductor's options, and of those that ``torch.compile`` takes for itself. Since 2.0."""
    return [*torch._inductor.list_options(), "guard_filter_fn", "use_aoti"]


def isolates_recompiles() -> bool:
    """Whether ``isolate_recompiles`` exists; since 2.12. See `visible` for what is done without it."""
    return hasattr(_eval_frame, "set_eval_frame_isolate_recompiles_id")


def interpose(compiled: object, wrap: Callable[[FrameCallback], FrameCallback]) -> bool:
    """Put a callback of ours in front of the one with which a ``torch.compile``d function has its frames compiled.

    Dynamo offers no hook there, and it is the only place where a frame can be run eagerly once, whatever failed, before
    anything of it has run. The callback is a closure variable of the function that ``torch.compile`` returns; so it has
    been since 2.0. Essential.

    Returns:
        False if `compiled` did not come from Dynamo (a disabled or patched ``torch.compile``).

    Raises:
        UnsupportedTorchError: It came from Dynamo, but not in the shape this module knows.
    """
    if not hasattr(compiled, "_torchdynamo_orig_callable"):
        return False
    code, closure = getattr(compiled, "__code__", None), getattr(compiled, "__closure__", None)
    if code is None or closure is None or "callback" not in code.co_freevars:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} keeps its frame callback where compile_retry cannot find it"
        )
    cell = closure[code.co_freevars.index("callback")]
    inner = cell.cell_contents
    outer: Any = wrap(inner)
    # Dynamo walks this chain to the backend, whose identity decides which cache entries belong together.
    outer._torchdynamo_orig_backend = inner._torchdynamo_orig_backend
    cell.cell_contents = outer
    return True


def skips_guards() -> bool:
    """True under `set_stance(skip_guard_eval_unsafe=True)`, which switches guards off. Since 2.6."""
    return bool(getattr(torch._dynamo.eval_frame._stance, "skip_guard_eval_unsafe", False))


def with_guards(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Make a twin of a compiled function whose guards are always evaluated.

    Without guards Dynamo runs code that it has for other arguments, or raises because it has none, where we run
    eagerly. The function that ``torch.compile`` returns asks for the stance in each call, by a global name; so this is
    the same function with another answer there. Where it is another function or name, the stance stays as it is.
    """
    if not isinstance(compiled, FunctionType):
        return compiled
    names = dict(compiled.__globals__)
    twin = FunctionType(compiled.__code__, names, compiled.__name__, compiled.__defaults__, compiled.__closure__)
    twin.__kwdefaults__ = compiled.__kwdefaults__

    def run_with_guards(*args: Any, **kwargs: Any) -> Any:
        names.update(compiled.__globals__)  # the stance is one of them
        names["_is_skip_guard_eval_unsafe_stance"] = bool
        return twin(*args, **kwargs)

    return run_with_guards


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


def has_dynamic_shapes(graph_module: GraphModule) -> bool:
    """True if a graph takes sizes as arguments, so that it fits more than its example inputs."""
    inputs = graph_module.graph.find_nodes(op="placeholder")
    return any(isinstance(node.meta.get("example_value"), torch.SymInt) for node in inputs)


def is_for_dynamo(exc: BaseException) -> bool:
    """True if Dynamo makes a graph break of this, or restarts its analysis, when a backend raises it. Since 2.1."""
    return isinstance(exc, (RestartAnalysis, SkipFrame, *_GRAPH_BREAKS))


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


# Guards that were dropped last. Dynamo lets go of the interpreter lock while it evaluates guards, and holds no
# reference to them: another thread may still be in the middle of these, and would crash if they were freed.
_dropped: deque[object] = deque(maxlen=256)


class CachedFrame:
    """A cache entry of Dynamo's that is dropped when the function is gone. Holds it weakly: Dynamo owns it.

    `CacheEntry` itself is a C object that dangles after a reset; the guard manager knows whether it is still in use.
    Since 2.6. Essential.
    """

    def __init__(self, guarded_code: Any) -> None:
        self._manager: Callable[[], Any] = weakref.ref(guarded_code.guard_manager)

    @property
    def alive(self) -> bool:
        """Whether Dynamo may still use it: not after ``torch._dynamo.reset()``, nor once a guarded object has died."""
        manager = self._manager()
        return manager is not None and manager.extra_state is not None

    def drop(self) -> None:
        """Make Dynamo forget this entry, and this entry only."""
        manager = self._manager()
        if manager is not None and manager.extra_state is not None:  # pragma: no branch  # a reset may be faster
            dead = DeletedGuardManagerWrapper("compile_retry: its function is gone")
            dead.id_matched_objs = _UNCOUNTED
            _dropped.append(manager)
            manager.extra_state.invalidate(manager.cache_entry, dead)


# Entries that are dropped before the next compile. Functions are collected in the middle of whatever a thread does.
_abandoned: deque[CachedFrame] = deque()


def abandon(entries: Iterable[CachedFrame]) -> None:
    """Have Dynamo forget these soon: the function is gone that they were compiled for, and nothing else runs them.

    Otherwise they and the graphs behind them would stay for as long as the code object that they belong to.
    """
    _abandoned.extend(entries)


def drop_abandoned() -> None:
    """Make Dynamo forget what was left to it. Called where Dynamo does not go through its entries."""
    while _abandoned:
        _abandoned.popleft().drop()


class _Nobody:
    pass


# Entries are counted towards `recompile_limit` only if the objects that they were specialised to are the frame's own.
# An eager fallback should not use the limit up, so it names an object that no frame has.
_NOBODY = _Nobody()
_UNCOUNTED: dict[str, weakref.ReferenceType[object]] = {"compile_retry": weakref.ref(_NOBODY)}


def compiling_backward_too() -> AbstractContextManager[object]:
    """Make the backward graph's compile part of the forward's, where a failure of it can still be answered.

    Where no gradient is wanted there is no backward graph, and nothing changes. Since 2.10. Essential: otherwise a
    failing backward compile would surface in ``backward()``.
    """
    _donate_only_what_is_compiled_lazily()
    patch: AbstractContextManager[object] = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    return patch


@functools.cache
def _donate_only_what_is_compiled_lazily() -> None:
    """Keep a backward that is compiled before it is known how it will be called from overwriting its saved tensors.

    Such donated buffers are chosen since 2.5, and a graph that has them raises in ``backward(retain_graph=True)``;
    stock torch has seen by then that it must not choose any. To switch them off by `config.donated_buffer` does not
    help: then the graph keeps no list of them, and torch 2.13 takes that for a list that is not empty. So this is put
    in front of what chooses. For compiles that are not ours it changes nothing; without it that kind of call raises.
    """
    choose = getattr(graph_compile, "collect_bw_donated_buffer_idxs", None)
    if choose is not None:  # pragma: no branch  # it is there in the torch that the tests run on

        @functools.wraps(choose)
        def choose_unless_ours(*args: Any, **kwargs: Any) -> Any:
            return [] if torch._functorch.config.force_non_lazy_backward_lowering else choose(*args, **kwargs)

        graph_compile.collect_bw_donated_buffer_idxs = choose_unless_ours
