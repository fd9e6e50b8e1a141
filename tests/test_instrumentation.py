"""Integrations, each with the real package: on by themselves, off by one call, late to be imported, and harmless."""

from __future__ import annotations

import copy
import gc
import logging
import os
import random
import subprocess
import sys
import threading
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import prometheus_client.parser
import pytest
import structlog
import torch
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from compile_retry import CompileState, RetryPolicy, _live, compile_with_fallback, compiled_function, instrumentation
from compile_retry.testing import FakeClock, record_events
from support import Compiler, first, full_disk

X = torch.ones(3)
ALL = ("structlog", "prometheus", "opentelemetry")


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def episode(name: str) -> Any:
    """Fails in calls 1 and 3, of which each call but the last is eager, and recovers in call 5."""
    policy = RetryPolicy(wait=None, wait_calls=2)
    fn = compile_with_fallback(sine, backend=Compiler(first(2)), policy=policy, name=name)
    for _ in range(5):
        fn(X)
    assert fn.state is CompileState.COMPILED
    return fn


def full_disk_in_dynamo(self: object) -> None:
    """In place of ``InstructionTranslator.run``: fails before there is a graph."""
    raise full_disk()


@pytest.fixture(autouse=True)
def _as_installed() -> Iterator[None]:
    """Everything is on, and structlog as if nobody had configured it, which `capture_logs` does."""
    yield
    instrumentation.enable()
    structlog.reset_defaults()


def run(code: str, **environment: str) -> str:
    """In a process of its own, where nothing has been imported or set up."""
    prelude = """
import logging, sys, torch
from compile_retry import RetryPolicy, compile_with_fallback, instrumentation
from compile_retry.testing import fail_compiles
logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)

@compile_with_fallback(backend="eager", policy=RetryPolicy(wait=None, wait_calls=1))
def step(x):
    return x.sin()
"""
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# On and off


def test_packages_are_imported_with_the_first_event() -> None:
    """Neither by importing the library nor by decorating, and not while torch holds its compile lock."""
    run("""
PACKAGES = {"structlog", "prometheus_client", "opentelemetry"}
assert not PACKAGES & set(sys.modules)

from compile_retry.events import register_hook
seen = []
register_hook(lambda event: seen.append((event.kind, PACKAGES & set(sys.modules))))
assert instrumentation.active() == ()
step(torch.ones(3))
assert seen == [("attempt started", set()), ("compiled", PACKAGES)], seen
assert instrumentation.active() == ("structlog", "prometheus", "opentelemetry")
assert "opentelemetry.sdk" not in sys.modules
""")


def test_off_before_the_first_event() -> None:
    """Then they are never imported."""
    run("""
instrumentation.disable()
step(torch.ones(3))
assert instrumentation.active() == ()
assert not {"structlog", "prometheus_client", "opentelemetry"} & set(sys.modules)

instrumentation.enable("prometheus")
step(torch.ones(3, 3))
assert instrumentation.active() == ("prometheus",)
assert not {"structlog", "opentelemetry"} & set(sys.modules)
""")


def test_some_off_and_on_again() -> None:
    """By name; enabled ones start with the next event; twice is once."""
    episode("a")
    assert instrumentation.active() == ALL
    instrumentation.disable("prometheus", "structlog")
    instrumentation.disable("prometheus")
    assert instrumentation.active() == ("opentelemetry",)
    instrumentation.enable()
    instrumentation.enable("prometheus")
    episode("a")
    assert instrumentation.active() == ALL


@pytest.mark.parametrize("switch", [instrumentation.enable, instrumentation.disable])
def test_unknown_names(switch: Any) -> None:
    """Say which there are."""
    with pytest.raises(ValueError, match="among 'structlog', 'prometheus', 'opentelemetry', not 'datadog'"):
        switch("prometheus", "datadog")


@pytest.mark.parametrize("module", ["structlog", "prometheus_client", "opentelemetry.trace"])
def test_a_package_that_is_not_installed(module: str) -> None:
    """Is left out without a word."""
    out = run(f"""
sys.modules[{module!r}] = None
step(torch.ones(3))
assert len(instrumentation.active()) == 2, instrumentation.active()
""")
    assert out == ""


