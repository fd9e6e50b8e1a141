"""A Prometheus collector that reads the books when it is scraped."""

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

from ._readings import Ledger, Reading


class Prometheus(Collector):
    """In the default registry. Functions of one name share their samples: two of the same would spoil the scrape."""

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._lock = Lock()

    def start(self) -> None:
        REGISTRY.register(self)

    def stop(self) -> None:
        with suppress(KeyError):  # somebody else has taken it out
            REGISTRY.unregister(self)

    def __call__(self, event: Event) -> None:
        self._ledger.open_accounts()
        if isinstance(event, AttemptFailed):
            with self._lock:
                self._failures[event.function, event.failure.error_type] += 1

    def describe(self) -> Iterable[Metric]:
        return [*_counters([], {}), *_gauges([])]

    def collect(self) -> Iterable[Metric]:
        readings = self._ledger.read()
        with self._lock:
            failures = dict(self._failures)
        return [*_counters(readings, failures), *_gauges(readings)]


def _counters(readings: list[Reading], failures: Mapping[tuple[str, str], int]) -> Iterable[Metric]:
    calls = CounterMetricFamily("compile_retry_calls", "Calls, by what ran in them.", labels=["function", "path"])
    attempts = CounterMetricFamily("compile_retry_attempts", "Runs of the compiler.", labels=["function"])
    failed = CounterMetricFamily(
        "compile_retry_failures", "Attempts that did not produce code.", labels=["function", "error_type"]
    )
    recoveries = CounterMetricFamily(
        "compile_retry_recoveries", "Times that all was compiled again.", labels=["function"]
    )
    seconds = CounterMetricFamily("compile_retry_attempt_seconds", "Seconds in attempts.", labels=["function"])
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
    states = GaugeMetricFamily("compile_retry_state", "Functions in this state.", labels=["function", "state"])
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
