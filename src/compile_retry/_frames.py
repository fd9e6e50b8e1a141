"""Between Dynamo's C half and its compiler: may this frame be compiled now, and what if that fails inside Dynamo?

The callback is asked before anything of the frame has run, so to run the frame eagerly instead is always right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import CodeType

from . import _looks
from . import _torch_internals as internals
from ._call import Conversion, Location, Tally
from ._control import Control
from ._failures import is_fatal, release
from ._function import ENTRY_FRAMES
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
    """

    state: FrameState
    compiles: int = 0
    is_over_limit: bool = False


class FrameConverter:
    """Stands in front of the frame callback that ``torch.compile`` made for one decorated function."""

    def __init__(self, inner: FrameCallback, control: Control) -> None:
        self._inner = inner
        self._control = control
        self._known: dict[int, _KnownFrame] = {}

    def __call__(self, frame: Frame, cache_entry: object, frame_state: FrameState) -> ConvertFrameReturn:
        if internals.is_disabled():
            return internals.run_eagerly(inner_frames=False)
        if frame.f_code in ENTRY_FRAMES or not internals.concerns_dynamo(frame):
            return self._pass_over(frame, cache_entry, frame_state)
        if self._control.given_up.get(frame.f_code) is frame_state:
            return _passed_over(internals.skip_for_good())
        tally = self._control.calls.tally
        if self._knows(frame_state).is_over_limit:
            tally.eager += 1
            return internals.run_eagerly(inner_frames=False)
        conversion = self._conversion(frame, tally)
        if (held_off := self._held_off(conversion, tally)) is not None:
            return held_off
        try:
            return self._in_turn(conversion, tally, frame, cache_entry, frame_state)
        finally:
            self._control.journal.tell(tally)

    def _knows(self, frame_state: FrameState) -> _KnownFrame:
        return self._known.setdefault(id(frame_state), _KnownFrame(frame_state))

    def _pass_over(self, frame: Frame, cache_entry: object, frame_state: FrameState) -> ConvertFrameReturn:
        """Let Dynamo say that this frame is none of its business.

        On the way to that it may fail all the same, for one over how DistributedDataParallel divides its buckets. It
        fails over that again in a frame that does concern it, and there it counts.
        """
        if frame.f_code in ENTRY_FRAMES:  # called, not traced, another decorated function compiles for itself
            return internals.leave_to_itself()
        try:
            return _passed_over(self._inner(frame, cache_entry, frame_state))
        except Exception as exc:
            if is_strict() or is_fatal(exc) or internals.is_deliberate_limit(exc):
                raise
            release(exc)
            return internals.run_eagerly(inner_frames=True)

    def _in_turn(
        self, conversion: Conversion, tally: Tally, frame: Frame, cache_entry: object, frame_state: FrameState
    ) -> ConvertFrameReturn:
        with internals.compile_lock():  # while this thread waited for it, another one's attempt may have failed
            internals.drop_abandoned()
            held_off = self._held_off(conversion, tally)
            return held_off or self._convert(conversion, tally, frame, cache_entry, frame_state)

    def _conversion(self, frame: Frame, tally: Tally) -> Conversion:
        code = frame.f_code
        retrying, tally.retrying = tally.retrying, None
        # It may have been asked for another frame, which other code fitted after all.
        retrying = retrying if retrying is not None and retrying.code is code else None
        location = self._control.location if internals.is_inline_wrapper(code) else _location(code)
        exact = _looks.of_frame(code, frame.f_locals)
        coarse = _looks.of_frame(code, frame.f_locals, shapes=False)
        repeated = _looks.of_frame(code, frame.f_locals, gradients=False)
        compiles = self._control.compiles(exact)
        return Conversion(location, exact, coarse, repeated, compiles=compiles, retrying=retrying)

    def _held_off(self, conversion: Conversion, tally: Tally) -> ConvertFrameReturn | None:
        """What to do instead if this frame may not be compiled now."""
        control = self._control
        if not control.fallbacks.is_hopeless(conversion.coarse):
            if control.step.must_stay_eager(conversion.repeated):
                return self._eagerly(conversion, tally)
            if control.may_attempt(tally, conversion.fingerprint):
                return None
            control.turns.ask(conversion.fingerprint, tally.call)
        return self._eagerly(conversion, tally)

    def _eagerly(self, conversion: Conversion, tally: Tally) -> ConvertFrameReturn:
        """Run this frame as it stands, this once."""
        inner_frames = self._control.is_open(tally)
        unseen = () if inner_frames else (UNSEEN,)
        self._control.step.ran_eagerly(conversion.repeated, *unseen, plainly=True)
        tally.eager += 1
        return internals.run_eagerly(inner_frames=inner_frames)

    def _convert(
        self, conversion: Conversion, tally: Tally, frame: Frame, cache_entry: object, frame_state: FrameState
    ) -> ConvertFrameReturn:
        """Let Dynamo compile the frame."""
        control, compiles = self._control, internals.count_compiles(frame_state)
        outer, tally.conversion = tally.conversion, conversion
        conversion.began = control.policy.clock()
        try:
            with internals.settings_for_compile(self._knows(frame_state).compiles):
                result = self._inner(frame, cache_entry, frame_state)
        except Exception as exc:
            internals.uncount_compiles(frame_state, compiles)
            if conversion.raised or is_fatal(exc) or internals.is_deliberate_limit(exc):
                raise
            return self._failed(exc, conversion, tally)
        finally:
            tally.conversion, tally.retrying = outer, None
            if conversion.attempted:
                control.books.add_seconds(control.policy.clock() - conversion.began)
        return self._converted(result, conversion, tally, frame, frame_state)

    def _failed(self, exc: Exception, conversion: Conversion, tally: Tally) -> ConvertFrameReturn:
        control = self._control
        if conversion.gave_way:
            control.turns.ask(conversion.fingerprint, tally.call)
        else:
            control.doubt(exc, conversion, tally)
        if not is_strict():
            release(exc)
        return self._eagerly(conversion, tally)

    def _converted(
        self, result: ConvertFrameReturn, conversion: Conversion, tally: Tally, frame: Frame, frame_state: FrameState
    ) -> ConvertFrameReturn:
        control, code = self._control, frame.f_code
        if result.guarded_code is not None:
            if conversion.retrying is not None:
                control.fallbacks.remove(conversion.retrying)
                conversion.retrying.drop()
            entry = internals.CachedFrame(code, conversion.fingerprint, result.guarded_code)
            if conversion.runner is not None:
                internals.run_directly(conversion.runner, result.guarded_code.code, frame.f_globals)
            if conversion.fallback is not None:
                conversion.fallback.entry = entry
                control.fell_back_to(entry)
            else:
                self._knows(frame_state).compiles += 1
                control.compiled(entry)
            return result
        if internals.hit_recompile_limit(result):
            self._knows(frame_state).is_over_limit = True
            control.journal.over_limit(tally, conversion.location)
            tally.eager += 1
            return internals.run_eagerly(inner_frames=False)
        # Dynamo cannot go on after a graph break in this frame and wants it skipped for good. An exception of the
        # program's looks like that too, so believe it only if the call returns.
        tally.skipped.append((code, frame_state))
        tally.unsettled = True
        return replace(_passed_over(result), apply_to_code=False)


def _passed_over(result: ConvertFrameReturn) -> ConvertFrameReturn:
    # With fullgraph=True, a function whose entry frame is never asked about again would raise after having run.
    return replace(result, apply_to_code=False) if internals.count_for_fullgraph() else result


def _location(code: CodeType) -> Location:
    return getattr(code, "co_qualname", code.co_name), code.co_filename, code.co_firstlineno
