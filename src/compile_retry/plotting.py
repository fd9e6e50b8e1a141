"""Plots of a decorated function's history. They need matplotlib: ``pip install 'compile-retry[plot]'``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ._decorator import compiled_function
from ._function import CompiledFunction, title_of
from ._record.history import CallPath, Sample
from .events import AttemptFailed, Compiled, Event, GaveUp, Recovered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_timeline"]


class _Style(NamedTuple):
    marker: str
    colour: str | None  # None: that of the text, dark on a light background and light on a dark one


# Okabe and Ito's colours, which colour-blind people can distinguish, ordered by lightness for printing.
_PATHS: dict[CallPath, _Style] = {
    "compiled": _Style("o", "#0072B2"),
    "mixed": _Style("s", "#E69F00"),
    "eager": _Style("^", "#D55E00"),
}
_MARKS: dict[type[Event], _Style] = {
    AttemptFailed: _Style("x", None),
    Recovered: _Style("*", "#009E73"),
    GaveUp: _Style("X", "#CC79A7"),
}
_ATTEMPT_COLOUR = "#BBBBBB"
# The scale is logarithmic if the slowest call takes at least this many times as long as the fastest.
_SPAN = 20


def plot_timeline(fn: CompiledFunction[..., Any] | torch.nn.Module, ax: Axes | None = None) -> Axes:
    """Plot the durations of a function's calls over time, with attempts, failures and recoveries.

    Each point is a call, plotted at its end, in seconds since the first recorded call, by the policy's clock. Its
    colour and shape show if the call ran compiled code, eagerly, or both. A call with an attempt is hollow. Grey bands
    are attempts. Marks on the upper edge are failures, recoveries and giving up. Of a long run, about 500 calls are
    shown, spread over all of it.

    Args:
        fn: A :class:`~compile_retry.CompiledFunction`, or a module that was compiled in place.
        ax: The axes to draw in; by default those of a new figure.

    Returns:
        The axes; ``ax.figure.savefig("timeline.png")`` saves the figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `fn` was not decorated with :func:`~compile_retry.compile_with_fallback`.
        ValueError: Nothing has been recorded yet.
    """
    function = compiled_function(fn)
    history = function._record.history
    samples, events = history.samples, tuple(history.events)
    if not samples:
        raise ValueError(f"nothing to plot yet: {title_of(function)} has not been called, or no call has returned")
    start = min([sample.time - sample.seconds for sample in samples])
    if ax is None:
        ax = _new_axes()
    _draw_attempts(ax, [(event.time - start, event) for event in events])
    for path in _PATHS:
        _draw_calls(ax, path, [sample for sample in samples if sample.path == path], start)
    for kind in _MARKS:
        _draw_marks(ax, kind, [event.time - start for event in events if isinstance(event, kind)])
    _label(ax, title_of(function), [sample.seconds for sample in samples])
    return ax


def _new_axes() -> Axes:
    try:
        from matplotlib import pyplot as plt
    except ImportError as exc:
        raise ImportError("plot_timeline() needs matplotlib: pip install 'compile-retry[plot]'") from exc
    return plt.subplots(figsize=(8, 4), layout="constrained")[1]


def _draw_calls(ax: Axes, path: CallPath, samples: Sequence[Sample], start: float) -> None:
    marker, colour = _PATHS[path]
    for attempted in (False, True):
        chosen = [sample for sample in samples if sample.attempted == attempted]
        if chosen:
            ax.scatter(
                [sample.time - start for sample in chosen],
                [sample.seconds for sample in chosen],
                s=30 if attempted else 12,
                marker=marker,
                facecolors="none" if attempted else colour,
                edgecolors=colour,
                linewidths=1.2 if attempted else 0,
                label=f"{path}, with an attempt" if attempted else path,
                zorder=3,
            )


def _draw_attempts(ax: Axes, events: Iterable[tuple[float, Event]]) -> None:
    """Draw a grey band from the beginning to the end of each attempt."""
    ended = [(time, event.seconds) for time, event in events if isinstance(event, AttemptFailed | Compiled)]
    if ended:
        ax.broken_barh(
            [(time - seconds, seconds) for time, seconds in ended],
            (0, 1),
            transform=ax.get_xaxis_transform(),
            facecolors=_ATTEMPT_COLOUR,
            edgecolors=_ATTEMPT_COLOUR,  # so that a short attempt is still visible
            linewidth=0.8,
            alpha=0.4,
            label="attempt",
            zorder=1,
        )


def _draw_marks(ax: Axes, kind: type[Event], times: Sequence[float]) -> None:
    """Draw marks at the upper edge, above all calls."""
    if times:
        marker, colour = _MARKS[kind]
        ax.scatter(
            times,
            [1.0] * len(times),
            s=110 if marker == "*" else 45,
            marker=marker,
            color=colour or ax.title.get_color(),
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            label="failure" if kind is AttemptFailed else kind.kind.replace("recovered", "recovery"),
            zorder=4,
        )


def _label(ax: Axes, name: str, seconds: Sequence[float]) -> None:
    if 0 < min(seconds) * _SPAN <= max(seconds):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.set_title(name, loc="left", pad=12)
    ax.set_xlabel("seconds since the first call")
    ax.set_ylabel("seconds per call")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
