"""Failures inside Dynamo, before any backend: in the entry frame, after a graph break, in a nested frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from support import Compiler, dynamo_fails_in, first

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
X = torch.ones(3)


def nested(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    torch._dynamo.graph_break()
    return y + 1


def step(x: torch.Tensor, log: list[str]) -> torch.Tensor:
    log.append("first")
    y = nested(x.sin())
    torch._dynamo.graph_break()
    log.append("second")
    return y.cos()


@pytest.mark.parametrize("frame", ["step", "nested", "resume_in_step", "resume_in_nested"])
@pytest.mark.parametrize("wait", [1, 3])
def test_a_frame_fails_in_dynamo(frame: str, wait: int) -> None:
    """The step completes, everything in it happens once, and a retry compiles the frame."""
    fn = compile_with_fallback(step, backend=Compiler(), policy=RetryPolicy(wait=None, wait_calls=wait))
    with dynamo_fails_in(frame, MemoryError("simulated")) as failed:
        for _ in range(7):
            log: list[str] = []
            torch.testing.assert_close(fn(X, log), step(X, []))
            assert log == ["first", "second"]
    # Two of the due moments may go to frames that were turned away in the meantime.
    assert (5 if wait == 1 else 2) <= fn.stats.failures == len(failed) <= (7 if wait == 1 else 3)
    assert fn.last_failure is not None
    error_type, stage = fn.last_failure.error_type, fn.last_failure.stage
    assert (fn.state, error_type, stage) == (CompileState.FALLBACK, "builtins.MemoryError", "trace")
    for _ in range(2 * wait + 3):
        fn(X, [])
    assert fn.state is CompileState.COMPILED
    before = fn.stats.compiled_calls
    fn(X, [])
    assert fn.stats.compiled_calls == before + 1


def test_a_new_shape_fails_in_dynamo() -> None:
    """The compiled shape stays compiled, and other shapes are still attempted."""
    compiler = Compiler()
    fn = compile_with_fallback(
        lambda x: x.sin(), backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=2)
    )
    fn(X)
    with dynamo_fails_in("lambda", MemoryError()):
        for n in (4, 4, 5, 4, 4):
            x = torch.ones(n)
            torch.testing.assert_close(fn(x), x.sin())
            before = compiler.ran
            fn(X)
            assert compiler.ran == before + 1
    for n in (4, 5, 4, 5, 4, 5):
        fn(torch.ones(n))
    assert fn.state is CompileState.COMPILED


def test_dynamo_fails_after_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure has the right stage, and the code that was not used is compiled again."""
    build, left = torch._dynamo.guards.CheckFunctionManager.__init__, [1]

    def failing_build(*args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise MemoryError
        build(*args, **kwargs)

    monkeypatch.setattr(torch._dynamo.guards.CheckFunctionManager, "__init__", failing_build)
    compiler = Compiler()
    fn = compile_with_fallback(lambda x: x.sin(), backend=compiler, policy=EVERY_CALL)
    for _ in range(3):
        torch.testing.assert_close(fn(X), X.sin())
    assert fn.last_failure is not None
    assert (fn.last_failure.stage, fn.last_failure.error_type) == ("trace", "builtins.MemoryError")
    assert (compiler.asked, fn.stats.failures, fn.stats.compiled_calls, fn.stats.recoveries) == (2, 1, 2, 1)


def test_a_frame_that_dynamo_can_never_compile() -> None:
    """The frame runs eagerly without a retry, and from the next call on the frames below it are compiled."""
    compiler = Compiler()
    fn = compile_with_fallback(step, backend=compiler, policy=EVERY_CALL)
    with dynamo_fails_in("step", torch._dynamo.exc.UncapturedHigherOrderOpError("cannot")) as failed:
        for _ in range(4):
            torch.testing.assert_close(fn(X, []), step(X, []))
    assert len(failed) == fn.stats.failures == 1
    assert compiler.ran == 6
    assert (fn.state, fn.stats.eager_calls, fn.stats.mixed_calls) == (CompileState.GAVE_UP, 1, 3)


def test_a_failure_that_was_forgotten_before_it_could_be_withdrawn() -> None:
    """The program resets the function in the middle of a step and then raises."""

    def trouble() -> None:
        fn.reset()
        raise ValueError("the program's")

    def bad(x: torch.Tensor) -> torch.Tensor:
        torch.compiler.disable(trouble)()
        return x

    fn = compile_with_fallback(bad, backend=Compiler(), policy=EVERY_CALL)
    with dynamo_fails_in("bad", MemoryError()), pytest.raises(ValueError, match="the program's"):
        fn(X)
    assert (fn.stats.failures, fn.state, fn.next_retry) == (0, CompileState.PENDING, None)


@pytest.mark.parametrize("where", ["backend", "dynamo"])
def test_the_user_suppresses_errors(where: str) -> None:
    """With `suppress_errors`, Dynamo would skip the function for good. It is retried anyway."""
    compiler = Compiler(first(3) if where == "backend" else lambda inputs: None)
    fn = compile_with_fallback(lambda x: x.sin(), backend=compiler, policy=RetryPolicy(wait=None, wait_calls=2))
    times = 3 if where == "dynamo" else 0
    with torch._dynamo.config.patch(suppress_errors=True), dynamo_fails_in("lambda", MemoryError(), times=times):
        for _ in range(10):
            torch.testing.assert_close(fn(X), X.sin())
        assert torch._dynamo.config.suppress_errors
    assert (fn.stats.failures, fn.stats.compiled_calls, fn.state) == (3, 4, CompileState.COMPILED)