@pytest.mark.parametrize("error", ["ImportError('half installed')", "RuntimeError('broken')"])
def test_a_broken_package(tmp_path: Path, error: str) -> None:
    """Is named in the log, once; the step, the log and the other integrations go on."""
    Path(tmp_path, "prometheus_client.py").write_text(f"raise {error}")
    out = run(
        """
with fail_compiles(times=1):
    for _ in range(3):
        step(torch.ones(3))
assert instrumentation.active() == ("structlog", "opentelemetry")
assert step.stats.recoveries == 1
""",
        PYTHONPATH=str(tmp_path),
    )
    assert out.count("the integration with prometheus cannot be started and is left out") == 1
    assert out.count(error.partition("(")[0] + ": ") == 1
    assert "step: recovered in call 2" in out


def test_one_that_fails_later(caplog: pytest.LogCaptureFixture) -> None:
    """Is logged once; the line that it would have replaced is there."""

    def broken(*args: object) -> Any:
        raise RuntimeError("processor")

    structlog.configure(processors=[broken])
    with caplog.at_level(logging.INFO, "compile_retry"):
        episode("f")
    lines = [record.getMessage() for record in caplog.records]
    assert sum("the integration with structlog failed on" in line for line in lines) == 1
    assert sum(line.startswith("f: ") for line in lines) == 4


