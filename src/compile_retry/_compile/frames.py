"""Between Dynamo's C half and its compiler: may this frame be compiled now, and what if that fails?

The callback is asked before anything of the frame has run. So whatever failed, at whatever stage, the answer is the
same: the frame runs as it stands, once, as its own bytecode. There is no other fallback.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType
from typing import NamedTuple

import torch

from compile_retry._failures import Location, is_fatal
from compile_retry._strict import is_strict
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
    """What is known of the frames of one code object.

    Attributes:
        state: Dynamo's own for them, by whose identity they are known: after ``torch._dynamo.reset()`` it is a new one.
        compiles: How often they were compiled.
        is_over_limit: Whether one of torch's recompile limits is reached.
        is_skipped: Whether Dynamo wants them skipped for good.
        is_ours: Whether their file is one that Dynamo compiles; None while that has to be asked.
    """

    state: FrameState
    compiles: int = 0
    is_over_limit: bool = False
    is_skipped: bool = False
    is_ours: bool | None = None


class _Asked(NamedTuple):
    """A frame that Dynamo asks about."""

    frame: Frame
    cache_entry: object
    known: _Known
    key: FrameKey
    tally: Tally

    def would_be_passed_over(self) -> bool:
        """True if Dynamo finds nothing in it to compile."""
        return not (may_hold_tensors(self.frame.f_locals) or torch_frames.mentions_torch(self.frame))

    def named(self, location: Location) -> Location:
        """Add to a method's name which part of a model it belongs to, where frames above this one know the model."""
        path = path_of_part(self.frame.f_locals.get("self"), self.tally.models)
        function, file, line = location
        return (f"{function} of {path}", file, line) if path else location


