"""The frame callback: decide if a frame may be compiled now, and run it eagerly if that fails.

Dynamo calls the callback before any of the frame has run. So whatever fails, at any stage, the frame runs once, as its
own bytecode. There is no other fallback.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType
from typing import NamedTuple

import torch

from compile_retry._failures import Location, device_error, is_fatal
from compile_retry._ranks.agreement import Agreement
from compile_retry._record.record import Record
from compile_retry._switches import is_strict
from compile_retry._torch import cache_entries, functions
from compile_retry._torch import frames as torch_frames
from compile_retry._torch.eager import path_of_part
from compile_retry._torch.frames import ConvertFrameReturn, Frame, FrameCallback, FrameState

from .admission import Admission
from .call import Calls, Conversion, Tally
from .checkpointing import UNSEEN
from .frame_key import FrameKey, key_of, may_hold_tensors
from .healing import heal
from .outcomes import Outcomes
from .ranks import settle_together


@dataclass
class _Known:
    """Facts about the frames of one code object.

    Attributes:
        state: Dynamo's frame state. It identifies them; after ``torch._dynamo.reset()`` it is a new object.
        compiles: The number of compiles so far.
        over_limit_of: The number of functions when one of torch's recompile limits was reached; 0 if none was.
        is_skipped: Whether Dynamo skips them for good.
        is_compilable: Whether Dynamo compiles frames from their file; None if that must be checked for each frame.
    """

    state: FrameState
    compiles: int = 0
    over_limit_of: int = 0
    is_skipped: bool = False
    is_compilable: bool | None = None


class _Request(NamedTuple):
    """A frame that Dynamo passed to the callback."""

    frame: Frame
    cache_entry: object
    known: _Known
    key: FrameKey
    tally: Tally

    def would_be_passed_over(self) -> bool:
        """Return True if Dynamo would find nothing in the frame to compile."""
        return not (may_hold_tensors(self.frame.f_locals) or torch_frames.mentions_torch(self.frame))

    def named(self, location: Location) -> Location:
        """Add the submodule's path to a method's name, if a frame above this one has the model as a variable."""
        path = path_of_part(self.frame.f_locals.get("self"), self.tally.models)
        function, file, line = location
        return (f"{function} of {path}", file, line) if path else location


class FrameConverter:
    """Wraps the frame callback that ``torch.compile`` made for one decorated function."""

    def __init__(
        self,
        inner: FrameCallback,
        calls: Calls,
        admission: Admission,
        outcomes: Outcomes,
        entry_frames: Collection[CodeType],
    ) -> None:
        self._inner = inner
        self._calls, self._admission, self._outcomes = calls, admission, outcomes
        self._entry_frames = entry_frames  # of other decorated functions, which compile on their own
        self._known: dict[int, _Known] = {}
        # The entries in Dynamo's cache, each with the record of the function in whose call it was compiled.
        self._entries: list[tuple[cache_entries.CachedFrame, weakref.ref[Record]]] = []
        self._codes_compiled = 0  # the number of code objects with compiled code

    def __call__(self, frame: Frame, cache_entry: object, frame_state: FrameState) -> ConvertFrameReturn:
        if torch_frames.is_disabled():
            return torch_frames.run_eagerly(inner_frames=False)
        code = frame.f_code
        if code in self._entry_frames:
            return torch_frames.run_eagerly(inner_frames=None)  # until it sets its own callback
        known = self._known.get(id(frame_state)) or self._known.setdefault(id(frame_state), _Known(frame_state))
        if not (known.is_compilable or self._is_compilable(known, frame)):
            return _passed_over(self._inner(frame, cache_entry, frame_state))
        if known.is_skipped:
            return _passed_over(torch_frames.skip_for_good())
        request = _Request(frame, cache_entry, known, key_of(code, frame.f_locals), self._calls.tally)
        if (held_off := self._held_off(request)) is not None:
            return held_off
        try:
            return self._in_turn(request, known.compiles)
        except Exception as exc:
            if (error := device_error(exc)) is None:
                raise
            self._outcomes.lost_device(error, request.tally)
            raise error from None  # as eager raises it, without the wrappers of Dynamo
        finally:
            self._outcomes.tell()

    def _is_compilable(self, known: _Known, frame: Frame) -> bool:
        is_compilable = not torch_frames.is_skipped_file(frame)
        if is_compilable or torch_frames.skips_all_frames_alike(frame.f_code):
            known.is_compilable = is_compilable
        return is_compilable

    def _held_off(self, request: _Request) -> ConvertFrameReturn | None:
        """Run the frame eagerly if it may not be compiled now. Otherwise return None."""
        if request.known.over_limit_of and self._outcomes.functions <= request.known.over_limit_of:
            return self._stay_over_limit(request)
        if self._admission.admits(request.tally, request.key):
            return None
        if request.would_be_passed_over():
            return torch_frames.run_eagerly(inner_frames=True)
        self._admission.refused(request.tally, request.key)
        self._outcomes.postponed(request.tally)
        return self._eagerly(request)

    def _eagerly(self, request: _Request) -> ConvertFrameReturn:
        """Run this frame eagerly, this once."""
        inner_frames = self._admission.is_open(request.tally)
        self._admission.ran_eagerly(request.key.code, *(() if inner_frames else (UNSEEN,)))
        request.tally.eager += 1
        if inner_frames:
            variables = request.frame.f_locals.values()
            request.tally.models += [weakref.ref(v) for v in variables if issubclass(type(v), torch.nn.Module)]
        if not inner_frames and self._codes_compiled == bool(request.known.compiles):
            return torch_frames.run_eagerly(inner_frames=None)  # frames below have no code to use
        return torch_frames.run_eagerly(inner_frames=inner_frames)

    def _in_turn(self, request: _Request, compiles: int) -> ConvertFrameReturn:
        """Compile the frame under Dynamo's lock, unless another thread's attempt has failed in the meantime."""
        with torch_frames.compile_lock():
            cache_entries.drop_abandoned()
            if self._outcomes.agreement is None:
                if (held_off := self._held_off(request)) is not None:
                    return held_off
                return self._convert(request, self._begin(request, is_covered=request.known.compiles > compiles))
        # Without the lock: other ranks may wait for another function of this process, which needs it.
        return self._convert(request, self._begin(request))

    def _begin(self, request: _Request, *, is_covered: bool = False) -> Conversion:
        code = request.frame.f_code
        location = None if functions.is_inline_wrapper(code) else _location(code)
        conversion = self._outcomes.begin(request.key, location, is_covered=is_covered)
        turn = request.tally.turn
        conversion.is_retuning = turn is not None and turn.comes_to(code)
        return conversion

    def _convert(self, request: _Request, conversion: Conversion) -> ConvertFrameReturn:
        agreement = self._outcomes.agreement
        if agreement is not None:
            return self._convert_together(request, conversion, agreement)
        return self._convert_alone(request, conversion)

    def _convert_alone(self, request: _Request, conversion: Conversion) -> ConvertFrameReturn:
        """Let Dynamo compile the frame, and handle exceptions."""
        outcomes, tally = self._outcomes, request.tally
        try:
            return self._attempt(request, conversion)
        except Exception as exc:
            # Strict mode raises at the end of the call, unless the frame could hang because it runs eagerly alone.
            if is_fatal(exc) or torch_frames.is_deliberate_limit(exc) or (outcomes.collectives and is_strict()):
                raise
            if conversion.gave_way:
                self._admission.refused(tally, request.key)
                return self._eagerly(request)
            if conversion.is_retuning and not is_strict():
                outcomes.doubt_retuning(exc, conversion, tally)
                return self._eagerly(request)
            if torch_frames.is_recompile_limit(exc) and not is_strict():
                return self._over_limit(request, conversion)
            conversion.location = request.named(conversion.location)
            if not outcomes.collectives:
                outcomes.doubt(exc, conversion, tally)
                return self._eagerly(request)
            outcomes.failed_in_place(exc, conversion, tally)
        return self._settle_together(request, conversion)

    def _convert_together(self, request: _Request, conversion: Conversion, agreement: Agreement) -> ConvertFrameReturn:
        """Let Dynamo compile the frame, and use the code if it is compiled on all ranks of the function's group."""
        known, tally = request.known, request.tally
        compiles = torch_frames.count_compiles(known.state)
        try:
            result = self._outcomes.attempt_together(
                agreement,
                partial(self._compile, request, conversion),
                conversion,
                tally,
                raises=lambda exc: conversion.gave_way or is_fatal(exc) or torch_frames.is_recompile_limit(exc),
                counts=lambda result: conversion.runner is not None,  # otherwise there is no graph in the frame
            )
        except Exception as exc:
            if conversion.gave_way:  # pragma: no cover  # needs a second thread
                self._admission.refused(tally, request.key)
                return self._eagerly(request)
            if torch_frames.is_recompile_limit(exc) and not (torch_frames.is_deliberate_limit(exc) or is_strict()):
                return self._over_limit(request, conversion)
            raise
        if result is None:
            torch_frames.uncount_compiles(known.state, compiles)
            return self._eagerly(request)
        return self._converted(result, request, conversion)

    def _attempt(self, request: _Request, conversion: Conversion) -> ConvertFrameReturn:
        return self._converted(self._compile(request, conversion), request, conversion)

    def _compile(self, request: _Request, conversion: Conversion) -> ConvertFrameReturn:
        """Let Dynamo compile the frame."""
        known, tally = request.known, request.tally
        compiles = torch_frames.count_compiles(known.state)
        outer, tally.conversion = tally.conversion, conversion
        try:
            # The code that is tuned again has an entry of its own until the call is over.
            entries = self._outcomes.functions + conversion.is_retuning
            with torch_frames.settings_for_compile(known.compiles, entries):
                result = self._inner(request.frame, request.cache_entry, known.state)
        except Exception:
            torch_frames.uncount_compiles(known.state, compiles)
            raise
        finally:
            tally.conversion = outer
        if conversion.is_retuning:
            torch_frames.uncount_compiles(known.state, compiles)
        return result

    def _converted(self, result: ConvertFrameReturn, request: _Request, conversion: Conversion) -> ConvertFrameReturn:
        if result.guarded_code is not None:
            if conversion.runner is not None:
                torch_frames.run_directly(conversion.runner, result.guarded_code.code, request.frame.f_globals)
            self._codes_compiled += not request.known.compiles
            request.known.compiles += not conversion.is_retuning
            outcomes, seconds = self._outcomes, self._outcomes.seconds_since(conversion)
            outcomes.compiled(conversion, request.tally)
            entry = cache_entries.CachedFrame(result.guarded_code), weakref.ref(request.tally.record)
            self._entries = [*(entry for entry in self._entries if entry[0].alive), entry]
            to_retune = None if outcomes.collectives or outcomes.agreement else entry[0]
            outcomes.retuning.compiled(conversion, request.tally, to_retune, seconds)
            return result
        if torch_frames.hit_recompile_limit(result):
            return self._over_limit(request, conversion)
        if request.would_be_passed_over():
            return _passed_over(result)
        # Dynamo cannot resume after a graph break in this frame and skips it for good. An exception raised by the
        # program looks the same, so skip the frame only once the call has returned.
        request.tally.at_end.append(partial(self._skip_for_good, request.frame.f_code, request.known))
        return replace(_passed_over(result), apply_to_code=False)

    def _skip_for_good(self, code: CodeType, known: _Known) -> None:
        known.is_skipped = True
        self._admission.forget_code(code)

    def _over_limit(self, request: _Request, conversion: Conversion) -> ConvertFrameReturn:
        """Repeat the attempt without the code of functions that are gone. If there is none, run the frame eagerly."""
        if self._drop_orphans():
            return self._convert(request, conversion)
        request.known.over_limit_of = max(1, self._outcomes.functions)
        self._outcomes.over_limit(conversion, request.tally)
        return self._stay_over_limit(request)

    def _drop_orphans(self) -> bool:
        orphans = [entry for entry, record in self._entries if record() is None and entry.alive]
        self._entries = [(entry, record) for entry, record in self._entries if record() is not None]
        cache_entries.abandon(orphans)
        cache_entries.drop_abandoned()
        return bool(orphans)

    def _stay_over_limit(self, request: _Request) -> ConvertFrameReturn:
        request.tally.eager += 1
        return torch_frames.run_eagerly(inner_frames=False)

    def _settle_together(self, request: _Request, failed: Conversion) -> ConvertFrameReturn:
        """Make a frame with collectives run eagerly on all ranks or on none: see `ranks`."""
        outcomes, tally = self._outcomes, request.tally

        def attempt() -> ConvertFrameReturn:
            conversion = self._begin(request)
            try:
                return self._attempt(request, conversion)
            except Exception as exc:
                outcomes.failed_in_place(exc, conversion, tally)
                raise

        spent = outcomes.seconds_since(failed)
        together = settle_together(failed.location, tally.call, outcomes.collectives, attempt, heal=heal, spent=spent)
        if together is not None:
            return together
        outcomes.give_up_together(failed)
        tally.eager += 1
        return torch_frames.run_eagerly(inner_frames=None)

    def abandon(self) -> None:
        """Drop the function's entries from Dynamo's cache: the function is gone."""
        cache_entries.abandon(entry for entry, _ in self._entries)


def _passed_over(result: ConvertFrameReturn) -> ConvertFrameReturn:
    # With fullgraph=True, a function would raise after it has run if Dynamo skipped its entry frame for good.
    return replace(result, apply_to_code=False) if torch_frames.count_for_fullgraph() else result


def _location(code: CodeType) -> Location:
    return getattr(code, "co_qualname", code.co_name), code.co_filename, code.co_firstlineno
