"""G3: the program's errors stay the program's. If eager raises too, it was not a compile failure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, set_strict
from compile_retry.testing import record_events
from support import Compiler, first

X = torch.ones(3)


class Trouble(Exception):
    pass


@pytest.mark.parametrize("strict", [False, True])
def test_value_error_under_fullgraph(strict: bool) -> None:
    """The error reaches the caller as itself, although Dynamo wraps it, and nothing is counted or held off."""
    ran = 0

    def step(x: torch.Tensor, bad: bool) -> torch.Tensor:
        nonlocal ran
        ran += 1
        if bad:
            raise ValueError("bad batch", 7)
        return x.sin()

    fn = compile_with_fallback(step, backend=Compiler(), fullgraph=True)
    for calls in (1, 2):
        with set_strict(strict), pytest.raises(ValueError, match="bad batch") as caught:
            fn(X, bad=True)
        assert type(caught.value) is ValueError
        assert caught.value.args == ("bad batch", 7)
        assert ran == calls
    assert (fn.stats.attempts, fn.stats.failures, fn.last_failure) == (0, 0, None)
    assert fn.state is CompileState.PENDING
    fn(X, bad=False)
    assert (fn.stats.compiled_calls, fn.state) == (1, CompileState.COMPILED)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_first_calls_raise(fullgraph: bool) -> None:
    """A function whose first calls raise is compiled in its first call that does not."""

    def step(x: torch.Tensor, bad: bool) -> torch.Tensor:
        y = x.sin()
        if bad:
            raise Trouble("no")
        return y.cos()

    fn = compile_with_fallback(step, backend=Compiler(), fullgraph=fullgraph)
    for _ in range(3):
        with pytest.raises(Trouble):
            fn(X, bad=True)
    for _ in range(3):
        fn(X, bad=False)
    assert fn.stats.compiled_calls == 3
    assert fn.stats.failures == 0
    with pytest.raises(Trouble):
        fn(X, bad=True)
    fn(X, bad=False)
    assert (fn.stats.compiled_calls, fn.state) == (4, CompileState.COMPILED)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("compiled_before", [False, True])
def test_shape_mismatch(fullgraph: bool, compiled_before: bool) -> None:
    """The caller gets eager's own error, word for word, and nothing is counted."""

    def step(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    fn = compile_with_fallback(step, backend=Compiler(), fullgraph=fullgraph)
    if compiled_before:
        fn(torch.ones(2, 3), torch.ones(3, 2))
    state, stats = fn.state, fn.stats
    with pytest.raises(RuntimeError) as eager:
        step(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(RuntimeError) as ours, record_events() as events:
        fn(torch.ones(2, 3), torch.ones(4, 5))
    assert (type(ours.value), ours.value.args) == (type(eager.value), eager.value.args)
    assert (fn.stats.attempts, fn.stats.failures) == (stats.attempts, stats.failures)
    assert (fn.state, fn.next_retry, events) == (state, None, [])
    fn(torch.ones(2, 3), torch.ones(3, 2))
    assert fn.stats.compiled_calls == stats.compiled_calls + 1


BETWEEN_GRAPHS = [
    ValueError("v"),
    KeyError("k"),
    StopIteration(3),
    NotImplementedError("n"),
    OSError(28, "No space left on device"),
    MemoryError(),
    Trouble("t", 1),
    KeyboardInterrupt(),
]
ELSEWHERE = [StopIteration(3), OSError(28, "No space left on device"), Trouble("t", 1), KeyboardInterrupt()]


@pytest.mark.parametrize(
    ("when", "error"),
    [
        *(("between", error) for error in BETWEEN_GRAPHS),
        *(("before", error) for error in ELSEWHERE),
        *(("after", error) for error in ELSEWHERE),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_any_error_anywhere(when: str, error: BaseException) -> None:
    """At every place of a step with a graph break, the error is the same object, and the body runs once."""
    places: list[str] = []
    armed = False

    def trouble(place: str) -> None:
        places.append(place)
        if armed and place == when:
            raise error

    def step(x: torch.Tensor) -> torch.Tensor:
        torch.compiler.disable(trouble)("before")
        y = x.sin()
        torch.compiler.disable(trouble)("between")
        z = y.cos()
        torch.compiler.disable(trouble)("after")
        return z

    fn = compile_with_fallback(step, backend=Compiler())
    for turn in range(3):
        places.clear()
        armed = turn != 1
        if armed:
            with pytest.raises(type(error)) as caught:
                fn(X)
            assert caught.value is error
            assert places == ["before", "between", "after"][: ["before", "between", "after"].index(when) + 1]
        else:
            torch.testing.assert_close(fn(X), X.sin().cos())
    assert (fn.stats.failures, fn.last_failure) == (0, None)
    assert fn.state is CompileState.COMPILED


def test_error_while_held_off() -> None:
    """A program error does not change a hold-off."""

    def step(x: torch.Tensor, bad: bool = False) -> torch.Tensor:
        if bad:
            raise Trouble
        return x.sin()

    fn = compile_with_fallback(step, backend=Compiler(first(1)), policy=RetryPolicy(wait=None, wait_calls=3))
    fn(X)
    with pytest.raises(Trouble):
        fn(X, bad=True)
    fn(X)
    assert (fn.stats.failures, fn.stats.attempts, fn.state) == (1, 1, CompileState.FALLBACK)
    fn(X)
    assert fn.state is CompileState.COMPILED


def test_wrong_arguments() -> None:
    """A call that does not match the signature raises TypeError in the caller."""
    fn = compile_with_fallback(lambda x: x.sin(), backend=Compiler())
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fn()  # type: ignore[call-arg]  # too few arguments, on purpose
    with pytest.raises(TypeError):
        fn(X, X)  # type: ignore[call-arg]  # too many arguments, on purpose
    fn(X)
    assert (fn.stats.failures, fn.state) == (0, CompileState.COMPILED)


def test_graph_break_under_fullgraph() -> None:
    """It is a permanent failure: the call runs eagerly, once, and the log gives the reason, once."""
    ran = 0

    def step(x: torch.Tensor) -> torch.Tensor:
        nonlocal ran
        ran += 1
        torch._dynamo.graph_break()
        return x.sin()

    fn = compile_with_fallback(step, backend=Compiler(), fullgraph=True)
    with record_events(kinds={"failed", "gave up", "recovered"}) as events:
        for _ in range(5):
            torch.testing.assert_close(fn(X), X.sin())
    assert ran == 5
    assert (fn.stats.eager_calls, fn.stats.failures, fn.state) == (5, 1, CompileState.GAVE_UP)
    assert [t.kind for t in events] == ["failed", "gave up"]
    assert "graph_break" in events[1].message
    assert fn.last_failure is not None
    assert (fn.last_failure.kind, fn.last_failure.stage) == ("permanent", "trace")
    with set_strict(True):
        fn.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            fn(X)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_errors_of_the_compiled_code_itself(fullgraph: bool) -> None:
    """An error raised by running compiled code is the program's: it is no compile failure, and nothing is rerun."""
    ran = 0

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        def run(*args: torch.Tensor) -> object:
            nonlocal ran
            ran += 1
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    fn = compile_with_fallback(lambda x: x.sin(), backend=backend, fullgraph=fullgraph)
    for calls in (1, 2):
        with pytest.raises(torch.OutOfMemoryError):
            fn(X)
        assert ran == calls
    assert fn.stats.failures == 0
