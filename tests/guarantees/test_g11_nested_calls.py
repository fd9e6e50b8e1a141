"""G11: a decorated function that calls itself where Dynamo does not trace. Each of these calls is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compile_retry import CompiledFunction, CompileState, RetryPolicy, compile_with_fallback
from compile_retry.events import AttemptStarted
from compile_retry.testing import FakeClock, record_events
from support import Compiler, first, full_disk, rows

X = torch.ones(3)


Step = CompiledFunction[[torch.Tensor, int], torch.Tensor]


def nested(between: Callable[[torch.Tensor], torch.Tensor] = lambda y: y, **options: Any) -> Step:
    """Decorate a step that calls itself `depth` times, between its two graphs. `between` takes the result."""

    def step(x: torch.Tensor, depth: int) -> torch.Tensor:
        x = x + 1
        if depth:
            x = again(x, depth - 1)
        return x.sin()

    def call(x: torch.Tensor, depth: int) -> torch.Tensor:
        return between(fn(x, depth))

    fn = compile_with_fallback(step, **options)
    again = torch.compiler.disable(call)
    return fn


def test_failures_and_a_recovery() -> None:
    """Each call has eager's result and is counted, and the function recovers."""
    fn = nested(backend=Compiler(first(2)), policy=RetryPolicy(wait=None, wait_calls=1))
    for _ in range(6):
        torch.testing.assert_close(fn(X, 2), (X + 3).sin().sin().sin())
    assert (fn.stats.calls, fn.state) == (18, CompileState.COMPILED)


def test_a_call_within_a_call() -> None:
    """Graphs of the nested call count for the outer call too, and later attempts have the outer call's number."""
    compiler = Compiler(lambda inputs: full_disk() if compiler.asked == 3 else None)
    fn = nested(backend=compiler, policy=RetryPolicy(wait=None, wait_calls=2))
    with record_events(kinds={"attempt started"}) as events:
        torch.testing.assert_close(fn(X, 1), (X + 2).sin().sin())
    started = [(event.call, event.graph) for event in events if isinstance(event, AttemptStarted)]
    assert started == [(1, 1), (2, 1), (1, 3)]
    assert (fn.stats.compiled_calls, fn.stats.mixed_calls) == (1, 1)
    assert fn.last_failure is not None
    assert fn.last_failure.call == 1
    assert fn.next_retry is not None
    assert fn.next_retry.calls == 1
    fn(X, 1)  # the nested call, which ends first, does not end the retry of the outer one
    assert (fn.stats.compiled_calls, fn.stats.recoveries, fn.state) == (3, 1, CompileState.COMPILED)


def test_a_new_shape_after_a_nested_call() -> None:
    """After hundreds of calls too, what comes after the nested call counts for the outer one."""
    compiler, length = Compiler(rows(2)), 3
    fn = nested(lambda y: y[:length], backend=compiler, dynamic=False, policy=RetryPolicy(wait=1000))
    for _ in range(300):
        fn(X, 1)
    assert fn.stats.compiled_calls == fn.stats.calls == 600
    length = 2
    torch.testing.assert_close(fn(X, 1), (X + 2).sin().sin()[:2])
    assert fn.last_failure is not None
    assert fn.last_failure.call == 601
    assert (fn.stats.compiled_calls, fn.stats.mixed_calls) == (601, 1)


def test_a_call_within_a_held_off_call() -> None:
    """The nested call becomes due and compiles while the outer one runs eagerly, so only one counts as compiled."""
    clock = FakeClock()

    def step(x: torch.Tensor, depth: int) -> torch.Tensor:
        if depth:
            clock.advance(100)
            x = fn(x, depth - 1)
        return x.sin()

    fn = compile_with_fallback(step, backend=Compiler(first(1)), policy=RetryPolicy(wait=100, clock=clock))
    for _ in range(100):
        fn(X, 0)
    with torch.inference_mode():
        torch.testing.assert_close(fn(X, 1), X.sin().sin())
    assert (fn.stats.compiled_calls, fn.stats.calls) == (1, 102)


def test_a_call_within_a_probe() -> None:
    """A call nested in the probe runs the code that the probe compiles, however long the hold-off was."""
    fn = nested(backend=Compiler(first(1)), policy=RetryPolicy(wait=None, wait_calls=152))
    for _ in range(76):  # call 1 fails, so call 153 is due, and 154 runs within it
        fn(X, 1)
    held_off = fn.stats
    assert (held_off.calls, held_off.compiled_calls, held_off.attempts) == (152, 0, 1)
    torch.testing.assert_close(fn(X, 1), (X + 2).sin().sin())
    assert (fn.stats.compiled_calls, fn.stats.eager_calls, fn.stats.recoveries) == (2, held_off.eager_calls, 1)
