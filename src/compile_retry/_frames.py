"""Between Dynamo's C half and its compiler: may this frame be compiled now, and what if that fails inside Dynamo?

The callback is asked before anything of the frame has run, so to run the frame eagerly instead is always right.
"""

from __future__ import annotations

from dataclasses import replace
from types import CodeType

import torch

from . import _looks
from . import _torch_internals as internals
from ._control import Control, Conversion, Fallback, Fingerprint, Location, Tally
from ._failures import is_fatal


class FrameConverter:
    """Stands in front of the frame callback that ``torch.compile`` made for one decorated function."""

    def __init__(self, inner: internals.FrameCallback, control: Control) -> None:
        self._inner = inner
        self._control = control
        # Frames over torch's recompile limit. A code object's frame state is a new one after torch._dynamo.reset().
        self._over_limit: dict[CodeType, internals.FrameState] = {}

    def __call__(
        self, frame: internals.Frame, cache_entry: object, frame_state: internals.FrameState
    ) -> internals.ConvertFrameReturn:
        if internals.is_disabled():
            return internals.run_eagerly(inner_frames=False)
        if not internals.concerns_dynamo(frame):
            return _passed_over(self._inner(frame, cache_entry, frame_state))
        control, code = self._control, frame.f_code
        tally, fallbacks = control.per_thread.tally, control.fallbacks
        if control.given_up.get(code) is frame_state:
            return _passed_over(internals.skip_for_good())
        if self._over_limit.get(code) is frame_state:
            return _eagerly(tally, inner_frames=False)
        retrying, tally.retrying = tally.retrying, None
        exact, coarse = _fingerprint(frame, shapes=True), _fingerprint(frame, shapes=False)
        may_attempt = control.may_attempt(tally)
        if fallbacks.is_hopeless(coarse) or (tally.reserved and fallbacks.waits_without_entry(exact)):
            return _eagerly(tally, inner_frames=may_attempt)
        if not may_attempt:
            return self._turn_away(exact, tally)
        location = control.location if internals.is_inline_wrapper(code) else _location(code)
        conversion = Conversion(location, retrying if retrying is not None and retrying.code is code else None)
        return self._convert(conversion, frame, cache_entry, frame_state, (exact, coarse), tally)

    def _convert(
        self,
        conversion: Conversion,
        frame: internals.Frame,
        cache_entry: object,
        frame_state: internals.FrameState,
        fingerprints: tuple[Fingerprint, Fingerprint],
        tally: Tally,
    ) -> internals.ConvertFrameReturn:
        control, compiles = self._control, internals.count_compiles(frame_state)
        outer, tally.conversion = tally.conversion, conversion
        started = control.policy.clock()
        try:
            result = self._inner(frame, cache_entry, frame_state)
        except Exception as exc:
            internals.uncount_compiles(frame_state, compiles)
            if conversion.gave_way:
                return self._turn_away(fingerprints[0], tally)
            if conversion.raised or is_fatal(exc) or internals.is_deliberate_limit(exc):
                raise
            failure = control.doubt(exc, conversion.location, fingerprints, tally)
            return _eagerly(tally, inner_frames=failure.kind == "permanent")
        finally:
            tally.conversion = outer
            if conversion.attempted:
                control.books.add_seconds(control.policy.clock() - started)

        if result.guarded_code is not None:
            control.fallbacks.remove(None, fingerprints[0])
            if conversion.retrying is not None:
                control.fallbacks.remove(conversion.retrying)
                conversion.retrying.drop()
            if conversion.fallback is not None:
                entry = internals.CachedFrame(frame.f_code, result.guarded_code, control.is_wanted)
                control.fell_back(Fallback(fingerprints[0], entry), conversion.fallback, tally)
            return result
        if internals.hit_recompile_limit(result):
            self._over_limit[frame.f_code] = frame_state
            control.recompile_limit(conversion.location, tally)
            return _eagerly(tally, inner_frames=False)
        # Dynamo cannot go on after a graph break in this frame and wants it skipped for good. An exception of the
        # program's looks like that too, so believe it only if the call returns.
        tally.skipped.append((frame.f_code, frame_state))
        tally.unsettled = True
        return replace(_passed_over(result), apply_to_code=False)

    def _turn_away(self, fingerprint: Fingerprint, tally: Tally) -> internals.ConvertFrameReturn:
        """Run the frame eagerly because no attempt may be made now."""
        if not self._control.fallbacks.waits(fingerprint):
            self._control.breaker.turn_away()
        return _eagerly(tally, inner_frames=False)


def _eagerly(tally: Tally, *, inner_frames: bool) -> internals.ConvertFrameReturn:
    tally.eager += 1
    return internals.run_eagerly(inner_frames=inner_frames)


def _passed_over(result: internals.ConvertFrameReturn) -> internals.ConvertFrameReturn:
    # With fullgraph=True, a function whose entry frame is never asked about again would raise after having run.
    return replace(result, apply_to_code=False) if internals.count_for_fullgraph() else result


def _location(code: CodeType) -> Location:
    return getattr(code, "co_qualname", code.co_name), code.co_filename, code.co_firstlineno


def _fingerprint(frame: internals.Frame, *, shapes: bool) -> Fingerprint:
    return frame.f_code, torch.is_grad_enabled(), *_looks.of_values(frame.f_locals, shapes=shapes)
