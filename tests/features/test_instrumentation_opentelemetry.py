"""The integration with OpenTelemetry: spans of attempts, and metrics."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from compile_retry import RetryPolicy, compile_with_fallback, instrumentation
from compile_retry.testing import FakeClock, record_events
from episodes import X, episode, full_disk_in_dynamo, run, sine
from support import Compiler, first, full_disk

pytestmark = pytest.mark.usefixtures("integrations")


@pytest.fixture(scope="module")
def _sdk() -> Iterator[tuple[InMemorySpanExporter, InMemoryMetricReader]]:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))
    yield exporter, reader
    exporter.shutdown()  # the provider lives as long as the process, and would keep every span
    exporter.clear()


@pytest.fixture
def spans(_sdk: tuple[InMemorySpanExporter, InMemoryMetricReader]) -> InMemorySpanExporter:
    _sdk[0].clear()
    return _sdk[0]


@pytest.fixture
def points(_sdk: tuple[InMemorySpanExporter, InMemoryMetricReader]) -> Any:
    def collect(function: str) -> dict[tuple[str, ...], Any]:
        data: Any = _sdk[1].get_metrics_data()
        return {
            (metric.name.removeprefix("compile_retry."), *map(str, list((point.attributes or {}).values())[1:])): (
                point.count if isinstance(point, HistogramDataPoint) else point.value
            )
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
            if (point.attributes or {}).get("function") == function
        }

    return collect


def test_spans(spans: InMemorySpanExporter) -> None:
    """Each attempt is a span within the step's span, with the attempt's duration and, if it failed, the cause."""
    clock, left = FakeClock(), [1]

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        clock.advance(5)
        left[0] -= 1
        if left[0] >= 0:
            raise full_disk()
        return graph_module.forward

    policy = RetryPolicy(wait=None, wait_calls=1, clock=clock)
    fn = compile_with_fallback(sine, backend=compiler, policy=policy, name="f")
    with trace.get_tracer("test").start_as_current_span("training step") as step:
        fn(X), fn(X), fn(X)
    failed, compiled, _ = spans.get_finished_spans()
    for span in (failed, compiled):
        assert span.name == "compile f"
        assert span.parent is not None
        assert span.parent.span_id == step.get_span_context().span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.end_time - span.start_time == 5_000_000_000
    assert (failed.status.status_code, compiled.status.status_code) == (trace.StatusCode.ERROR, trace.StatusCode.UNSET)
    assert failed.status.description == "OSError: [Errno 28] No space left on device"
    assert failed.attributes is not None
    assert compiled.attributes is not None
    assert failed.attributes["error.type"] == "builtins.OSError"
    assert failed.attributes["code.function.name"] == "sine"
    assert "No space left" in str((failed.events[0].attributes or {})["exception.stacktrace"])
    assert (compiled.attributes["compile_retry.call"], compiled.attributes["compile_retry.graph"]) == (2, 1)


def test_spans_of_failures_inside_dynamo(spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure inside Dynamo has a span, although it has no AttemptStarted."""
    from torch._dynamo import symbolic_convert

    fn = compile_with_fallback(sine, backend="eager", name="f", policy=RetryPolicy(wait=1e6))
    with monkeypatch.context() as patch, record_events("f", kinds={"attempt started"}) as started:
        patch.setattr(symbolic_convert.InstructionTranslator, "run", full_disk_in_dynamo)
        fn(X)
    (span,) = spans.get_finished_spans()
    assert started == []
    assert span.attributes is not None
    assert span.attributes["compile_retry.failure.stage"] == "trace"


def test_otel_metrics(spans: InMemorySpanExporter, points: Any) -> None:
    """The metrics have the same values as Prometheus's, plus a histogram of attempts."""
    fn = episode("otel")
    assert points("otel") == {
        ("calls", "compiled"): 1,
        ("calls", "mixed"): 0,
        ("calls", "eager"): 4,
        ("attempts",): 3,
        ("recoveries",): 1,
        ("failures", "builtins.OSError"): 2,
        ("attempt.duration",): 1,
        ("attempt.duration", "builtins.OSError"): 2,
        ("state", "pending"): 0,
        ("state", "compiled"): 1,
        ("state", "fallback"): 0,
        ("state", "gave up"): 0,
    }
    fn(X)
    assert points("otel")["calls", "compiled"] == 2


def test_otel_next_attempt(spans: InMemorySpanExporter, points: Any) -> None:
    """The time to the next attempt is read at collection."""
    clock = FakeClock()
    policy = RetryPolicy(wait=60, wait_calls=9, clock=clock)
    fn = compile_with_fallback(sine, backend=Compiler(lambda inputs: full_disk()), policy=policy, name="due")
    fn(X)
    clock.advance(20)
    assert (points("due")["next_attempt.calls",], points("due")["next_attempt.seconds",]) == (9, 40)


def test_otel_metrics_of_functions_that_share(spans: InMemorySpanExporter, points: Any) -> None:
    """They are summed, and do not decrease when one of them is gone. Each attempt has one span."""

    def times(k: int) -> Any:
        return lambda x: x * k

    compiler, policy = Compiler(first(1)), RetryPolicy(wait=None, wait_calls=2)
    functions = [compile_with_fallback(times(k), backend=compiler, policy=policy, name="shared") for k in (2, 3)]
    for _ in range(3):
        for fn in functions:
            fn(X)
    before = points("shared")
    assert [before["calls", path] for path in ("compiled", "mixed", "eager")] == [4, 0, 2]
    assert (before["attempts",], before["recoveries",], before["failures", "builtins.OSError"]) == (3, 1, 1)
    assert before["state", "compiled"] == 2
    assert len(spans.get_finished_spans()) == 3
    del fn
    functions.pop()
    gc.collect()
    assert points("shared") == {**before, ("state", "compiled"): 1}


def test_otel_disabled(spans: InMemorySpanExporter, points: Any) -> None:
    """While disabled there are no spans and no observations; enabling it again restores both."""
    episode("quiet")
    spans.clear()
    instrumentation.disable("opentelemetry")
    episode("silent")
    assert (spans.get_finished_spans(), points("silent")) == ((), {})
    instrumentation.enable("opentelemetry")
    episode("loud")
    assert (len(spans.get_finished_spans()), points("loud")["attempts",]) == (3, 3)


def test_otel_leaves_random_numbers_alone(spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seeded program draws the same random numbers as without spans, although the SDK draws their ids.

    No id is used twice. A failure inside Dynamo is published at the end of the call, when torch no longer restores the
    generator.
    """
    from torch._dynamo import symbolic_convert

    fn = compile_with_fallback(lambda x: x.cos(), backend="eager", name="f", policy=RetryPolicy(wait=1e6))
    random.seed(0)
    before = random.getstate()
    with monkeypatch.context() as patch:
        patch.setattr(symbolic_convert.InstructionTranslator, "run", full_disk_in_dynamo)
        fn(X)
    episode("f")
    assert random.getstate() == before
    with trace.get_tracer("test").start_as_current_span("step"):
        pass
    ids = [span.context.span_id for span in spans.get_finished_spans() if span.context]
    assert len(set(ids)) == len(ids) == 5


def test_otel_without_an_sdk() -> None:
    """Without an SDK nothing is recorded, and the program prints nothing."""
    out = run("""
logging.getLogger("compile_retry").setLevel(logging.CRITICAL)
with fail_compiles(times=1):
    for _ in range(3):
        step(torch.ones(3))
assert "opentelemetry.sdk" not in sys.modules
assert (instrumentation.active()[-1], step.stats.recoveries) == ("opentelemetry", 1)
""")
    assert out == ""
