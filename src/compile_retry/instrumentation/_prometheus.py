"""A Prometheus collector that reads the counters when it is scraped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from compile_retry._locks import Lock
from compile_retry._stats import CompileState
from compile_retry.events import AttemptFailed, Event

from ._readings import Reading, Totals


class Prometheus(Collector):
    """A collector in the default registry.

    Functions with the same name share their samples, because duplicate samples would make the scrape fail.
    """

    def __init__(self) -> None:
        self._totals = Totals()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._lock = Lock()

    def start(self) -> None:
        REGISTRY.register(self)

    def stop(self) -> None:
        with suppress(KeyError):  # somebody else has unregistered it
            REGISTRY.unregister(self)

    def __call__(self, event: Event) -> None:
        self._totals.update()
        if isinstance(event, AttemptFailed):
            with self._lock:
                self._failures[event.function, event.failure.error_type] += 1

    def describe(self) -> Iterable[Metric]:
        return [*_counters([], {}), *_gauges([])]

    def collect(self) -> Iterable[Metric]:
        readings = self._totals.read()
        with self._lock:
            failures = dict(self._failures)
        return [*_counters(readings, failures), *_gauges(readings)]


def _counters(readings: list[Reading], failures: Mapping[tuple[str, str], int]) -> Iterable[Metric]:
    ranks = _Ranks(readings)
    calls = CounterMetricFamily("compile_retry_calls", "Calls by execution path.", labels=ranks.labels("path"))
    attempts = CounterMetricFamily("compile_retry_attempts", "Compile attempts.", labels=ranks.labels())
    failed = CounterMetricFamily("compile_retry_failures", "Failed attempts.", labels=ranks.labels("error_type"))
    recoveries = CounterMetricFamily("compile_retry_recoveries", "Recoveries.", labels=ranks.labels())
    seconds = CounterMetricFamily("compile_retry_attempt_seconds", "Seconds spent in attempts.", labels=ranks.labels())
    for reading in readings:
        for path, count in reading.calls.items():
            calls.add_metric(ranks.values(reading.function, path), count)
        attempts.add_metric(ranks.values(reading.function), reading.stats.attempts)
        recoveries.add_metric(ranks.values(reading.function), reading.stats.recoveries)
        seconds.add_metric(ranks.values(reading.function), reading.stats.compile_seconds)
    for (function, error_type), count in failures.items():
        failed.add_metric(ranks.values(function, error_type), count)
    return calls, attempts, failed, recoveries, seconds


def _gauges(readings: list[Reading]) -> Iterable[Metric]:
    ranks = _Ranks(readings)
    states = GaugeMetricFamily("compile_retry_state", "Functions by state.", labels=ranks.labels("state"))
    calls = GaugeMetricFamily(
        "compile_retry_next_attempt_calls", "Calls until the next attempt is due.", labels=ranks.labels()
    )
    seconds = GaugeMetricFamily(
        "compile_retry_next_attempt_seconds", "Seconds until the next attempt is due.", labels=ranks.labels()
    )
    for reading in readings:
        for state in CompileState:
            states.add_metric(ranks.values(reading.function, state.value), reading.states[state])
        if reading.calls_left is not None:
            calls.add_metric(ranks.values(reading.function), reading.calls_left)
        if reading.seconds_left is not None:
            seconds.add_metric(ranks.values(reading.function), reading.seconds_left)
    return states, calls, seconds


class _Ranks:
    """Adds the label "rank" if any function has a group of ranks. It is empty for the others."""

    def __init__(self, readings: list[Reading]) -> None:
        known = {reading.function: reading.rank for reading in readings if reading.rank is not None}
        self._ranks = {function: str(rank) for function, rank in known.items()}

    def labels(self, *more: str) -> list[str]:
        return ["function", *more, *(["rank"] if self._ranks else [])]

    def values(self, function: str, *more: str) -> list[str]:
        return [function, *more, *([self._ranks.get(function, "")] if self._ranks else [])]
