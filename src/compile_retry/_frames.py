"""Between Dynamo's C half and its compiler: may this frame be compiled now, and what if that fails?

The callback is asked before anything of the frame has run. So whatever failed, at whatever stage, the answer is the
same: the frame runs as it stands, once, as its own bytecode. There is no other fallback.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from types import CodeType

from . import _torch_internals as internals
from ._call import Conversion, Location, Tally
from ._control import Control
from ._failures import is_fatal, release
from ._frame_key import FrameKey, key_of, may_hold_tensors
from ._steps import UNSEEN
from ._strict import is_strict
from ._torch_internals import ConvertFrameReturn, Frame, FrameCallback, FrameState


@dataclass
class _KnownFrame:
    """What is known of the frames of one code object.

    Attributes:
        state: Dynamo's own for them, by whose identity they are known: after ``torch._dynamo.reset()`` it is a new one.
        compiles: How often they were compiled.
        is_over_limit: Whether one of torch's recompile limits is reached.
        is_ours: Whether their file is one that Dynamo compiles; None while that has to be asked.
    """

    state: FrameState
    compiles: int = 0
    is_over_limit: bool = False
    is_ours: bool | None = None


class FrameConverter:
    """Stands in front of the frame callback that ``torch.compile`` made for one decorated function."""

    def __init__(self, inner: FrameCallback, control: Control, entry_frames: Collection[CodeType]) -> None:
        self._inner = inner
        self._entry_frames = entry_frames  # of a decorated function: called within another one it is on its own
        self._control = control
        self._known: dict[int, _KnownFrame] = {}

    def __call__(self, frame: Frame, cache_entry: object, frame_state: FrameState) -> ConvertFrameReturn:
        if internals.is_disabled():
            return internals.run_eagerly(inner_frames=False)
        control, code = self._control, frame.f_code
        known = self._known.get(id(frame_state)) or self._known.setdefault(id(frame_state), _KnownFrame(frame_state))
        if code in self._entry_frames or not (known.is_ours or self._is_ours(known, frame)):
            return self._pass_over(frame, cache_entry, frame_state)
        if control.skipped and control.skipped.get(code) is frame_state:
            return _passed_over(internals.skip_for_good())
        tally = control.calls.tally
        if known.is_over_limit:
            tally.eager += 1
            return internals.run_eagerly(inner_frames=False)
        key = key_of(code, frame.f_locals)
        if (held_off := self._held_off(key, tally, frame)) is not None:
            return held_off
        try:
            return self._in_turn(key, known, known.compiles, tally, frame, cache_entry)
        finally:
            control.journal.tell(tally)

    def _in_turn(
        self, key: FrameKey, known: _KnownFrame, compiles: int, tally: Tally, frame: Frame, cache_entry: object
    ) -> ConvertFrameReturn:
        with internals.compile_lock():  # while this thread waited for it, another one's attempt may have failed
            internals.drop_abandoned()
            control = self._control
            held_off = self._held_off(key, tally, frame)
            if held_off is not None:
                return held_off
            location = control.location if internals.is_inline_wrapper(frame.f_code) else _location(frame.f_code)
            conversion = Conversion(location, key, control.policy.clock(), is_covered=known.compiles > compiles)
            return self._convert(conversion, known, tally, frame, cache_entry)

    def _is_ours(self, known: _KnownFrame, frame: Frame) -> bool:
        is_ours = not internals.is_skipped_file(frame)
        if is_ours or internals.is_skipped_whatever_frame(frame.f_code):
            known.is_ours = is_ours
        return is_ours

    def _pass_over(self, frame: Frame, cache_entry: object, frame_state: FrameState) -> ConvertFrameReturn:
        """Let Dynamo say that this frame is none of its business.

        On the way to that it may fail all the same, for one over how DistributedDataParallel divides its buckets. It
        fails over that again in a frame that does concern it, and there it counts.
        """
        if frame.f_code in self._entry_frames:  # called, not traced, another decorated function compiles for itself
            return internals.leave_to_itself()
        try:
            return _passed_over(self._inner(frame, cache_entry, frame_state))
        except Exception as exc:
            if is_strict() or is_fatal(exc) or internals.is_deliberate_limit(exc):
                raise
            release(exc)
            return internals.run_eagerly(inner_frames=True)

    def _held_off(self, key: FrameKey, tally: Tally, frame: Frame) -> ConvertFrameReturn | None:
        """Run the frame as it stands if it may not be compiled now."""
        control = self._control
        if control.may_attempt(tally, key) and not control.step.must_stay_eager(key.code):
            return None
        if not may_hold_tensors(frame.f_locals) and not internals.mentions_torch(frame):
            return internals.run_eagerly(inner_frames=True)  # Dynamo would pass it over
        if control.ledger.is_given_up(key):
            tally.given_up += 1
        else:
            control.turns.ask(key.steady, tally.call)
        return self._eagerly(key, tally)

    def _eagerly(self, key: FrameKey, tally: Tally) -> ConvertFrameReturn:
        """Run this frame as it stands, this once."""
        inner_frames = self._control.is_open(tally)
        self._control.step.ran_eagerly(key.code, *(() if inner_frames else (UNSEEN,)))
        tally.eager += 1
        return internals.run_eagerly(inner_frames=inner_frames)

    def _convert(
        self, conversion: Conversion, known: _KnownFrame, tally: Tally, frame: Frame, cache_entry: object
    ) -> ConvertFrameReturn:
        """Let Dynamo compile the frame."""
        compiles = internals.count_compiles(known.state)
        outer, tally.conversion = tally.conversion, conversion
        try:
            with internals.settings_for_compile(known.compiles):
                result = self._inner(frame, cache_entry, known.state)
        except Exception as exc:
            internals.uncount_compiles(known.state, compiles)
            return self._failed(exc, conversion, known, tally)
        finally:
            tally.conversion = outer
        return self._converted(result, conversion, known, tally, frame)

    def _failed(self, exc: Exception, conversion: Conversion, known: _KnownFrame, tally: Tally) -> ConvertFrameReturn:
        control, key = self._control, conversion.key
        if is_fatal(exc) or internals.is_deliberate_limit(exc):
            raise exc
        if internals.is_recompile_limit(exc) and not is_strict():
            return self._over_limit(conversion, known, tally)
        if conversion.gave_way:
            control.turns.ask(key.steady, tally.call)
        else:
            control.doubt(exc, conversion, tally)
        return self._eagerly(key, tally)

    def _over_limit(self, conversion: Conversion, known: _KnownFrame, tally: Tally) -> ConvertFrameReturn:
        known.is_over_limit = True
        self._control.journal.over_limit(tally, conversion.location)
        tally.eager += 1
        return internals.run_eagerly(inner_frames=False)

    def _converted(
        self, result: ConvertFrameReturn, conversion: Conversion, known: _KnownFrame, tally: Tally, frame: Frame
    ) -> ConvertFrameReturn:
        control, code = self._control, frame.f_code
        if result.guarded_code is not None:
            if conversion.runner is not None:
                internals.run_directly(conversion.runner, result.guarded_code.code, frame.f_globals)
            known.compiles += 1
            control.compiled(conversion, internals.CachedFrame(result.guarded_code))
            return result
        if internals.hit_recompile_limit(result):
            return self._over_limit(conversion, known, tally)
        if not may_hold_tensors(frame.f_locals) and not internals.mentions_torch(frame):
            return _passed_over(result)
        # Dynamo cannot go on after a graph break in this frame and wants it skipped for good. An exception of the
        # program's looks like that too, so believe it only if the call returns.
        tally.skipped.append((code, known.state))
        tally.unsettled = True
        return replace(_passed_over(result), apply_to_code=False)


def _passed_over(result: ConvertFrameReturn) -> ConvertFrameReturn:
    # With fullgraph=True, a function whose entry frame is never asked about again would raise after having run.
    return replace(result, apply_to_code=False) if internals.count_for_fullgraph() else result


def _location(code: CodeType) -> Location:
    return getattr(code, "co_qualname", code.co_name), code.co_filename, code.co_firstlineno