class FrameConverter:
    """Stands in front of the frame callback that ``torch.compile`` made for one decorated function."""

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
        self._entry_frames = entry_frames  # of a decorated function: called within another one it is on its own
        self._known: dict[int, _Known] = {}
        self._entries: list[cache_entries.CachedFrame] = []  # all that Dynamo has cached for this function
        self._codes_compiled = 0  # of how many code objects there is compiled code

    def __call__(self, frame: Frame, cache_entry: object, frame_state: FrameState) -> ConvertFrameReturn:
        if torch_frames.is_disabled():
            return torch_frames.run_eagerly(inner_frames=False)
        code = frame.f_code
        if code in self._entry_frames:
            return torch_frames.run_eagerly(inner_frames=None)  # until that sets a callback of its own
        known = self._known.get(id(frame_state)) or self._known.setdefault(id(frame_state), _Known(frame_state))
        if not (known.is_ours or self._is_ours(known, frame)):
            return _passed_over(self._inner(frame, cache_entry, frame_state))
        if known.is_skipped:
            return _passed_over(torch_frames.skip_for_good())
        asked = _Asked(frame, cache_entry, known, key_of(code, frame.f_locals), self._calls.tally)
        if (held_off := self._held_off(asked)) is not None:
            return held_off
        try:
            return self._in_turn(asked, known.compiles)
        finally:
            self._outcomes.tell()

    def _is_ours(self, known: _Known, frame: Frame) -> bool:
        is_ours = not torch_frames.is_skipped_file(frame)
        if is_ours or torch_frames.is_skipped_whatever_frame(frame.f_code):
            known.is_ours = is_ours
        return is_ours

    def _held_off(self, asked: _Asked) -> ConvertFrameReturn | None:
        """Run the frame as it stands if it may not be compiled now."""
        if asked.known.is_over_limit:
            return self._stay_over_limit(asked)
        if self._admission.admits(asked.tally, asked.key):
            return None
        if asked.would_be_passed_over():
            return torch_frames.run_eagerly(inner_frames=True)
        self._admission.refused(asked.tally, asked.key)
        return self._eagerly(asked)

    def _eagerly(self, asked: _Asked) -> ConvertFrameReturn:
        """Run this frame as it stands, this once."""
        inner_frames = self._admission.is_open(asked.tally)
        self._admission.ran_eagerly(asked.key.code, *(() if inner_frames else (UNSEEN,)))
        asked.tally.eager += 1
        if inner_frames:
            variables = asked.frame.f_locals.values()
            asked.tally.models += [weakref.ref(v) for v in variables if issubclass(type(v), torch.nn.Module)]
        if not inner_frames and self._codes_compiled == bool(asked.known.compiles):
            return torch_frames.run_eagerly(inner_frames=None)  # there is no code that frames below could use
        return torch_frames.run_eagerly(inner_frames=inner_frames)

    def _in_turn(self, asked: _Asked, compiles: int) -> ConvertFrameReturn:
        """Compile the frame when no other thread compiles one; its attempt may have failed in the meantime."""
        with torch_frames.compile_lock():
            cache_entries.drop_abandoned()
            if (held_off := self._held_off(asked)) is not None:
                return held_off
            return self._convert(asked, self._begin(asked, is_covered=asked.known.compiles > compiles))

    def _begin(self, asked: _Asked, *, is_covered: bool = False) -> Conversion:
        code = asked.frame.f_code
        location = None if functions.is_inline_wrapper(code) else _location(code)
        return self._outcomes.begin(asked.key, location, is_covered=is_covered)

    def _convert(self, asked: _Asked, conversion: Conversion) -> ConvertFrameReturn:
        """Let Dynamo compile the frame, and answer what it raises."""
        outcomes, tally = self._outcomes, asked.tally
        try:
            return self._attempt(asked, conversion)
        except Exception as exc:
            # In strict mode the end of the call is soon enough, unless the frame would hang where it runs alone.
            if is_fatal(exc) or torch_frames.is_deliberate_limit(exc) or (outcomes.collectives and is_strict()):
                raise
            if torch_frames.is_recompile_limit(exc) and not is_strict():
                return self._over_limit(asked, conversion)
            if conversion.gave_way:
                self._admission.refused(tally, asked.key)
                return self._eagerly(asked)
            conversion.location = asked.named(conversion.location)
            if not outcomes.collectives:
                outcomes.doubt(exc, conversion, tally)
                return self._eagerly(asked)
            outcomes.failed_in_place(exc, conversion, tally)
        return self._settle_together(asked, conversion)

    def _attempt(self, asked: _Asked, conversion: Conversion) -> ConvertFrameReturn:
        known, tally = asked.known, asked.tally
        compiles = torch_frames.count_compiles(known.state)
        outer, tally.conversion = tally.conversion, conversion
        try:
            with torch_frames.settings_for_compile(known.compiles):
                result = self._inner(asked.frame, asked.cache_entry, known.state)
        except Exception:
            torch_frames.uncount_compiles(known.state, compiles)
            raise
        finally:
            tally.conversion = outer
        return self._converted(result, asked, conversion)

    def _converted(self, result: ConvertFrameReturn, asked: _Asked, conversion: Conversion) -> ConvertFrameReturn:
        if result.guarded_code is not None:
            if conversion.runner is not None:
                torch_frames.run_directly(conversion.runner, result.guarded_code.code, asked.frame.f_globals)
            self._codes_compiled += not asked.known.compiles
            asked.known.compiles += 1
            self._outcomes.compiled(conversion)
            self._entries = [
                *(entry for entry in self._entries if entry.alive),
                cache_entries.CachedFrame(result.guarded_code),
            ]
            return result
        if torch_frames.hit_recompile_limit(result):
            return self._over_limit(asked, conversion)
        if asked.would_be_passed_over():
            return _passed_over(result)
        # Dynamo cannot go on after a graph break in this frame and wants it skipped for good. An exception of the
        # program's looks like that too, so believe it only if the call returns.
        asked.tally.at_end.append(partial(self._skip_for_good, asked.frame.f_code, asked.known))
        return replace(_passed_over(result), apply_to_code=False)

    def _skip_for_good(self, code: CodeType, known: _Known) -> None:
        known.is_skipped = True
        self._admission.strike_out(code)  # Dynamo will not be asked again

    def _over_limit(self, asked: _Asked, conversion: Conversion) -> ConvertFrameReturn:
        asked.known.is_over_limit = True
        self._outcomes.over_limit(conversion, asked.tally)
        return self._stay_over_limit(asked)

    def _stay_over_limit(self, asked: _Asked) -> ConvertFrameReturn:
        asked.tally.eager += 1
        return torch_frames.run_eagerly(inner_frames=False)

    def _settle_together(self, asked: _Asked, failed: Conversion) -> ConvertFrameReturn:
        """Run a frame that moves data between ranks eagerly on all of them or on none: see `ranks`."""
        outcomes, tally = self._outcomes, asked.tally

        def try_again() -> ConvertFrameReturn:
            conversion = self._begin(asked)
            try:
                return self._attempt(asked, conversion)
            except Exception as exc:
                outcomes.failed_in_place(exc, conversion, tally)
                raise

        spent = outcomes.seconds_since(failed)
        together = settle_together(failed.location, tally.call, outcomes.collectives, try_again, heal=heal, spent=spent)
        if together is not None:
            return together
        outcomes.give_up_together(failed)
        tally.eager += 1
        return torch_frames.run_eagerly(inner_frames=None)

    def abandon(self) -> None:
        """Have Dynamo forget its entries: the function is gone."""
        cache_entries.abandon(self._entries)


def _passed_over(result: ConvertFrameReturn) -> ConvertFrameReturn:
    # With fullgraph=True, a function whose entry frame is never asked about again would raise after having run.
    return replace(result, apply_to_code=False) if torch_frames.count_for_fullgraph() else result


def _location(code: CodeType) -> Location:
    return getattr(code, "co_qualname", code.co_name), code.co_filename, code.co_firstlineno
