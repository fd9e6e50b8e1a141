"""The library switched off, and calls on which it has no effect."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from compile_retry import (
    CompileState,
    RetryPolicy,
    compile_with_fallback,
    compiled_function,
    install,
    report,
    set_active,
    set_strict,
)
from compile_retry.events import Bypassed, Event
from support import Compiler, first, full_disk

X = torch.linspace(-1, 1, 6)
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
OFF = "the library is switched off"


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


@pytest.fixture
def reasons(compile_events: list[Event]) -> Iterator[list[str]]:
    """The reasons told so far. They are read at the end of the test."""
    found: list[str] = []
    yield found
    assert [event.reason for event in compile_events if isinstance(event, Bypassed)] == found


def test_switched_off_is_stock(reasons: list[str]) -> None:
    """A failure raises as in stock, and nothing is counted. Switched on again, the function goes on as before."""
    compiler = Compiler(first(2))
    fn = compile_with_fallback(sine, backend=compiler, policy=EVERY_CALL)
    torch.testing.assert_close(fn(X), sine(X))
    assert fn.state is CompileState.FALLBACK
    with set_active(False):
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="No space left"):
            fn(X)
        torch.testing.assert_close([fn(X), fn(X)], [sine(X)] * 2)
        assert not report().active
    assert (compiler.asked, fn.stats.calls, fn.state) == (3, 1, CompileState.FALLBACK)
    torch.testing.assert_close(fn(X), sine(X))
    assert (fn.state, fn.stats.calls, fn.stats.recoveries) == (CompileState.COMPILED, 2, 1)
    reasons.append(f"{OFF}, so this is stock torch.compile")


def test_switched_off_from_the_first_call(reasons: list[str]) -> None:
    """As many compiles as in stock, keyword arguments included; then the library compiles for itself."""
    compiler = Compiler()
    fn = compile_with_fallback(sine, backend=compiler, options={}, mode=None)
    with set_active(False):
        torch.testing.assert_close([fn(x=X), fn(x=X)], [sine(X)] * 2)
    assert (compiler.asked, fn.state) == (1, CompileState.PENDING)
    fn(X)
    assert (compiler.asked, fn.stats.compiled_calls) == (2, 1)
    reasons.append(f"{OFF}, so this is stock torch.compile")


def test_modules_and_methods_switched_off() -> None:
    """A module compiled in place, a decorated method, and what ``torch.compile`` returns after `install`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 2), torch.nn.ReLU())
    expected = model(X)
    backend = Compiler()

    class Step:
        @compile_with_fallback(backend=backend)
        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with install():
        installed = torch.compile(model, backend=backend)
    with set_active(False):
        torch.testing.assert_close(installed(X), expected)
        torch.testing.assert_close(Step().step(X), X + 1)
        compile_with_fallback(model, backend=backend)
        torch.testing.assert_close(model(X), expected)
    assert backend.asked == 3
    assert [compiled_function(fn).stats.calls for fn in (installed, model, Step.step)] == [0, 0, 0]


def test_set_active_as_a_function() -> None:
    """As a plain call it changes the setting for good; as a context manager it nests."""
    fn = compile_with_fallback(sine, backend=Compiler(lambda inputs: full_disk()), policy=EVERY_CALL)
    set_active(False)
    with set_active(True):
        fn(X)
        with set_active(False):
            pass
        fn(X)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        fn(X)
    set_active(True)
    fn(X)
    with pytest.raises(TypeError, match="takes True or False, not 0"):
        set_active(0)  # type: ignore[arg-type]  # the wrong type, on purpose


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("value", ["off", "0", "No", "install,off"])
def test_switched_off_by_the_environment(value: str) -> None:
    """Nothing is installed, and decorated functions are stock."""
    program = """
import torch
stock = torch.compile
import compile_retry

def broken(*args):
    raise OSError("No space left")

assert torch.compile is stock
fn = compile_retry.compile_with_fallback(torch.sin, backend=broken)
try:
    fn(torch.ones(2))
except torch._dynamo.exc.BackendCompilerFailed:
    print(compile_retry.report())
"""
    environment = {**os.environ, "COMPILE_RETRY": value}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert "compile_retry is switched off: decorated functions are stock torch.compile\n" in ended.stdout
    assert f"sin: bypassed: {OFF}" in ended.stderr
    installs = "COMPILE_RETRY switches the library off, so torch.compile stays as it is"
    assert ended.stderr.count(installs) == value.count("install")


