"""Plots of a decorated function's history. They need matplotlib: ``pip install 'compile-retry[plot]'``."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ._decorator import compiled_function
from ._function import CompiledFunction
from ._record.history import CallPath, Sample
from .events import AttemptFailed, Event, GaveUp, Recovered, title

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
# A scale is logarithmic if the slowest call takes at least this many times as long as the fastest, or if half of the
# calls with an attempt would share less than the first of this many parts of the horizontal axis.
_SPAN = 20


def plot_timeline(fn: CompiledFunction[..., Any] | torch.nn.Module, ax: Axes | None = None) -> Axes:
    """Plot the durations of a function's calls, in order, with attempts, failures and recoveries.

    Each point is a call, plotted at its number, which is that in log lines. Its colour and shape show if the call ran
    compiled code, eagerly, or both. A call with an attempt is hollow. Marks on the upper edge are failures, recoveries
    and giving up. The scale of the calls is logarithmic if most attempts came early; ``ax.set_xscale("linear")``
    changes that.

    Of a long run, about 500 calls are shown, spread over all of it. Among them is every call with an attempt, if there
    are at most 256. Functions that share their compiled code are shown together, as in :func:`~compile_retry.report`,
    because they fail and recover together.

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
    records = function._group.journal.records.alive()
    fqns = tuple(dict.fromkeys(record.fqn for record in records if record.fqn))
    name = title(function.name, len(records), fqns)
    samples = sorted((sample for record in records for sample in record.history.samples), key=attrgetter("call"))
    # A set, because each record has the marks of all functions since its own was decorated.
    marks = {mark for record in records for mark in tuple(record.history.marks)}
    if not samples:
        raise ValueError(f"nothing to plot yet: {name} has not been called, or no call has returned")
    if ax is None:
        ax = _new_axes()
    for path in _PATHS:
        _draw_calls(ax, path, [sample for sample in samples if sample.path == path])
    for kind in _MARKS:
        _draw_marks(ax, kind, sorted(mark.call for mark in marks if mark.kind is kind))
    _scale(ax, samples)
    _label(ax, name)
    return ax


def _new_axes() -> Axes:
    try:
        from matplotlib import pyplot as plt
    except ImportError as exc:
        raise ImportError("plot_timeline() needs matplotlib: pip install 'compile-retry[plot]'") from exc
    return plt.subplots(figsize=(8, 4), layout="constrained")[1]


def _draw_calls(ax: Axes, path: CallPath, samples: Sequence[Sample]) -> None:
    marker, colour = _PATHS[path]
    for attempted in (False, True):
        chosen = [sample for sample in samples if sample.attempted == attempted]
        if chosen:
            ax.scatter(
                [sample.call for sample in chosen],
                [sample.seconds for sample in chosen],
                s=30 if attempted else 12,
                marker=marker,
                facecolors="none" if attempted else colour,
                edgecolors=colour,
                linewidths=1.2 if attempted else 0,
                label=f"{path}, with an attempt" if attempted else path,
                zorder=4 if attempted else 3,  # never hidden behind calls without
            )


def _draw_marks(ax: Axes, kind: type[Event], calls: Sequence[int]) -> None:
    """Draw marks at the upper edge, above all calls."""
    if calls:
        marker, colour = _MARKS[kind]
        ax.scatter(
            calls,
            [1.0] * len(calls),
            s=110 if marker == "*" else 45,
            marker=marker,
            color=colour or ax.title.get_color(),
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            label="failure" if kind is AttemptFailed else kind.kind.replace("recovered", "recovery"),
            zorder=5,
        )


def _scale(ax: Axes, samples: Sequence[Sample]) -> None:
    from matplotlib.ticker import MaxNLocator

    seconds, attempted = [sample.seconds for sample in samples], [sample.call for sample in samples if sample.attempted]
    if 0 < min(seconds) * _SPAN <= max(seconds):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    if len(attempted) > 1 and median(attempted) * _SPAN <= samples[-1].call:
        ax.set_xscale("log")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _label(ax: Axes, name: str) -> None:
    ax.set_title(name, loc="left", pad=12)
    ax.set_xlabel("call")
    ax.set_ylabel("seconds per call")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
