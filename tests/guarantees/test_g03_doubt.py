"""G3: a failure at any stage is in doubt until its call is over, and then counts as a compile failure or not at all."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, set_strict
from compile_retry.testing import record_events
from support import Compiler, dynamo_fails_in, first, full_disk

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
X = torch.ones(3)


class Trouble(Exception):
    pass


def step_with(outside: Callable[[], object]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a step that calls `outside` between its two graphs."""
    call = torch.compiler.disable(outside)

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        call()
        return y.cos()

    return step


def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.softmax(x, dim=dim)


def largest(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.amax(x, dim=dim)


@pytest.mark.parametrize("function", [softmax, largest])
@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.long), "aot_eager"])
def test_an_index_that_only_the_backend_rejects(function: Callable[..., torch.Tensor], backend: str) -> None:
    """An invalid index raises as in eager, nothing is counted or held off, and the next valid call is compiled."""
    fn = compile_with_fallback(function, backend=backend, policy=RetryPolicy(wait=3600))
    with pytest.raises(IndexError) as ours:
        fn(X, 10)
    with pytest.raises(IndexError) as eager:
        function(X, 10)
    assert ours.value.args == eager.value.args
    assert (fn.stats.failures, fn.last_failure, fn.next_retry) == (0, None, None)
    torch.testing.assert_close(fn(X, 0), function(X, 0))
    assert fn.stats.compiled_calls >= 1  # aot_eager compiles some of these graphs, which then raise when they run
    assert fn.state is CompileState.COMPILED


@pytest.mark.parametrize("stage", ["backend", "trace"])
@pytest.mark.parametrize("error", [Trouble("the program's", 7), KeyboardInterrupt("the program's", 7)], ids=repr)
def test_a_program_that_raises_after_a_failure(stage: str, error: BaseException) -> None:
    """If the program raises, nothing is reported, counted or held off, and the next call attempts."""
    raises = True

    def check() -> None:
        if raises:
            raise error

    compiler = Compiler(first(1) if stage == "backend" else lambda inputs: None)
    fn = compile_with_fallback(step_with(check), backend=compiler, policy=RetryPolicy(wait=3600))
    with record_events(kinds={"failed", "gave up", "retry scheduled", "recovered"}) as events:
        with dynamo_fails_in("step", MemoryError(), times=int(stage == "trace")), pytest.raises(type(error)) as info:
            fn(X)
        raises = False
        fn(X)
    assert (info.value, events) == (error, [])
    assert (fn.stats.failures, fn.stats.recoveries, fn.last_failure) == (0, 0, None)
    assert (fn.stats.calls, fn.stats.compiled_calls, fn.state) == (2, 1, CompileState.COMPILED)


@pytest.mark.parametrize("stage", ["backend", "trace"])
def test_a_retry_that_the_program_interrupts(stage: str) -> None:
    """The frame keeps waiting, and its retry is still due."""
    raises = False

    def check() -> None:
        if raises:
            raise Trouble

    compiler = Compiler(first(2 if stage == "backend" else 1))
    fn = compile_with_fallback(step_with(check), backend=compiler, policy=RetryPolicy(wait=None, wait_calls=3))
    fn(X), fn(X), fn(X)
    raises = True
    with dynamo_fails_in("step", MemoryError(), times=int(stage == "trace")), pytest.raises(Trouble):
        fn(X)
    assert (fn.stats.failures, fn.state, str(fn.next_retry)) == (1, CompileState.FALLBACK, "in 1 call")
    raises = False
    fn(X)
    assert (fn.stats.failures, fn.stats.recoveries, fn.state) == (1, 1, CompileState.COMPILED)


def test_a_retry_that_succeeds_before_the_program_raises() -> None:
    """Nothing waits any more, so it is the recovery, although the call raises."""
    raises = False

    def check() -> None:
        if raises:
            raise Trouble

    fn = compile_with_fallback(step_with(check), backend=Compiler(first(1)), policy=EVERY_CALL)
    fn(X)
    raises = True
    with pytest.raises(Trouble):
        fn(X)
    assert (fn.stats.failures, fn.stats.recoveries, fn.state) == (1, 1, CompileState.COMPILED)


def test_no_other_attempt_is_made_in_the_meantime() -> None:
    """While in doubt, neither frames below, nor a nested call, nor another thread attempts."""
    compiler = Compiler(first(1))
    asked: list[int] = []

    def step(x: torch.Tensor, depth: int = 1) -> torch.Tensor:
        y = below(x)
        if depth:
            meanwhile()
        return y

    def below(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def call_with_other_shapes() -> None:
        fn(torch.ones(4), 0)
        thread = threading.Thread(target=fn, args=(torch.ones(5), 0))
        thread.start()
        thread.join()
        asked.append(compiler.asked)

    meanwhile = torch.compiler.disable(call_with_other_shapes)
    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=EVERY_CALL)
    fn(X)
    assert asked == [1]
    assert (fn.stats.calls, fn.stats.eager_calls, fn.stats.failures) == (3, 3, 1)
    fn(X)
    assert asked[1] > 1
    assert fn.state is CompileState.COMPILED


def test_reported_when_the_call_is_over() -> None:
    """A failure is reported when its call is over, not before."""
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((len(events), fn.stats.failures))

    fn = compile_with_fallback(step_with(look), backend=Compiler(lambda inputs: full_disk()), policy=EVERY_CALL)
    with record_events(kinds={"failed"}) as events:
        fn(X)
    assert seen == [(0, 0)]
    assert (len(events), fn.stats.failures) == (1, 1)


@pytest.mark.parametrize("stage", ["backend", "trace", "torch.compile"])
def test_strict_mode_raises_when_the_call_is_over(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict mode raises after the body has run once. If the body raises, the caller sees that exception instead."""
    ran = 0

    def step(x: torch.Tensor, fails: bool = False) -> torch.Tensor:
        nonlocal ran
        ran += 1
        if fails:
            raise Trouble
        return x.sin()

    def cannot(*args: Any, **options: Any) -> Any:
        raise full_disk()

    if stage == "torch.compile":
        monkeypatch.setattr(torch, "compile", cannot)
    fn = compile_with_fallback(step, backend=Compiler(lambda inputs: full_disk()), policy=EVERY_CALL)
    with set_strict(True), dynamo_fails_in("step", MemoryError("no memory"), times=10 * (stage == "trace")):
        with pytest.raises(Exception, match=r"No space left|no memory"):
            fn(X)
        with pytest.raises(Trouble):
            fn(X, fails=True)
    assert ran == 2
    assert (fn.stats.failures, fn.next_retry) == (1, None)


def test_nothing_of_the_call_is_kept_while_in_doubt() -> None:
    """Only the root cause is kept, without frames and without the exceptions around it."""
    alive: list[object] = []

    class Buffer:
        pass

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        buffer = Buffer()
        buffers.append(weakref.ref(buffer))
        try:
            raise KeyError
        except KeyError:
            raise full_disk() from None

    def look() -> None:
        gc.collect()
        alive.extend(buffer() for buffer in buffers)

    buffers: list[weakref.ref[Buffer]] = []
    fn = compile_with_fallback(step_with(look), backend=backend, policy=EVERY_CALL)
    fn(X)
    assert alive == [None]
