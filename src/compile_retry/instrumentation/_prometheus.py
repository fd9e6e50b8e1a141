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
    calls = CounterMetricFamily("compile_retry_calls", "Calls by execution path.", labels=["function", "path"])
    attempts = CounterMetricFamily("compile_retry_attempts", "Compile attempts.", labels=["function"])
    failed = CounterMetricFamily("compile_retry_failures", "Failed attempts.", labels=["function", "error_type"])
    recoveries = CounterMetricFamily("compile_retry_recoveries", "Recoveries.", labels=["function"])
    seconds = CounterMetricFamily("compile_retry_attempt_seconds", "Seconds spent in attempts.", labels=["function"])
    for reading in readings:
        for path, count in reading.calls.items():
            calls.add_metric([reading.function, path], count)
        attempts.add_metric([reading.function], reading.stats.attempts)
        recoveries.add_metric([reading.function], reading.stats.recoveries)
        seconds.add_metric([reading.function], reading.stats.compile_seconds)
    for labels, count in failures.items():
        failed.add_metric(labels, count)
    return calls, attempts, failed, recoveries, seconds


def _gauges(readings: list[Reading]) -> Iterable[Metric]:
    states = GaugeMetricFamily("compile_retry_state", "Functions by state.", labels=["function", "state"])
    calls = GaugeMetricFamily(
        "compile_retry_next_attempt_calls", "Calls until the next attempt is due.", labels=["function"]
    )
    seconds = GaugeMetricFamily(
        "compile_retry_next_attempt_seconds", "Seconds until the next attempt is due.", labels=["function"]
    )
    for reading in readings:
        for state in CompileState:
            states.add_metric([reading.function, state.value], reading.states[state])
        if reading.calls_left is not None:
            calls.add_metric([reading.function], reading.calls_left)
        if reading.seconds_left is not None:
            seconds.add_metric([reading.function], reading.seconds_left)
    return states, calls, seconds
