"""The bounded history of short and long runs."""

from __future__ import annotations

import bisect
from typing import Any

import torch
from matplotlib.figure import Figure

from compile_retry import RetryPolicy, compile_with_fallback
from compile_retry._record.history import CallPath, History, Sample
from compile_retry.plotting import plot_timeline
from compile_retry.testing import FakeClock, fail_compiles
from support import full_disk

X = torch.ones(3)


def run(clock: FakeClock, history: History, hours: float, seconds: float, path: CallPath = "compiled") -> None:
    """Make calls of this duration for so many hours, and add those that the history asks for."""
    call, end = history.samples[-1].call if history.samples else 0, clock() + 3600 * hours
    while clock() < end:
        chosen = max(history.next_call, call + 1)
        clock.advance((chosen - call) * seconds)
        call = chosen
        history.add(Sample(clock(), call, path, seconds, attempted=False))


def test_a_short_run_is_kept_whole() -> None:
    """In a short run of slow calls, every call is kept."""
    clock = FakeClock()
    fn = compile_with_fallback(lambda x: x.sin(), backend="eager", policy=RetryPolicy(wait=1, clock=clock))
    for _ in range(100):
        fn(X)
        clock.advance(1)
    drawn: Any = plot_timeline(fn, Figure().subplots()).collections
    assert sum(len(points.get_offsets()) for points in drawn) == 100


def test_a_long_run_is_kept_from_end_to_end() -> None:
    """In a long run, of fast or slow calls, the samples are bounded and spread over all of it."""
    for seconds in (1e-5, 0.005, 1.0):
        clock = FakeClock()
        history = History(clock)
        run(clock, history, hours=1 if seconds < 1e-3 else 10, seconds=seconds)
        times = [sample.time for sample in history.samples]
        assert 100 < len(times) <= 512
        for share in (0.25, 0.5, 0.75):  # of the time, containing about that share of the samples
            assert abs(bisect.bisect(times, share * clock()) / len(times) - share) < 0.25, (seconds, share)
        assert times[-1] > 0.98 * clock()


def test_a_rare_kind_outlives_a_frequent_one() -> None:
    """A few eager seconds in a long compiled run stay in the plot."""
    clock = FakeClock()
    history = History(clock)
    run(clock, history, 1, 0.005)
    run(clock, history, 0.001, 0.01, "eager")
    run(clock, history, 9, 0.005)
    assert any(sample.path == "eager" for sample in history.samples)


def test_attempts_outlive_a_long_run() -> None:
    """All calls with an attempt are kept if there are at most 256; of more, those that are spread over the run."""
    for attempts in (256, 1000):
        clock = FakeClock()
        history = History(clock)
        for _ in range(attempts):
            clock.advance(1)
            call = history.samples[-1].call + 1 if history.samples else 1
            history.add(Sample(clock(), call, "eager", 1.0, attempted=True))
            run(clock, history, hours=0.01, seconds=0.01)
        times = [sample.time for sample in history.samples if sample.attempted]
        assert len(history.samples) <= 512
        assert len(times) == 256 if attempts == 256 else 100 < len(times) < 300
        assert times[0] < 0.05 * clock()
        assert times[-1] > 0.95 * clock()
        assert abs(bisect.bisect(times, 0.5 * clock()) / len(times) - 0.5) < 0.2


def test_attempts_in_quick_succession_late_in_a_long_run() -> None:
    """They are all kept, although other calls are kept at long intervals by then."""
    clock = FakeClock()
    history = History(clock)
    run(clock, history, hours=10, seconds=1.0)
    for _ in range(50):
        clock.advance(1)
        history.add(Sample(clock(), history.samples[-1].call + 1, "eager", 1.0, attempted=True))
    assert sum(sample.attempted for sample in history.samples) == 50


def test_what_is_kept_is_bounded() -> None:
    """Samples and marks are bounded, however many there are, even if the clock stands still."""
    clock = FakeClock()
    fn: Any = compile_with_fallback(
        lambda x: x.sin(), backend="eager", policy=RetryPolicy(wait=None, wait_calls=1, clock=clock), name="f"
    )
    with fail_compiles(full_disk(), times=600):
        for _ in range(1200):
            fn(X)
            clock.advance(5)
    collections: Any = plot_timeline(fn, Figure().subplots()).collections
    drawn = {points.get_label(): len(points.get_offsets()) for points in collections}
    failures, recoveries = drawn.pop("failure"), drawn.pop("recovery")
    assert (failures, recoveries) == (511, 1)
    assert fn.stats.failures == 600
    assert 100 < sum(drawn.values()) <= 512 < fn.stats.calls
    still = History(clock)
    for call in range(1, 3000):
        still.add(Sample(clock(), call, "compiled", 0.0, attempted=False))
    assert len(still.samples) <= 512
    assert still.next_call <= 3000 + 1024  # sampling continues
