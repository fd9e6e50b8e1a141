"""OpenTelemetry: instruments that read the counters when they are collected, and one span per attempt.

Needs only the API package. Until the program sets up an SDK, nothing is recorded.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import Status, StatusCode

from compile_retry._stats import CompileState
from compile_retry.events import AttemptFailed, Compiled, Event

from ._readings import Reading, Totals

# Seconds. OpenTelemetry's default buckets are meant for milliseconds.
_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800)


class OpenTelemetry:
    """The integration with OpenTelemetry. A span is created after its attempt, so an interrupt leaves none open."""

    def __init__(self) -> None:
        self._running = False
        self._totals = Totals()
        self._tracer = trace.get_tracer("compile_retry")
        meter = metrics.get_meter("compile_retry")
        self._seconds = meter.create_histogram(
            "compile_retry.attempt.duration",
            "s",
            "Duration of attempts.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._failures = meter.create_counter("compile_retry.failures", "{attempt}", "Failed attempts.")
        for kind, name, unit, description, read in (
            (meter.create_observable_counter, "calls", "{call}", "Calls by execution path.", _calls),
            (meter.create_observable_counter, "attempts", "{attempt}", "Compile attempts.", _attempts),
            (meter.create_observable_counter, "recoveries", "{recovery}", "Recoveries.", _recoveries),
            (meter.create_observable_gauge, "state", "{function}", "Functions by state.", _states),
            (meter.create_observable_gauge, "next_attempt.calls", "{call}", "Calls until the next one.", _calls_left),
            (meter.create_observable_gauge, "next_attempt.seconds", "s", "Seconds until the next one.", _seconds_left),
        ):
            kind(f"compile_retry.{name}", [self._callback(read)], unit, description)

    def start(self) -> None:
        self._running = True

    def stop(self) -> None:
        self._running = False

    def __call__(self, event: Event) -> None:
        self._totals.update()
        if isinstance(event, AttemptFailed | Compiled):
            with _own_random_numbers():
                self._measure(event)
                self._trace(event)

    def _callback(
        self, read: Callable[[Reading], Iterable[Observation]]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def callback(options: CallbackOptions) -> Iterable[Observation]:
            readings = self._totals.read() if self._running else []
            return [observation for reading in readings for observation in read(reading)]

        return callback

    def _measure(self, event: AttemptFailed | Compiled) -> None:
        attributes: dict[str, str | int] = _labels(event.function, event.rank)
        if isinstance(event, AttemptFailed):
            attributes["error.type"] = event.failure.error_type
            self._failures.add(1, attributes)
        self._seconds.record(event.seconds, attributes)

    def _trace(self, event: AttemptFailed | Compiled) -> None:
        end = time.time_ns()
        start = end - int(event.seconds * 1e9)
        span = self._tracer.start_span(f"compile {event.function}", start_time=start, attributes=_attributes(event))
        if isinstance(event, AttemptFailed):
            failure = event.failure
            span.add_event(
                "exception",
                {
                    "exception.type": failure.error_type,
                    "exception.message": failure.message,
                    "exception.stacktrace": failure.traceback,
                },
            )
            span.set_status(Status(StatusCode.ERROR, str(failure)))
        span.end(end)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Restore Python's random state afterwards: the SDK draws ids from it, but the program's draws must not change."""
    state = random.getstate()
    random.seed()  # otherwise spans would share ids, because the state is restored here or by torch
    try:
        yield
    finally:
        random.setstate(state)


def _attributes(event: AttemptFailed | Compiled) -> dict[str, str | int]:
    common: dict[str, str | int] = {
        "compile_retry.function": event.function,
        "compile_retry.call": event.call,
        "compile_retry.state": event.state.value,
    }
    if event.rank is not None:
        common["compile_retry.rank"] = event.rank
    if isinstance(event, Compiled):
        return {**common, "compile_retry.graph": event.graph}
    failure, (function, file, line) = event.failure, event.failure.frame
    return {
        **common,
        "compile_retry.attempt": failure.attempt,
        "compile_retry.failure.kind": failure.kind,
        "compile_retry.failure.stage": failure.stage,
        "error.type": failure.error_type,
        "code.function.name": function,
        "code.file.path": file,
        "code.line.number": line,
    }


def _labels(function: str, rank: int | None) -> dict[str, str | int]:
    return {"function": function} if rank is None else {"function": function, "rank": rank}


def _calls(reading: Reading) -> Iterable[Observation]:
    for path, count in reading.calls.items():
        yield Observation(count, {**_labels(reading.function, reading.rank), "path": path})


def _attempts(reading: Reading) -> Iterable[Observation]:
    yield Observation(reading.stats.attempts, _labels(reading.function, reading.rank))


def _recoveries(reading: Reading) -> Iterable[Observation]:
    yield Observation(reading.stats.recoveries, _labels(reading.function, reading.rank))


def _states(reading: Reading) -> Iterable[Observation]:
    for state in CompileState:
        yield Observation(reading.states[state], {**_labels(reading.function, reading.rank), "state": state.value})


def _calls_left(reading: Reading) -> Iterable[Observation]:
    if reading.calls_left is not None:
        yield Observation(reading.calls_left, _labels(reading.function, reading.rank))


def _seconds_left(reading: Reading) -> Iterable[Observation]:
    if reading.seconds_left is not None:
        yield Observation(reading.seconds_left, _labels(reading.function, reading.rank))
