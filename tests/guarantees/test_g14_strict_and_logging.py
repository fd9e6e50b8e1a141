"""Strict mode, and G14: one log line per transition, never one per call."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import tenacity
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, set_strict
from compile_retry._switches import is_strict
from compile_retry.events import Event, register_hook
from compile_retry.testing import fail_compiles, record_events
from support import Compiler, first, full_disk

X = torch.ones(3)
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def test_strict_raises_at_once() -> None:
    """Every failed attempt raises and nothing is held off. After the block, failures fall back again."""
    compiler, raised = Compiler(first(3)), list[object]()
    fn = compile_with_fallback(sine, backend=compiler, policy=RetryPolicy(wait=1e9))
    with set_strict(True):
        for _ in range(2):
            with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="No space left on device") as info:
                fn(X)
            raised.append(info)  # an exception that is kept blocks no other attempt
    assert (compiler.asked, fn.stats.failures, fn.next_retry) == (2, 2, None)
    torch.testing.assert_close(fn(X), X.sin())
    assert (fn.state, fn.stats.failures) == (CompileState.FALLBACK, 3)


def test_strict_failures_do_not_wait() -> None:
    """A later recovery does not wait for a shape that has failed in strict mode."""
    compiler = Compiler(first(2))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=EVERY_CALL)
    with set_strict(True), pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        fn(X)
    for _ in range(2):
        fn(torch.ones(4))
    assert (fn.stats.failures, fn.stats.recoveries, fn.state) == (2, 1, CompileState.COMPILED)


def test_set_strict_as_a_function() -> None:
    """As a plain call it sets the mode for good; as a context manager it nests."""
    fn = compile_with_fallback(sine, backend=Compiler(lambda inputs: full_disk()), policy=EVERY_CALL)
    set_strict(True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        fn(X)
    with set_strict(False):
        fn(X)
        with set_strict(True):
            pass
        fn(X)
    set_strict(False)
    set_strict(True)
    fn.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        fn(X)
    with pytest.raises(TypeError, match="takes True or False, not 1"):
        set_strict(1)  # type: ignore[arg-type]  # the wrong type, on purpose


@pytest.mark.parametrize(
    ("value", "strict"), [("strict", True), ("STRICT,install", True), ("yes", False), ("", False), ("nonsense", False)]
)
@pytest.mark.usefixtures("measured")
def test_strict_from_the_environment(value: str, strict: bool) -> None:
    """COMPILE_RETRY=strict enables strict mode from the start. A wrong value is a warning that names the right ones."""
    code = f"from {is_strict.__module__} import is_strict; print(is_strict())"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "COMPILE_RETRY": value},
        check=True,
        capture_output=True,
        text=True,
    )
    assert ended.stdout.strip() == str(strict)
    warning = "COMPILE_RETRY=nonsense is ignored; it must be on, off, strict, install, or strict,install\n"
    assert ended.stderr.count(warning) == (value == "nonsense")


@pytest.mark.usefixtures("measured")
def test_strict_from_its_own_variable() -> None:
    """COMPILE_RETRY_STRICT=1 does the same."""
    code = f"from {is_strict.__module__} import is_strict; print(is_strict())"
    environment = {**os.environ, "COMPILE_RETRY_STRICT": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert ended.stdout == "True\n"


def test_one_line_per_transition(caplog: pytest.LogCaptureFixture) -> None:
    """A failure's line says what failed, what runs now, and when the next attempt is due. A recovery has a line too."""
    policy = RetryPolicy(wait=None, wait_calls=10, stop=tenacity.stop_after_attempt(3))
    fn = compile_with_fallback(sine, backend=Compiler(first(2)), policy=policy, name="train_step")
    with caplog.at_level(logging.DEBUG, logger="compile_retry"):
        for _ in range(100):
            fn(X)
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "compile_retry"]
    assert [level for level, _ in lines] == ["WARNING", "WARNING", "INFO", "WARNING"]
    assert lines[0][1].startswith(
        "train_step: attempt 1 failed in call 1: OSError: [Errno 28] No space left on device, compiling sine ("
    )
    assert lines[0][1].endswith("running eagerly, next attempt in 10 calls")
    assert "attempt 2 failed in call 11" in lines[1][1]
    assert lines[3][1].startswith("train_step: recovered in call 21, after 2 failed attempts and ")


def test_the_level_of_an_event_is_that_of_its_line(caplog: pytest.LogCaptureFixture) -> None:
    """Events without a line have no level. Hooks are called after the line is written, the function's own first."""
    fn = compile_with_fallback(sine, backend=Compiler(first(1)), policy=EVERY_CALL, name="f")
    told = list[tuple[str, Event, int]]()

    def lines() -> list[tuple[int, str]]:
        return [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "compile_retry"]

    fn.register_hook(lambda event: told.append(("one", event, len(lines()))))
    with (
        caplog.at_level(logging.DEBUG, logger="compile_retry"),
        register_hook(lambda event: told.append(("all", event, len(lines())))),
    ):
        for _ in range(3):
            fn(X)
        fn(torch.ones(2, 2))
    events = [event for _, event, _ in told[::2]]
    assert [e.kind for e in events if e.level is None] == [
        *["attempt started", "retry scheduled"],
        *["attempt started"],  # the first code has a line
        *["attempt started", "compiled"],
    ]
    assert [(e.level, f"f: {e.message}") for e in events if e.level is not None] == lines()
    assert [whose for whose, _, _ in told] == ["one", "all"] * len(events)
    assert [written for _, event, written in told if event.kind == "failed"] == [1, 1]


def test_giving_up_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """The line says how to attempt again."""
    policy = RetryPolicy(wait=None, wait_calls=1, stop=tenacity.stop_after_attempt(1))
    fn = compile_with_fallback(sine, backend=Compiler(first(9)), policy=policy)
    with caplog.at_level(logging.DEBUG, logger="compile_retry"):
        for _ in range(10):
            fn(X)
    (record,) = [r for r in caplog.records if r.name == "compile_retry"]
    assert record.levelname == "ERROR"
    assert record.getMessage().endswith("giving up, running eagerly until reset() or retry_now()")


def test_faults_by_function_and_graph() -> None:
    """`fail_compiles` selects attempts by function, by graph and by number."""

    def three_graphs(x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        x = x.exp()
        torch._dynamo.graph_break()
        return x.cos()

    a = compile_with_fallback(three_graphs, backend=Compiler(), policy=EVERY_CALL, name="a")
    b = compile_with_fallback(three_graphs, backend=Compiler(), policy=EVERY_CALL, name="b")
    with fail_compiles(OSError(5, "Input/output error"), function="a", graph=2, times=2) as faults:
        for _ in range(4):
            torch.testing.assert_close(a(X), b(X))
    assert (faults.failed, a.stats.failures, b.stats.failures) == (2, 2, 0)
    assert a.last_failure is not None
    assert a.last_failure.message == "[Errno 5] Input/output error"
    assert faults.attempts == 3
    assert a.state is CompileState.COMPILED
    with pytest.raises(ValueError, match="times must be at least 1, not 0"), fail_compiles(times=0):
        pass
    with pytest.raises(ValueError, match="graph must be at least 1, not 0"), fail_compiles(graph=0):
        pass


def test_recorded_events_by_function() -> None:
    """`record_events` can record one function only."""
    a = compile_with_fallback(sine, backend=Compiler(), name="a")
    b = compile_with_fallback(lambda x: x.cos(), backend=Compiler(), name="b")
    with record_events("b") as events:
        a(X), b(X)
    assert [(e.function, e.kind) for e in events] == [("b", "attempt started"), ("b", "compiled")]
