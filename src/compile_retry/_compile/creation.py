"""The call to ``torch.compile`` itself, which may fail like any other attempt."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch.compiler import is_exporting

from compile_retry._failures import is_fatal
from compile_retry._locks import Lock

from .admission import Admission
from .call import Calls
from .checkpointing import UNSEEN
from .frame_key import CREATION
from .outcomes import Outcomes


class Created(NamedTuple):
    """A function that ``torch.compile`` has returned.

    Attributes:
        compiled: The function.
        with_guards: The same function, but it evaluates guards even under the stance that skips them.
        skips_guards: Returns True if that stance is on.
    """

    compiled: Callable[..., Any]
    with_guards: Callable[..., Any]
    skips_guards: Callable[[], bool]


class Creation:
    """Calls ``torch.compile`` for one function: once, and after a failure again when an attempt is due."""

    def __init__(
        self,
        options: dict[str, Any],
        calls: Calls,
        admission: Admission,
        outcomes: Outcomes,
        entry_frames: Collection[CodeType],
    ) -> None:
        self._options, self._entry_frames = options, entry_frames
        self._calls, self._admission, self._outcomes = calls, admission, outcomes
        self._lock = Lock()
        self._created: Created | None = None

    def create(self, fn: Callable[..., Any], owner: object) -> Created | None:
        """Call ``torch.compile``, unless another thread has done so.

        Args:
            fn: The function.
            owner: The object whose lifetime bounds that of the compiled code.

        Returns:
            The compiled function; None if `fn` must run eagerly in this call.
        """
        with self._lock:
            if self._created is None:
                self._created = self._attempt(fn, owner)
        self._outcomes.tell()
        return self._created

    def _attempt(self, fn: Callable[..., Any], owner: object) -> Created | None:
        admission, outcomes, tally = self._admission, self._outcomes, self._calls.tally
        # Inside torch.export, torch.compile would return the plain function, and we would keep it for good.
        if not admission.admits(tally, CREATION) or is_exporting():
            admission.ran_eagerly(UNSEEN)
            return None
        conversion = outcomes.begin(CREATION)
        conversion.stage = "torch.compile"
        try:
            created, usual = self._torch_compile(fn, owner)
        except Exception as exc:
            if is_fatal(exc):
                raise
            outcomes.doubt(exc, conversion, tally)
            admission.ran_eagerly(UNSEEN)
            return None
        outcomes.created(tally, left=usual)
        return created

    def _torch_compile(self, fn: Callable[..., Any], owner: object) -> tuple[Created, str | None]:
        # Imports torch._dynamo, which takes a second and may itself fail, for example without a cache directory.
        from compile_retry._torch import compilers, functions
        from compile_retry._torch import frames as torch_frames

        from .backend import GraphBackend
        from .frames import FrameConverter
        from .healing import working_cache

        shared, options = (self._calls, self._admission, self._outcomes), dict(self._options)
        if options.get("options") is not None:
            options["options"] = dict(options["options"])  # torch.compile removes entries from it
        if functions.isolates_recompiles() and _accepts(torch.compile, "isolate_recompiles"):
            options.setdefault("isolate_recompiles", True)
        with working_cache(damaged=self._outcomes.suspects_cache) as usual:
            compiler = compilers.make_compiler(
                options.get("backend", "inductor"),
                options.get("mode"),
                self._options.get("options"),
                options.get("dynamic"),
            )
            options["backend"] = backend = GraphBackend(compiler, *shared)
            compiled: Callable[..., Any] = torch.compile(functions.visible(fn), **options)
        weakref.finalize(owner, backend.abandon).atexit = False

        def in_front(inner: torch_frames.FrameCallback) -> FrameConverter:
            converter = FrameConverter(inner, *shared, self._entry_frames)
            weakref.finalize(owner, converter.abandon).atexit = False
            return converter

        functions.interpose(compiled, in_front)
        return Created(compiled, functions.with_guards(compiled), functions.skips_guards), usual


def _accepts(fn: Callable[..., Any], option: str) -> bool:
    parameters = inspect.signature(fn).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
