"""Integrations with the real packages: automatic start, disabling, late imports, and failures."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import structlog

from compile_retry import compile_with_fallback, instrumentation
from episodes import ALL, X, episode, run
from support import wait_until_waiting

pytestmark = pytest.mark.usefixtures("integrations", "measured")


def test_packages_are_imported_with_the_first_event() -> None:
    """Importing the library and decorating import no package, nor does an event while torch holds its compile lock."""
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
    """Integrations disabled before the first event are never imported."""
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
    """Integrations are disabled by name, and enabled ones start at the next event. Repeating a call has no effect."""
    episode("a")
    assert instrumentation.active() == ALL
    instrumentation.disable("prometheus", "structlog")
    instrumentation.disable("prometheus")
    assert instrumentation.active() == ("opentelemetry",)
    instrumentation.enable()
    instrumentation.enable("prometheus")
    episode("a")
    assert instrumentation.active() == ALL


def test_an_event_while_the_integrations_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event in another thread waits until the integrations have started, and none is started twice."""
    instrumentation.disable()
    instrumentation.enable()
    other = threading.Thread(target=episode, args=("other",))
    register, registered = prometheus_client.REGISTRY.register, []

    def register_slowly(collector: Any) -> None:
        registered.append(collector)
        if len(registered) == 1:
            other.start()
            wait_until_waiting(other)
        register(collector)

    monkeypatch.setattr(prometheus_client.REGISTRY, "register", register_slowly)
    with structlog.testing.capture_logs() as logs:
        episode("one")
        other.join(60)
    assert len(registered) == 1
    assert instrumentation.active() == ALL
    assert [log["function"] for log in logs].count("other") == [log["function"] for log in logs].count("one") == 9


@pytest.mark.parametrize("switch", [instrumentation.enable, instrumentation.disable])
def test_unknown_names(switch: Any) -> None:
    """An unknown name raises an error that lists the known ones."""
    with pytest.raises(ValueError, match="among 'structlog', 'prometheus', 'opentelemetry', not 'datadog'"):
        switch("prometheus", "datadog")


def test_packages_that_are_not_installed() -> None:
    """Packages that are not installed are ignored silently."""
    out = run("""
sys.modules.update({"structlog": None, "prometheus_client": None, "opentelemetry.trace": None})
step(torch.ones(3))
assert instrumentation.active() == ()
""")
    assert out == ""


@pytest.mark.usefixtures("measured")
def test_broken_packages(tmp_path: Path) -> None:
    """A package that cannot be imported is logged once. The step, the log and the other integrations continue."""
    errors = {"prometheus": "RuntimeError('broken')", "structlog": "ImportError('half installed')"}
    Path(tmp_path, "prometheus_client.py").write_text(f"raise {errors['prometheus']}")
    Path(tmp_path, "structlog.py").write_text(f"raise {errors['structlog']}")
    out = run(
        """
with fail_compiles(times=1):
    for _ in range(3):
        step(torch.ones(3))
assert instrumentation.active() == ("opentelemetry",)
assert step.stats.recoveries == 1
""",
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )
    for name, error in errors.items():
        assert out.count(f"the integration with {name} could not be started and is disabled") == 1
        assert out.count(error.partition("(")[0] + ": ") == 1
    assert "step: recovered in call 2" in out


def test_an_integration_that_fails_later(caplog: pytest.LogCaptureFixture) -> None:
    """An integration that fails later is logged once, and the standard log gets the lines instead."""
    instrumentation.disable()
    instrumentation.enable()

    def broken(*args: object) -> Any:
        raise RuntimeError("processor")

    structlog.configure(processors=[broken])
    with caplog.at_level(logging.INFO, "compile_retry"):
        episode("f")
    lines = [record.getMessage() for record in caplog.records]
    assert sum("the integration with structlog failed on" in line for line in lines) == 1
    assert sum(line.startswith("f: ") for line in lines) == 4


def test_first_events_in_many_threads() -> None:
    """Events of many threads reach all integrations, including those before the start."""
    instrumentation.disable()
    instrumentation.enable()
    functions = [compile_with_fallback(lambda x: x.cos(), backend="eager", name=f"t{n}") for n in range(8)]
    with structlog.testing.capture_logs() as logs:
        threads = [threading.Thread(target=function, args=(X,)) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    published = sorted((log["function"], log["event"]) for log in logs)
    assert published == sorted((f"t{n}", kind) for n in range(8) for kind in ("attempt started", "compiled"))
