"""G2, G3: a lost accelerator context surfaces as the device's own error, and nothing is attempted after it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.events import DeviceLost
from compile_retry.testing import FakeClock, record_events
from support import Compiler, dynamo_fails_in, first

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
X = torch.ones(3)


def lost() -> torch.AcceleratorError:
    return torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def assert_given_up(fn: Any) -> None:
    """Nothing is counted as a failure, and no retry will come. The function itself still runs."""
    assert (fn.state, fn.next_retry, fn.stats.failures) == (CompileState.GAVE_UP, None, 0)
    for x in (X, torch.ones(5), torch.ones(2, 2)):
        assert torch.equal(fn(x), x.sin())


def test_noticed_while_tracing(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo wraps the error in InternalTorchDynamoError; the caller gets the error itself. The log has one line."""
    error, compiler = lost(), Compiler()
    fn = compile_with_fallback(sine, backend=compiler, policy=EVERY_CALL)
    with (
        dynamo_fails_in("sine", error) as failed,
        record_events() as events,
        caplog.at_level(logging.INFO, "compile_retry"),
    ):
        with pytest.raises(torch.AcceleratorError) as caught:
            fn(X)
        assert caught.value is error
        assert_given_up(fn)
    assert (len(failed), compiler.asked) == (1, 0)
    (event,) = events
    assert isinstance(event, DeviceLost)
    assert (event.error, event.state) == (
        "torch.AcceleratorError: CUDA error: device-side assert triggered",
        CompileState.GAVE_UP,
    )
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "context is lost in call 1: torch.AcceleratorError: CUDA error: device-side assert" in record.getMessage()


def test_noticed_by_the_compiler() -> None:
    """The error leaves the backend, which Dynamo wraps as well."""
    error = lost()
    compiler = Compiler(first(1, lambda: error))
    fn = compile_with_fallback(sine, backend=compiler, policy=EVERY_CALL)
    with pytest.raises(torch.AcceleratorError) as caught:
        fn(X)
    assert caught.value is error
    assert_given_up(fn)
    assert compiler.asked == 1


def test_noticed_by_a_retry() -> None:
    """The episode ends in giving up: it has no next retry, whatever the clock says."""
    clock, errors = FakeClock(), iter([OSError(28, "No space left on device"), lost()])
    compiler = Compiler(lambda inputs: next(errors, None))
    fn = compile_with_fallback(sine, backend=compiler, policy=RetryPolicy(wait=10, clock=clock))
    fn(X)
    clock.advance(10)
    with pytest.raises(torch.AcceleratorError):
        fn(X)
    assert (fn.state, fn.next_retry, fn.stats.failures) == (CompileState.GAVE_UP, None, 1)
    for _ in range(100):
        clock.advance(1000)
        fn(X)
    assert compiler.asked == 2


def test_noticed_by_running_code() -> None:
    """If compiled code raises the error, it surfaces, and other arguments are not attempted any more."""
    fails = [lost()]

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if fails:
                raise fails[0]
            return graph_module.forward(*args)

        return run

    fn = compile_with_fallback(sine, backend=backend, policy=EVERY_CALL, dynamic=False)
    with record_events() as events:
        for _ in range(2):
            with pytest.raises(torch.AcceleratorError) as caught:
                fn(X)
            assert caught.value is fails[0]
        fails.clear()
        assert_given_up(fn)
    assert [event.kind for event in events] == ["attempt started", "compiled", "device lost"]
    assert fn.stats.attempts == 1


def test_caught_by_the_program() -> None:
    """A program that catches the error gets no attempt either, in the rest of the call."""
    compiler = Compiler(first(1, lost))

    def part(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def program(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            try:
                torch._dynamo.graph_break()  # in a loop, so that Dynamo leaves this frame to Python
                return part(x)
            except torch.AcceleratorError:  # noqa: PERF203  # the loop is the point
                continue
        raise AssertionError("unreachable")

    fn = compile_with_fallback(program, backend=compiler, policy=EVERY_CALL)
    assert torch.equal(fn(X), X.sin())
    assert_given_up(fn)
    assert compiler.asked == 1


def test_without_a_frame() -> None:
    """Under a stance that goes round the frame callback, the caller gets the error itself as well."""
    error = lost()
    fn = compile_with_fallback(sine, backend=Compiler(first(1, lambda: error)), policy=EVERY_CALL)
    with torch.compiler.set_stance("eager_then_compile"):
        fn(X)
        with pytest.raises(torch.AcceleratorError) as caught:
            fn(torch.ones(4))
    assert caught.value is error
    assert_given_up(fn)


def test_wrapped_by_the_program() -> None:
    """An exception of the program that has such a cause reaches the caller as it is."""

    def program(x: torch.Tensor) -> torch.Tensor:
        try:
            raise lost()
        except torch.AcceleratorError as exc:
            raise RuntimeError("step 7") from exc

    fn = compile_with_fallback(torch.compiler.disable(program), backend="eager", policy=EVERY_CALL)
    with pytest.raises(RuntimeError, match="step 7"):
        fn(X)
    assert fn.state is CompileState.GAVE_UP


def test_a_new_start() -> None:
    """After reset(), the next call attempts again, as it does after any other failure."""
    fn = compile_with_fallback(sine, backend=Compiler(first(1, lost)), policy=EVERY_CALL)
    with pytest.raises(torch.AcceleratorError):
        fn(X)
    fn.reset()
    fn(X)
    assert (fn.state, fn.stats.compiled_calls) == (CompileState.COMPILED, 1)


@pytest.mark.parametrize("message", ["out of memory", "operation not permitted when stream is capturing"])
def test_errors_that_the_context_survives(message: str) -> None:
    """Some errors of that class leave the context intact. They are failures like others."""
    error = torch.AcceleratorError(f"CUDA error: {message}")
    fn = compile_with_fallback(sine, backend=Compiler(first(1, lambda: error)), policy=EVERY_CALL)
    assert torch.equal(fn(X), X.sin())
    assert (fn.state, fn.stats.failures) == (CompileState.FALLBACK, 1)
    fn(X)
    assert (fn.state, fn.stats.recoveries) == (CompileState.COMPILED, 1)
