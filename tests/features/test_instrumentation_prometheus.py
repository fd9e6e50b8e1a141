"""The integration with Prometheus, as a server that scrapes the process sees it."""

from __future__ import annotations

import gc
import threading
import urllib.request
import weakref
from collections.abc import Callable, Iterator

import prometheus_client
import prometheus_client.parser
import pytest
import torch
from prometheus_client.registry import Collector

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, instrumentation
from compile_retry.testing import FakeClock
from episodes import X, episode, sine
from support import Compiler, first, full_disk

pytestmark = pytest.mark.usefixtures("integrations")


class Scrapes:
    """A Prometheus server's view of the process."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def __call__(self) -> dict[tuple[str, ...], float]:
        """Return this library's samples, by name and label values."""
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
    """The counters, the state, and the failures by cause are exported."""
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
    fn(X)  # no event, but visible in the next scrape
    assert scrape()["calls_total", "prometheus", "compiled"] == 2


def test_prometheus_next_attempt(scrape: Scrapes) -> None:
    """The time to the next attempt is read at scrape time."""
    clock = FakeClock()
    policy = RetryPolicy(wait=60, wait_calls=9, clock=clock)
    fn = compile_with_fallback(sine, backend=Compiler(lambda inputs: full_disk()), policy=policy, name="due")
    fn(X), fn(X)
    clock.advance(20)
    seen = scrape()
    assert (seen["next_attempt_calls", "due"], seen["next_attempt_seconds", "due"]) == (8, 40)
    assert seen["state", "due", "fallback"] == 1


def test_prometheus_with_functions_of_the_same_name(scrape: Scrapes) -> None:
    """Functions with the same name share their samples. If one is garbage-collected, no counter decreases."""
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


def times(k: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * k


def test_prometheus_with_functions_that_share(scrape: Scrapes) -> None:
    """They have one sample, the sum of their counters: each attempt counts once, and each call."""
    compiler, policy = Compiler(first(1)), RetryPolicy(wait=None, wait_calls=3)
    functions = [compile_with_fallback(times(k), backend=compiler, policy=policy, name="sharing") for k in (2, 3, 4)]
    for _ in range(2):
        for fn in functions:
            fn(X)
    seen = scrape()
    assert seen["attempts_total", "sharing"] == sum(fn.stats.attempts for fn in functions) == compiler.asked
    assert seen["failures_total", "sharing", "builtins.OSError"] == seen["recoveries_total", "sharing"] == 1
    assert [seen["calls_total", "sharing", path] for path in ("compiled", "mixed", "eager")] == [3, 0, 3]
    assert seen["state", "sharing", "compiled"] == 3


def test_prometheus_with_two_groups_of_one_name(scrape: Scrapes) -> None:
    """They are summed, also when one of them is gone."""
    groups = [
        [compile_with_fallback(times(k), backend=Compiler(), dynamic=dynamic, name="groups") for k in (2, 3)]
        for dynamic in (True, False)
    ]
    for functions in groups:
        for fn in functions:
            fn(X)
    before = scrape()
    assert before["calls_total", "groups", "compiled"] == 4
    del functions, fn
    groups.pop()
    gc.collect()
    after = scrape()
    assert after["state", "groups", "compiled"] == 2
    assert after["calls_total", "groups", "compiled"] == 4
    assert after["attempts_total", "groups"] == before["attempts_total", "groups"]


def test_prometheus_with_short_lived_functions_that_share(scrape: Scrapes) -> None:
    """A function that runs the code of others, and is gone before any event and any scrape, still counts."""
    compiler = Compiler()
    kept = compile_with_fallback(times(2), backend=compiler, name="short")
    kept(X)
    assert scrape()["calls_total", "short", "compiled"] == 1
    for _ in range(5):
        compile_with_fallback(times(2), backend=compiler, name="short")(X)
    gc.collect()
    assert compiler.asked == 1
    for _ in range(2):
        seen = scrape()
        assert (seen["calls_total", "short", "compiled"], seen["state", "short", "compiled"]) == (6, 1)


def test_prometheus_with_garbage_collected_functions(scrape: Scrapes) -> None:
    """A function that is garbage-collected before the first scrape still counts."""
    episode("gone")
    gc.collect()
    seen = scrape()
    assert (seen["attempts_total", "gone"], seen["failures_total", "gone", "builtins.OSError"]) == (3, 2)
    assert sum(seen["state", "gone", state.value] for state in CompileState) == 0


def test_prometheus_disabled(scrape: Scrapes) -> None:
    """Disabling removes the collector from the registry; enabling restores it at the next event."""
    episode("off")
    instrumentation.disable()
    assert scrape() == {}
    instrumentation.enable("prometheus")
    episode("off")
    assert scrape()["attempts_total", "off"] == 6


def test_prometheus_collector_already_unregistered(scrape: Scrapes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disabling works even if somebody else has unregistered the collector."""
    instrumentation.disable()
    instrumentation.enable()
    registered, register = list[Collector](), prometheus_client.REGISTRY.register

    def note(collector: Collector) -> None:
        registered.append(collector)
        register(collector)

    monkeypatch.setattr(prometheus_client.REGISTRY, "register", note)
    episode("cleared")
    (collector,) = registered
    prometheus_client.REGISTRY.unregister(collector)
    instrumentation.disable("prometheus")
    assert "prometheus" not in instrumentation.active()


def test_prometheus_while_functions_come_and_go(scrape: Scrapes) -> None:
    """Scrapes work while other threads create and drop functions."""
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
