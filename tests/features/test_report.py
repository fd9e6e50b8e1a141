"""`report()`: all live functions, in a terminal, in a notebook and as a dictionary."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import itertools
import json
import re
import sys
import threading
from typing import Any

import pytest
import torch
from rich.console import Console

import compile_retry
from compile_retry import RetryPolicy, compile_repeated_blocks, compile_with_fallback, compiled_function
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
    assert lines["function"][:6] == ["function", "state", "next", "attempt", "calls", "compiled"]
    assert lines["untouched"][1:3] == ["pending", "0"]
    assert lines["failed"][1:] == ["fallback", "due", "in", "30", "s", "1", "0", "0", "1", "1", "1", "0", "0.0", "s"]
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
    assert row.split()[1:12] == ["fallback", "due", "in", "30", "s", "1", "0", "0", "1", "1", "1"]
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
    assert report.as_dict() == {"active": True, "functions": []}
    off = dataclasses.replace(report, active=False)
    out.truncate(out.seek(0))
    Console(file=out, width=120).print(off)
    notice = "compile_retry is switched off: decorated functions are stock torch.compile"
    assert str(off) == out.getvalue().strip() == f"compile_retry: no decorated functions\n{notice}"
    assert notice in off._repr_html_()


def test_functions_on_which_the_library_has_no_effect() -> None:
    """The reason is below the table, in every format."""
    fn, out = compile_with_fallback(times(2), backend=Compiler(), name="train_step"), io.StringIO()
    with torch.compiler.set_stance("force_eager"):
        fn(X)
    report = compile_retry.report()
    reason = "calls run eagerly under torch.compiler.set_stance('force_eager')"
    assert report.functions[-1].bypassed == (reason,)
    assert report.as_dict()["functions"][-1]["bypassed"] == [reason]
    assert f"\ntrain_step: bypassed: {reason}" in str(report)
    Console(file=out, width=160).print(report)
    assert f"train_step: bypassed: {reason}" in out.getvalue()
    assert "<p>train_step: bypassed: calls run eagerly" in report._repr_html_()


def times(k: int) -> Any:
    return lambda x: x * k


def shared(name: str) -> list[Any]:
    """Return three functions that share, two of which have been called. The first call failed."""
    compiler, policy = Compiler(first(1)), RetryPolicy(wait=30, clock=FakeClock())
    functions = [compile_with_fallback(times(k), backend=compiler, policy=policy, name=name) for k in range(3)]
    functions[0](X), functions[0](X), functions[2](X)
    return functions


def block_model(name: str, n: int) -> torch.nn.Module:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(4, 2, 4) for _ in range(n))
    return compile_repeated_blocks(model, backend="eager", name=name)


def cells(text: object, name: str) -> list[list[str]]:
    """Return the words of the row of this name and of the rows below it that are indented."""
    lines = itertools.dropwhile(lambda line: not line.startswith(f"{name} "), str(text).splitlines())
    row = next(lines)
    return [line.split() for line in (row, *itertools.takewhile(lambda line: line.startswith("  "), lines))]


SECONDS = "0.0", "s"
TOGETHER = ["x3", "fallback", "due", "in", "30", "s", *"3003110", *SECONDS]
EACH = [["#1", *"2002110", *SECONDS], ["#2", *"0000000", *SECONDS], ["#3", *"1001000", *SECONDS]]


def test_functions_that_share_have_one_row() -> None:
    """Its counters are the sums of theirs, and their last failure is shown once."""
    functions, text = shared("one_row"), str(compile_retry.report())
    assert cells(text, "one_row") == [["one_row", *TOGETHER]]
    assert text.count("one_row x3: attempt 1 failed in call 1") == text.count("one_row") - 1 == 1
    del functions


def test_an_expanded_report() -> None:
    """Below the row of functions that share, each has a row of its own with its own counters."""
    functions, model = shared("expanded"), block_model("TestBlock", 20)
    report = compile_retry.report(expanded=True)
    assert cells(report, "expanded") == [["expanded", *TOGETHER], *EACH]
    title, *blocks = cells(report, "TestBlock")
    assert " ".join(title[:5]) == "TestBlock x20 (layers.0 ... layers.19)"
    assert [row[0] for row in blocks] == [f"layers.{i}" for i in range(20)]
    assert len(cells(compile_retry.report(), "TestBlock")) == 1
    del functions, model


@pytest.mark.parametrize("expanded", [False, True])
def test_rich_with_functions_that_share(expanded: bool) -> None:
    """Rich has the same rows."""
    functions, out = shared(f"rich_{expanded}"), io.StringIO()
    Console(file=out, width=140).print(compile_retry.report(expanded=expanded))
    text = re.sub("(?m)^ | +$", "", out.getvalue())  # the table's margin
    assert cells(text, f"rich_{expanded}") == [[f"rich_{expanded}", *TOGETHER], *(EACH if expanded else ())]
    del functions


@pytest.mark.parametrize("expanded", [False, True])
def test_html_with_functions_that_share(expanded: bool) -> None:
    """Their rows are in a table that opens below the row for all. In an expanded report it is open."""
    name = f"html_{expanded}"
    functions, page = shared(name), compile_retry.report(expanded=expanded)._repr_html_()
    _, row, rest = re.split(f"(<tr><td[^>]*>{name} x3</td>.*?</tr>)", page, maxsplit=1)
    assert re.sub("<[^>]*>", " ", row).split() == [name, *TOGETHER]
    tag, summary, table = re.findall("<details[^>]*>|<summary>.*?</summary>|<table>.*?</table>", rest)[:3]
    assert (tag, summary) == ("<details open>" if expanded else "<details>", "<summary>3 functions</summary>")
    rows = [re.sub("<[^>]*>", " ", row).split() for row in re.findall("<tr><td.*?</tr>", table)]
    assert rows == EACH
    del functions


def test_functions_that_share_in_the_dictionary() -> None:
    """Each has its record, with its own counters, its module's name, and the number of the row in `groups`."""
    functions, model = shared("in_the_dictionary"), block_model("InTheDictionary", 2)
    report = compile_retry.report()
    rows = [row for row in report.as_dict()["functions"] if row["name"] == "in_the_dictionary"]
    assert [row["stats"] for row in rows] == [fn.stats.as_dict() for fn in functions]
    assert [(row["fqn"], row["state"]) for row in rows] == [("", "fallback")] * 3
    (number,) = {row["group"] for row in rows}
    group = report.groups[number]
    assert (group.name, group.state.value, group.stats.calls) == ("in_the_dictionary x3", "fallback", 3)
    blocks = [row for row in report.as_dict()["functions"] if row["name"] == "InTheDictionary"]
    assert [row["fqn"] for row in blocks] == ["layers.0", "layers.1"]
    assert [report.groups[row["group"]].name for row in blocks] == ["InTheDictionary x2 (layers.0, layers.1)"] * 2
    del model


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
