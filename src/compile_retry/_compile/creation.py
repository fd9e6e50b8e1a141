"""The call to ``torch.compile`` itself, which may fail like any other attempt."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Collection
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.compiler import is_exporting

from compile_retry._failures import is_fatal
from compile_retry._locks import Lock

from .admission import Admission
from .call import Calls
from .checkpointing import UNSEEN
from .frame_key import CREATION
from .outcomes import Outcomes

if TYPE_CHECKING:
    from compile_retry._torch.frames import FrameCallback

    from .backend import GraphBackend
    from .frames import FrameConverter


class Created(NamedTuple):
    """A function that ``torch.compile`` has returned.

    Attributes:
        compiled: The function.
        with_guards: The same function, but it evaluates guards even under the stance that skips them.
        skips_guards: Returns True if that stance is on.
        bypassed_because: Returns the setting that makes PyTorch compile nothing, in words; empty if there is none.
    """

    compiled: Callable[..., Any]
    with_guards: Callable[..., Any]
    skips_guards: Callable[[], bool]
    bypassed_because: Callable[[], str]


class Creation:
    """Calls ``torch.compile`` for one function: once, and after a failure again when an attempt is due."""

    def __init__(self, region: Region, calls: Calls, admission: Admission, outcomes: Outcomes) -> None:
        self._region = region
        self._calls, self._admission, self._outcomes = calls, admission, outcomes
        self._lock = Lock()
        self._created: Created | None = None

    def create(self, fn: Callable[..., Any]) -> Created | None:
        """Call ``torch.compile``, unless another thread has done so.

        Returns:
            The compiled function; None if `fn` must run eagerly in this call.
        """
        with self._lock:
            if self._created is None:
                self._created = self._attempt(fn)
        self._outcomes.tell()
        return self._created

    def _attempt(self, fn: Callable[..., Any]) -> Created | None:
        admission, outcomes, tally = self._admission, self._outcomes, self._calls.tally
        # Inside torch.export, torch.compile would return the plain function, and we would keep it for good.
        if not admission.admits(tally, CREATION, at_no_cost=self._region.is_open) or is_exporting():
            admission.ran_eagerly(UNSEEN)
            outcomes.postponed(tally)
            admission.hold_off_first(tally)
            return None
        conversion = outcomes.begin(CREATION)
        conversion.stage = "torch.compile"
        if (agreement := outcomes.agreement) is not None:
            together = outcomes.attempt_together(
                agreement, partial(self._region.torch_compile, fn), conversion, tally, raises=is_fatal
            )
            if together is None:
                admission.ran_eagerly(UNSEEN)
                return None
            outcomes.created(tally, left=together[1])
            return together[0]
        try:
            created, usual = self._region.torch_compile(fn)
        except Exception as exc:
            if is_fatal(exc):
                raise
            outcomes.doubt(exc, conversion, tally)
            admission.ran_eagerly(UNSEEN)
            return None
        outcomes.created(tally, left=usual)
        return created


class Region:
    """The part of Dynamo that functions with shared code have in common: one backend and one frame callback.

    Dynamo's cache entries belong to a code object and a backend, and as of torch 2.12 to a region as well. The first
    function determines the region, and the others join it.
    """

    def __init__(
        self,
        options: dict[str, Any],
        calls: Calls,
        admission: Admission,
        outcomes: Outcomes,
        entry_frames: Collection[CodeType],
    ) -> None:
        self._options, self._entry_frames = options, entry_frames
        self._shared = calls, admission, outcomes
        self._outcomes = outcomes
        self._lock = Lock()
        self._backend: GraphBackend | None = None
        self._converter: FrameConverter | None = None
        self._code: CodeType | None = None
        self._number: int | None = None

    def torch_compile(self, fn: Callable[..., Any]) -> tuple[Created, str | None]:
        """Call ``torch.compile``. Also return the usual cache directory, if another one was used for the first time."""
        # Imports torch._dynamo, which takes a second and may itself fail, for example without a cache directory.
        from compile_retry._torch import functions

        from .healing import working_cache

        options = _copied(self._options)
        if functions.isolates_recompiles() and _accepts(torch.compile, "isolate_recompiles"):
            options.setdefault("isolate_recompiles", True)
        with self._lock, working_cache(damaged=self._outcomes.suspects_cache) as usual:
            options["backend"] = self._backend = self._backend or self._new_backend()
            visible, self._code = functions.visible(fn, self._code)
            compiled = _torch_compile(visible, options)
            functions.interpose(compiled, self._in_front)
            self._number = functions.join_region(compiled, self._number)
        created = Created(
            compiled, functions.with_guards(compiled), functions.skips_guards, functions.compiles_nothing_because
        )
        return created, usual

    @property
    def is_open(self) -> bool:
        """True once ``torch.compile`` has returned for one of the functions. For the others it compiles nothing."""
        return self._converter is not None

    def was_reset(self) -> bool:
        """Return True if Dynamo has forgotten the region's code."""
        return self._backend is not None and self._backend.was_reset

    def _new_backend(self) -> GraphBackend:
        from compile_retry._torch import compilers

        from .backend import GraphBackend

        options = self._options
        compiler = compilers.make_compiler(
            options.get("backend", "inductor"), options.get("mode"), options.get("options"), options.get("dynamic")
        )
        backend = GraphBackend(compiler, *self._shared)
        weakref.finalize(self, backend.abandon).atexit = False
        return backend

    def _in_front(self, inner: FrameCallback) -> FrameConverter:
        from .frames import FrameConverter

        if self._converter is None:
            self._converter = FrameConverter(inner, *self._shared, self._entry_frames)
            weakref.finalize(self, self._converter.abandon).atexit = False
        return self._converter


def stock_compile(fn: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Return what stock ``torch.compile`` makes of a function."""
    from compile_retry._torch import functions

    visible, _ = functions.visible(fn, None)
    return _torch_compile(visible, _copied(options))


def _copied(options: dict[str, Any]) -> dict[str, Any]:
    """Copy the options, because ``torch.compile`` removes entries from one of them."""
    if options.get("options") is None:
        return dict(options)
    return {**options, "options": dict(options["options"])}


def _torch_compile(fn: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    _creating.now = True
    try:
        compiled: Callable[..., Any] = torch.compile(fn, **options)
    finally:
        _creating.now = False
    return compiled


class _Creating(threading.local):
    now = False


_creating = _Creating()


def is_creating() -> bool:
    """Return True inside this thread's own call to ``torch.compile``, which must not be given a fallback again."""
    return _creating.now


def _accepts(fn: Callable[..., Any], option: str) -> bool:
    parameters = inspect.signature(fn).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
