"""The integration with structlog: what it is told, and when the standard log speaks instead."""

from __future__ import annotations

import logging

import pytest
import structlog

from compile_retry import instrumentation
from compile_retry.testing import record_events
from episodes import episode

pytestmark = pytest.mark.usefixtures("integrations")


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
