"""The integration with structlog, and the cases in which the standard log gets the lines."""

from __future__ import annotations

import logging

import pytest
import structlog
import torch

from compile_retry import compile_repeated_blocks, instrumentation
from compile_retry.testing import record_events
from episodes import episode

pytestmark = pytest.mark.usefixtures("integrations")


def test_structlog(caplog: pytest.LogCaptureFixture) -> None:
    """Every event is logged as key-value pairs, at its level or at debug, and the standard log gets no line."""
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


def test_structlog_with_repeated_blocks() -> None:
    """The blocks' names are abbreviated. Other functions have no such key."""
    layer = torch.nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    compile_repeated_blocks(model, backend="eager", name="Layer")
    with structlog.testing.capture_logs() as logs:
        model(torch.randn(2, 3, 4))
        episode("f")
    named = [log for log in logs if log["function"] == "Layer"]
    assert {(log["functions"], log["fqns"]) for log in named} == {(3, "layers.0 ... layers.2")}
    assert not [log for log in logs if log["function"] == "f" and "fqns" in log]


def test_structlog_not_configured(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """If structlog is not configured, the standard log gets the lines."""
    with caplog.at_level(logging.INFO, "compile_retry"):
        episode("f")
    assert len([record for record in caplog.records if record.name == "compile_retry"]) == 4
    assert capsys.readouterr().out == ""


def test_structlog_disabled(caplog: pytest.LogCaptureFixture) -> None:
    """If the integration is disabled, the standard log gets the lines."""
    instrumentation.disable("structlog")
    with structlog.testing.capture_logs() as logs, caplog.at_level(logging.INFO, "compile_retry"):
        episode("f")
    assert logs == []
    assert len([record for record in caplog.records if record.name == "compile_retry"]) == 4


def test_structlog_through_the_standard_log(caplog: pytest.LogCaptureFixture) -> None:
    """If structlog renders into the standard log, each event has one line, under the library's name."""
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