def test_first_events_in_many_threads() -> None:
    """Each is told to all, the early ones included."""
    instrumentation.disable()
    instrumentation.enable()
    functions = [compile_with_fallback(lambda x: x.cos(), backend="eager", name=f"t{n}") for n in range(8)]
    with structlog.testing.capture_logs() as logs:
        threads = [threading.Thread(target=function, args=(X,)) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    told = sorted((log["function"], log["event"]) for log in logs)
    assert told == sorted((f"t{n}", kind) for n in range(8) for kind in ("attempt started", "compiled"))


# The functions there are


def test_live_functions() -> None:
    """In order of creation, copies and modules too; those that are dropped are not kept."""
    before = _live.functions()
    a = compile_with_fallback(sine, backend="eager")
    module = compile_with_fallback(torch.nn.Linear(3, 3), backend="eager")
    twin = copy.deepcopy(module)
    made = [function for function in _live.functions() if function not in before]
    assert made == [a, compiled_function(module), compiled_function(twin)]
    gone = weakref.ref(a)
    del a, made
    gc.collect()
    assert gone() is None
    assert [f for f in _live.functions() if f not in before] == [compiled_function(module), compiled_function(twin)]


# structlog


def test_structlog(caplog: pytest.LogCaptureFixture) -> None:
    """Gets every event as key-values at the level of the log line, or at debug; the log is not told as well."""
    with (
        structlog.testing.capture_logs() as logs,
        record_events("f") as events,
        caplog.at_level(logging.DEBUG, "compile_retry"),
    ):
        episode("f")
    assert [log["event"] for log in logs] == [event.kind for event in events]
    assert [log["log_level"] for log in logs] == [*["debug", "warning", "debug"] * 2, "debug", "info", "warning"]
    failed, recovered = logs[1], logs[-1]
    assert failed["failure"]["error_type"] == "builtins.OSError"
    assert "traceback" not in failed["failure"]
    assert (recovered["function"], recovered["state"], recovered["failures"]) == ("f", "compiled", 2)
    assert not [record for record in caplog.records if record.name == "compile_retry"]


def test_structlog_that_nobody_configured(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Says nothing: the log does."""
    with caplog.at_level(logging.INFO, "compile_retry"):
        episode("f")
    assert len([record for record in caplog.records if record.name == "compile_retry"]) == 4
    assert capsys.readouterr().out == ""


def test_structlog_is_off(caplog: pytest.LogCaptureFixture) -> None:
    """And the log has its lines again."""
    instrumentation.disable("structlog")
    with structlog.testing.capture_logs() as logs, caplog.at_level(logging.INFO, "compile_retry"):
        episode("f")
    assert logs == []
    assert len([record for record in caplog.records if record.name == "compile_retry"]) == 4


def test_structlog_through_the_standard_log(caplog: pytest.LogCaptureFixture) -> None:
    """Configured to render into it, there is one line per event, under the library's name."""
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.processors.JSONRenderer()],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    with caplog.at_level(logging.INFO, "compile_retry"):
        episode("f")
    assert [(r.name, r.levelname) for r in caplog.records if r.name == "compile_retry"] == [
        ("compile_retry", level) for level in ("WARNING", "WARNING", "INFO", "WARNING")
    ]
    assert '"event": "recovered"' in caplog.text


# Prometheus


class Scrapes:
    """A Prometheus server's view."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def __call__(self) -> dict[tuple[str, ...], float]:
        """Values by name and label values, of this library only."""
        with urllib.request.urlopen(self._url, timeout=60) as response:
            text = response.read().decode()
        samples: dict[tuple[str, ...], float] = {}
        for family in prometheus_client.parser.text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("compile_retry"):
                    labels = dict(sample.labels)
                    key = (sample.name.removeprefix("compile_retry_"), labels.pop("function"), *labels.values())
                    assert key not in samples
                    samples[key] = sample.value
        return samples


@pytest.fixture
def scrape() -> Iterator[Scrapes]:
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1")
    yield Scrapes(server.server_port)
    server.shutdown()
    server.server_close()
    thread.join(60)


def test_prometheus(scrape: Scrapes) -> None:
    """The books, the state, and failures by their cause."""
    fn = episode("prometheus")
    seen = {key: value for key, value in scrape().items() if key[1] == "prometheus"}
    assert seen.pop(("attempt_seconds_total", "prometheus")) == pytest.approx(fn.stats.compile_seconds)
    assert seen == {
        ("calls_total", "prometheus", "compiled"): 1,
        ("calls_total", "prometheus", "mixed"): 0,
        ("calls_total", "prometheus", "eager"): 4,
        ("attempts_total", "prometheus"): 3,
        ("failures_total", "prometheus", "builtins.OSError"): 2,
        ("recoveries_total", "prometheus"): 1,
        ("state", "prometheus", "pending"): 0,
        ("state", "prometheus", "compiled"): 1,
        ("state", "prometheus", "fallback"): 0,
        ("state", "prometheus", "gave up"): 0,
    }
    fn(X)  # no event, and still in the next scrape
    assert scrape()["calls_total", "prometheus", "compiled"] == 2


def test_prometheus_and_what_is_due(scrape: Scrapes) -> None:
    """Read at scrape time."""
    clock = FakeClock()
    policy = RetryPolicy(wait=60, wait_calls=9, clock=clock)
    fn = compile_with_fallback(sine, backend=Compiler(lambda inputs: full_disk()), policy=policy, name="due")
    fn(X), fn(X)
    clock.advance(20)
    seen = scrape()
    assert (seen["next_attempt_calls", "due"], seen["next_attempt_seconds", "due"]) == (8, 40)
    assert seen["state", "due", "fallback"] == 1


def test_prometheus_and_functions_of_one_name(scrape: Scrapes) -> None:
    """Share their samples; when one goes, no counter falls."""
    one, other = episode("twin"), episode("twin")
    compile_with_fallback(sine, name="twin")
    seen = scrape()
    assert (seen["attempts_total", "twin"], seen["failures_total", "twin", "builtins.OSError"]) == (6, 4)
    assert (seen["state", "twin", "compiled"], seen["calls_total", "twin", "eager"]) == (2, 8)
    other(X)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    for _ in range(2):
        seen = scrape()
        assert (seen["attempts_total", "twin"], seen["calls_total", "twin", "compiled"]) == (6, 3)
        assert seen["state", "twin", "compiled"] == 1
    one(X)
    assert scrape()["calls_total", "twin", "compiled"] == 4


def test_prometheus_and_functions_that_are_gone(scrape: Scrapes) -> None:
    """Before a scrape has seen them: what was attempted counts."""
    episode("gone")
    gc.collect()
    seen = scrape()
    assert (seen["attempts_total", "gone"], seen["failures_total", "gone", "builtins.OSError"]) == (3, 2)
    assert sum(seen["state", "gone", state.value] for state in CompileState) == 0


def test_prometheus_is_off(scrape: Scrapes) -> None:
    """Nothing is left in the registry, and it comes back with the next event."""
    episode("off")
    instrumentation.disable()
    assert scrape() == {}
    instrumentation.enable("prometheus")
    episode("off")
    assert scrape()["attempts_total", "off"] == 6


def test_prometheus_registry_that_was_cleared(scrape: Scrapes) -> None:
    """Somebody has taken the collector out: nothing to take back."""
    episode("cleared")
    for collector in {*prometheus_client.REGISTRY._collector_to_names}:
        if "compile_retry" in type(collector).__module__:
            prometheus_client.REGISTRY.unregister(collector)
    instrumentation.disable("prometheus")
    assert "prometheus" not in instrumentation.active()


def test_prometheus_while_functions_come_and_go(scrape: Scrapes) -> None:
    """A scrape is never spoilt by what other threads do."""
    instrumentation.enable()
    episode("busy")
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            compile_with_fallback(sine, backend="eager", name="busy")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        attempts = [scrape()["attempts_total", "busy"] for _ in range(20)]
    finally:
        over.set()
        thread.join(60)
    assert attempts == [3] * 20


# OpenTelemetry


@pytest.fixture(scope="module")
def _sdk() -> Iterator[tuple[InMemorySpanExporter, InMemoryMetricReader]]:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))
    yield exporter, reader
    exporter.shutdown()  # a provider stays for the life of the process, and this would keep every span
    exporter.clear()


@pytest.fixture
def spans(_sdk: tuple[InMemorySpanExporter, InMemoryMetricReader]) -> InMemorySpanExporter:
    _sdk[0].clear()
    return _sdk[0]


@pytest.fixture
def points(_sdk: tuple[InMemorySpanExporter, InMemoryMetricReader]) -> Any:
    def collect(function: str) -> dict[tuple[str, ...], Any]:
        data = _sdk[1].get_metrics_data()
        return {
            (metric.name.removeprefix("compile_retry."), *map(str, list((point.attributes or {}).values())[1:])): (
                point.count if isinstance(point, HistogramDataPoint) else point.value  # type: ignore[union-attr]
            )
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
            if (point.attributes or {}).get("function") == function
        }

    return collect


def test_spans(spans: InMemorySpanExporter) -> None:
    """One per attempt, within the span of the step, as long as the attempt was; failures have a cause."""
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
    """They have one, though no attempt was ever said to have started."""
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
    """The same figures as Prometheus gets, and a histogram of attempts."""
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


def test_otel_and_what_is_due(spans: InMemorySpanExporter, points: Any) -> None:
    """Read when collected."""
    clock = FakeClock()
    policy = RetryPolicy(wait=60, wait_calls=9, clock=clock)
    fn = compile_with_fallback(sine, backend=Compiler(lambda inputs: full_disk()), policy=policy, name="due")
    fn(X)
    clock.advance(20)
    assert (points("due")["next_attempt.calls",], points("due")["next_attempt.seconds",]) == (9, 40)


def test_otel_is_off(spans: InMemorySpanExporter, points: Any) -> None:
    """No spans, and silent instruments; on again, they speak again."""
    episode("quiet")
    spans.clear()
    instrumentation.disable("opentelemetry")
    episode("silent")
    assert (spans.get_finished_spans(), points("silent")) == ((), {})
    instrumentation.enable("opentelemetry")
    episode("loud")
    assert (len(spans.get_finished_spans()), points("loud")["attempts",]) == (3, 3)


def test_otel_draws_no_random_numbers_of_the_program(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK's ids come from Python's generator; a seeded program must not notice, and no id come twice.

    A failure inside Dynamo is told at the end of the call, when torch does not look after the generator any more.
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
    """All goes nowhere, at next to no cost."""
    out = run("""
with fail_compiles(times=1):
    for _ in range(3):
        step(torch.ones(3))
assert "opentelemetry.sdk" not in sys.modules
from compile_retry.events import Compiled
from compile_retry.instrumentation._switchboard import switchboard
from compile_retry import CompileState
event = Compiled(time=0.0, function="f", call=1, state=CompileState.COMPILED, message="", graph=1, seconds=1.0)
import timeit
print("us", min(timeit.repeat(lambda: switchboard.tell(event, None), number=1000, repeat=5)) * 1e3)
""")
    assert "us " in out
