"""`report()`: all live functions, in a terminal, in a notebook and as a dictionary."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import json
import sys
import threading
from typing import Any

import pytest
import torch
from rich.console import Console

import compile_retry
from compile_retry import RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.testing import FakeClock
from support import Compiler, first, full_disk

X = torch.ones(3)


def failing(name: str, n: int = 9, message: str = "") -> Any:
    error = OSError(message) if message else full_disk()
    fn = compile_with_fallback(
        lambda x: x.sin(),
        backend=Compiler(first(n, lambda: error)),
        policy=RetryPolicy(wait=30, clock=FakeClock()),
        name=name,
    )
    fn(X)
    return fn


def shown(name: str) -> dict[str, Any]:
    (found,) = [row for row in compile_retry.report().as_dict()["functions"] if row["name"] == name]
    assert isinstance(found, dict)
    return found


def test_a_function_that_failed() -> None:
    """The report has the state, the counters, the last failure and the next attempt, ready for JSON."""
    fn = failing("failed")
    row = shown("failed")
    assert (row["state"], row["stats"]) == ("fallback", fn.stats.as_dict())
    assert row["last_failure"]["error_type"] == "builtins.OSError"
    assert row["next_retry"] == {"calls": None, "seconds": 30.0, "at_least": 0.0, "max_overhead": None}
    report = compile_retry.report()  # one report, because it may include other tests' functions, whose clocks advance
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()


def test_plain_text() -> None:
    """The text has one line per function, and one per last failure."""
    functions = [failing("failed"), compile_with_fallback(lambda x: x, name="untouched")]
    text = str(compile_retry.report())
    assert text == repr(compile_retry.report())
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    assert lines["function"][:4] == ["function", "state", "calls", "compiled"]
    assert lines["untouched"][1:3] == ["pending", "0"]
    assert lines["failed"][1:8] == ["fallback", "1", "0", "0", "1", "1", "1"]
    assert lines["failed"][-3:] == ["in", "30", "s"]
    assert "failed: attempt 1 failed in call 1: OSError: [Errno 28] No space left on device, compiling" in text
    assert len(functions) == 2


@pytest.mark.parametrize("width", [80, 140])
def test_rich(width: int) -> None:
    """Rich prints a table in colour. Text is not taken for markup, and nothing is cut off in a narrow terminal."""
    fn = failing("rich_table", message="[red]not markup[/red]")
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(compile_retry.report())
    assert "[red]not markup[/red]" in " ".join(out.getvalue().split())
    row = next(line for line in out.getvalue().splitlines() if line.split()[:1] == ["rich_table"])
    assert row.split()[1:8] == ["fallback", "1", "0", "0", "1", "1", "1"]
    assert row.split()[-3:] == ["in", "30", "s"]
    assert ("recovered" in out.getvalue()) == (width == 140)
    del fn


def test_html_is_escaped() -> None:
    """Names, messages and tracebacks are escaped, and the traceback is collapsed."""
    fn = failing("<script>f</script>", message="<b>bold</b>")
    page = compile_retry.report()._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;f&lt;/script&gt;" in page
    assert "<details><summary>" in page
    assert "src=" not in page
    del fn


def test_show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`show()` works with rich and without."""
    fn = failing("train_step")
    compile_retry.report().show()
    assert "train_step" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich", None)
    compile_retry.report().show()
    assert capsys.readouterr().out == f"{compile_retry.report()}\n"
    del fn


def test_nothing_to_report() -> None:
    """An empty report says so in every format."""
    report, out = dataclasses.replace(compile_retry.report(), functions=()), io.StringIO()
    Console(file=out).print(report)
    assert str(report) == out.getvalue().strip() == "compile_retry: no decorated functions"
    assert str(report) in report._repr_html_()
    assert report.as_dict() == {"functions": []}


def mine() -> list[str]:
    return [row.name for row in compile_retry.report().functions if row.name.startswith("mine")]


def test_live_functions_in_order() -> None:
    """The report lists copies and modules too, in order, and drops functions that are garbage-collected."""
    fn = compile_with_fallback(lambda x: x, name="mine1")
    module = compile_with_fallback(torch.nn.Linear(1, 1), name="mine2")
    copies = copy.deepcopy(module), copy.copy(fn), copy.deepcopy(fn)
    assert mine() == ["mine1", "mine2", "mine2", "mine1", "mine1"]
    assert compiled_function(copies[0]) is not compiled_function(module)
    del copies, module
    gc.collect()
    assert mine() == ["mine1"]


def test_threads() -> None:
    """The report works while other threads create and drop functions."""
    done, errors = threading.Event(), list[Exception]()

    def look() -> None:
        try:
            while not done.is_set():
                compile_retry.report()
        except Exception as exc:
            errors.append(exc)

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(500):
        compile_with_fallback(lambda x: x, name="mine")
    done.set()
    looking.join()
    gc.collect()
    assert (errors, mine()) == ([], [])