def test_stances(reasons: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Told once, whatever the number of calls and functions; in the report for each function."""
    caplog.set_level(logging.INFO, logger="compile_retry")
    functions = [compile_with_fallback(sine, backend=Compiler(), name=name) for name in ("first", "second")]
    with torch.compiler.set_stance("force_eager"):
        for fn in functions * 2:
            torch.testing.assert_close(fn(X), sine(X))
    reasons += ["calls run eagerly under torch.compiler.set_stance('force_eager')"] * 2
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]  # the second one says the same
    assert f"second: bypassed: {reasons[0]}" in str(report())
    for fn in functions:
        torch.testing.assert_close(fn(X), sine(X))
        assert (fn.state, fn.stats.compiled_calls, fn.stats.eager_calls) == (CompileState.COMPILED, 1, 2)


def test_a_stance_that_runs_compiled_code(reasons: list[str]) -> None:
    """Only a call that finds no compiled code is one on which the library has no effect."""
    fn = compile_with_fallback(sine, backend=Compiler(), dynamic=False)
    fn(X)
    with torch.compiler.set_stance("eager_on_recompile"):
        fn(X)
        assert fn.stats.compiled_calls == 2
        fn(X[:3])
    assert fn.stats.eager_calls == 1
    reasons.append("calls run eagerly under torch.compiler.set_stance('eager_on_recompile')")


def test_dynamo_disabled(reasons: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run eagerly, and count as that."""
    fn = compile_with_fallback(sine, backend=Compiler())
    with torch._dynamo.config.patch(disable=True):
        torch.testing.assert_close([fn(X), fn(X)], [sine(X)] * 2)
    reasons.append("TORCH_COMPILE_DISABLE=1 or torch._dynamo.config.disable is set, so calls run eagerly")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    another = compile_with_fallback(sine, backend=Compiler())
    torch.testing.assert_close([another(X), another(X)], [sine(X)] * 2)
    reasons.append("TORCHDYNAMO_DISABLE=1 is set, so calls run eagerly")
    for each in (fn, another):
        assert (each.state, each.stats.eager_calls) == (CompileState.PENDING, 2)


def test_a_function_without_tensors(reasons: list[str]) -> None:
    """It has no graph to compile, which is no reason to say anything."""
    fn = compile_with_fallback(lambda n: n + 1, backend=Compiler())
    assert (fn(1), fn(2)) == (2, 3)
    assert fn.stats.eager_calls == 2
    assert reasons == []


def test_inside_an_outer_compile(reasons: list[str]) -> None:
    """Told once for a function and for a method, and the outer function has a single graph."""
    fn = compile_with_fallback(sine, backend=Compiler(), name="inner")

    class Step:
        @compile_with_fallback
        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x.cos()

    step, backend = Step(), Compiler()

    @torch.compile(backend=backend, fullgraph=True)
    def outer(x: torch.Tensor) -> torch.Tensor:
        return fn(x) + step.step(x) + fn(x)

    for x in (X, X, X[:3]):
        torch.testing.assert_close(outer(x), sine(x) + x.cos() + sine(x))
    assert backend.asked == 2
    reasons += ["another torch.compile traces it, and compiles it as a part of its own function"] * 2
    assert f"inner: bypassed: {reasons[0]}" in str(report())
    torch.testing.assert_close(fn(X), sine(X))
    assert fn.state is CompileState.COMPILED


def test_strict_mode_switched_off() -> None:
    """Strict mode makes no difference to what is stock."""
    fn = compile_with_fallback(sine, backend=Compiler(first(1)))
    with set_strict(True), set_active(False), pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        fn(X)
    assert (fn(X).tolist(), fn.stats.failures) == (sine(X).tolist(), 0)
