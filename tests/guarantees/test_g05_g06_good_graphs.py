"""G5 and G6: a failure costs no other graph its compiled code, and no graph starves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from support import Compiler, first, full_disk, rows

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def two_graphs(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    torch._dynamo.graph_break()
    return y.cos()


@pytest.mark.parametrize("retries", [0, 15, pytest.param(300, marks=pytest.mark.long)])
def test_the_compiled_shape_stays_compiled(retries: int) -> None:
    """It stays compiled through any number of failed retries of another shape, and the next retry can succeed."""
    compiler = Compiler(rows(4))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=EVERY_CALL)
    a, b = torch.ones(3), torch.ones(4)
    fn(a)
    for _ in range(retries + 1):
        torch.testing.assert_close(fn(b), b.sin())
        before = compiler.ran
        fn(a)
        assert compiler.ran == before + 1
    assert fn.stats.failures == retries + 1
    assert (fn.stats.compiled_calls, fn.state) == (retries + 2, CompileState.FALLBACK)
    compiler.fails = lambda inputs: None
    fn(b)
    assert (fn.stats.compiled_calls, fn.state) == (retries + 3, CompileState.COMPILED)
    fn(a), fn(b)
    assert fn.stats.attempts == retries + 3


def test_the_compiled_shape_stays_compiled_however_long_the_hold_off() -> None:
    """Hundreds of calls after a failure, the compiled shape still runs compiled."""
    fn = compile_with_fallback(sine, backend=Compiler(rows(4)), dynamic=False, policy=RetryPolicy(wait=1e9))
    fn(torch.ones(3)), fn(torch.ones(4))
    for _ in range(200):
        fn(torch.ones(3))
    assert (fn.stats.compiled_calls, fn.stats.eager_calls) == (201, 1)


@pytest.mark.parametrize("failing", ["sin", "cos"])
def test_the_graph_before_a_failing_one_stays_compiled(failing: str) -> None:
    """It stays compiled through fifteen retries; the rest of the failing graph's frame runs eagerly."""
    compiled: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        if failing in gm.code:
            raise full_disk()

        def run(*args: Any) -> Any:
            compiled.append("sin" if "sin" in gm.code else "cos")
            return gm.forward(*args)

        return run

    fn = compile_with_fallback(two_graphs, backend=backend, policy=RetryPolicy(wait=None, wait_calls=3))
    x = torch.ones(3)
    for _ in range(45):
        torch.testing.assert_close(fn(x), x.sin().cos())
    assert compiled == (["sin"] * 45 if failing == "cos" else [])
    assert fn.stats.failures == 15
    assert fn.state is CompileState.FALLBACK


@pytest.mark.parametrize("wait", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("pattern", ["AB", "AAB", "AAAB", "ABB", "ACB", "AABCCB"])
def test_nobody_starves(wait: int, pattern: str) -> None:
    """Of the waiting shapes, the one that can be compiled is compiled within two due moments in which it is called."""

    def step(x: torch.Tensor, number: int) -> torch.Tensor:  # does not use the number, which differs in each call
        return x.sin()

    compiler = Compiler(lambda inputs: rows(3)(inputs) or rows(5)(inputs))
    fn = compile_with_fallback(step, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=wait))
    shapes = {"A": torch.ones(3), "B": torch.ones(4), "C": torch.ones(5)}
    waiting_since = None
    for call in range(1, 60):
        shape = pattern[(call - 1) % len(pattern)]
        before = compiler.ran
        torch.testing.assert_close(fn(shapes[shape], call), shapes[shape].sin())
        if compiler.ran > before:
            break
        if shape == "B" and waiting_since is None:
            waiting_since = call
    else:
        pytest.fail("B was never compiled")
    due_moments = 2
    assert call - (waiting_since or call) <= (due_moments + 1) * (wait + len(pattern))
    for later in range(call + 1, call + 40):
        shape = pattern[(later - 1) % len(pattern)]
        before = compiler.ran
        fn(shapes[shape], later)
        assert compiler.ran == before + (shape == "B")


def test_a_shape_that_failed_once_does_not_starve() -> None:
    """A shape that failed once is compiled, even if another shape fails at every due moment."""
    compiler = Compiler(lambda inputs: full_disk())
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=3))
    a, b = torch.ones(3), torch.ones(4)
    for x in (a, b, b, b):  # attempts in calls 1 and 4
        fn(x)
    assert compiler.asked == 2
    compiler.fails = rows(3)
    for _ in range(12):
        fn(b), fn(a)
    assert compiler.ran > 0
    before = compiler.ran
    fn(b)
    assert compiler.ran == before + 1


def test_a_shape_that_does_not_come_back_loses_its_turn() -> None:
    """A turn that nobody takes goes to others once twice the wait is over."""
    compiler = Compiler(rows(3))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=2))
    a, b = torch.ones(3), torch.ones(4)
    for x in (a, b, a):  # fails, is held off, fails again, so b has the next turn
        fn(x)
    compiler.fails = lambda inputs: None
    attempts = []
    for _ in range(4):
        fn(a)
        attempts.append(fn.stats.attempts)
    assert attempts == [2, 2, 2, 3]


def test_a_turn_that_was_taken_is_over() -> None:
    """After the shape whose turn it was, the other one is attempted at once."""
    compiler = Compiler(rows(3))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=2))
    a, b = torch.ones(3), torch.ones(4)
    for x in (a, b, a, b):  # b is due in the next call
        fn(x)
    compiler.fails = lambda inputs: None
    fn(b), fn(a)
    assert (fn.stats.compiled_calls, fn.stats.recoveries, fn.state) == (2, 1, CompileState.COMPILED)


def test_a_shape_of_long_ago_has_no_turn() -> None:
    """A turn goes only to shapes that were called since the last failure."""
    compiler = Compiler(lambda inputs: full_disk())
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=2))
    a, b, c = torch.ones(3), torch.ones(4), torch.ones(5)
    for x in (a, c, a, b, b, b, b):  # c has a turn and does not take it, so b is attempted once that is overdue
        fn(x)
    assert compiler.asked == 3
    compiler.fails = rows(3)
    fn(b), fn(b)
    assert (compiler.asked, fn.stats.compiled_calls) == (4, 1)


@pytest.mark.parametrize("end", ["reset", "recovery"])
def test_turns_end_with_the_episode(end: str) -> None:
    """A shape that was held off in an earlier episode has no turn in the next one."""
    compiler = Compiler(rows(3))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=2))
    a, b = torch.ones(3), torch.ones(4)
    for x in (a, b, a, b):
        fn(x)
    if end == "reset":
        fn.reset()
    else:
        compiler.fails = lambda inputs: None
        for _ in range(3):  # until b's turn is overdue
            fn(a)
        a, compiler.fails = torch.ones(5), rows(5)
    assert fn.next_retry is None
    attempts = []
    for _ in range(5):
        before = compiler.asked
        fn(a)
        attempts.append(compiler.asked - before)
    assert attempts == [1, 0, 1, 0, 1]


def inner(x: torch.Tensor) -> torch.Tensor:
    y = x.tanh()
    torch._dynamo.graph_break()
    return y.sigmoid()


def step_with_inner(x: torch.Tensor) -> torch.Tensor:
    return inner(x.sin()).cos()


def fail_inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> None:
    if "tanh" in gm.code and inputs[0].shape[0] == 3:
        raise full_disk()


def test_frames_behind_a_failing_one_recover_with_it() -> None:
    """They ran in the same call as the last failure, so one due call compiles all of them."""
    broken = True

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        if broken:
            fail_inner(gm, inputs)
        return gm.forward

    fn = compile_with_fallback(step_with_inner, backend=backend, policy=RetryPolicy(wait=None, wait_calls=2))
    for _ in range(4):
        fn(torch.ones(3))
    broken = False
    fn(torch.ones(3))
    assert (fn.stats.failures, fn.stats.compiled_calls, fn.stats.recoveries) == (2, 1, 1)


def test_a_shape_beside_frames_behind_a_failing_one_does_not_starve() -> None:
    """It is compiled within two due moments, although the others ran in the failing call."""
    compiled = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        fail_inner(gm, inputs)
        compiled.append(inputs[0].shape[0])
        return gm.forward

    policy = RetryPolicy(wait=None, wait_calls=2)
    fn = compile_with_fallback(step_with_inner, backend=backend, dynamic=False, policy=policy)
    for _ in range(3):
        fn(torch.ones(3)), fn(torch.ones(4))
    assert 4 in compiled


def test_all_graphs_of_a_step_recover_in_one_call() -> None:
    """After the repair, one due call compiles the graph that failed and those after it."""
    fn = compile_with_fallback(two_graphs, backend=Compiler(first(2)), policy=RetryPolicy(wait=None, wait_calls=2))
    for _ in range(8):
        fn(torch.ones(3))
    stats = fn.stats
    assert (stats.eager_calls, stats.mixed_calls, stats.compiled_calls) == (4, 0, 4)
    assert (stats.attempts, stats.failures, stats.recoveries) == (4, 2, 1)


def test_one_graph_that_cannot_be_compiled() -> None:
    """A NotImplementedError in one graph is not retried, and its frame runs eagerly."""
    asked: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        name = "sin" if "sin" in gm.code else "cos"
        asked.append(name)
        if name == "sin":
            raise NotImplementedError("no lowering for sin")
        return gm.forward

    fn = compile_with_fallback(two_graphs, backend=backend, policy=EVERY_CALL)
    x = torch.ones(3)
    for _ in range(10):
        torch.testing.assert_close(fn(x), x.sin().cos())
    assert asked == ["sin"]
    assert (fn.stats.eager_calls, fn.stats.failures) == (10, 1)
    assert fn.state is CompileState.GAVE_UP
    assert fn.next_retry is None
    assert fn.last_failure is not None
    assert fn.last_failure.kind == "permanent"

    fn.retry_now()
    fn(x)
    assert asked == ["sin", "sin"]
    fn.reset()
    fn(x)
    assert asked == ["sin", "sin", "sin"]
    assert fn.stats.eager_calls == 12


def test_a_hopeless_graph_does_not_hold_off_the_others_of_its_call() -> None:
    """A retry that fails permanently ends the episode, and from the next call on the frame's callees are compiled."""
    asked: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        asked.append("sin" if "sin" in gm.code else "cos")
        if len(asked) == 1:
            raise full_disk()
        if asked[-1] == "sin":
            raise NotImplementedError("no lowering for sin")
        return gm.forward

    def cosine(x: torch.Tensor) -> torch.Tensor:
        return x.cos()

    def step(x: torch.Tensor) -> torch.Tensor:
        return cosine(x.sin())

    fn = compile_with_fallback(step, backend=backend, policy=EVERY_CALL)
    for _ in range(4):
        fn(torch.ones(3))
    assert asked == ["sin", "sin", "cos"]
    assert (fn.stats.eager_calls, fn.stats.mixed_calls, fn.stats.recoveries) == (2, 2, 0)
    assert (fn.state, fn.next_retry) == (CompileState.GAVE_UP, None)


def test_one_shape_that_cannot_be_compiled() -> None:
    """Other shapes are attempted at once, and compiled."""
    compiler = Compiler(rows(3, lambda: NotImplementedError("three rows")))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=EVERY_CALL)
    for _ in range(3):
        fn(torch.ones(3))
        fn(torch.ones(4))
    assert (fn.stats.eager_calls, fn.stats.compiled_calls, compiler.asked) == (3, 3, 2)


@pytest.mark.parametrize(("dynamic", "b"), [(False, torch.ones(4)), (True, torch.ones(3, 3))])
def test_a_recovery_is_that_of_all_shapes(dynamic: bool, b: torch.Tensor) -> None:
    """The code of one shape is not the recovery of another one that it does not cover."""
    compiler = Compiler(lambda inputs: full_disk())
    fn = compile_with_fallback(sine, backend=compiler, dynamic=dynamic, policy=EVERY_CALL)
    a = torch.ones(3)
    fn(a), fn(b)
    compiler.fails = lambda inputs: None
    fn(a)
    assert (fn.stats.recoveries, fn.state) == (0, CompileState.FALLBACK)
    fn(b)
    assert (fn.stats.recoveries, fn.state) == (1, CompileState.COMPILED)


def test_a_shape_that_fails_for_good_is_no_recovery() -> None:
    """The episode ends without a recovery, although another shape was compiled before the last failures."""
    compiler = Compiler(rows(3))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=EVERY_CALL)
    a, b = torch.ones(3), torch.ones(4)
    fn(a), fn(b), fn(a)
    compiler.fails = rows(3, lambda: NotImplementedError("not this"))
    fn(a)
    assert (fn.stats.failures, fn.stats.recoveries, fn.state) == (3, 0, CompileState.GAVE_UP)


def test_failures_do_not_use_up_the_recompile_limit() -> None:
    """Eight shapes that each fall back once are all compiled in the end."""
    compiler = Compiler(lambda inputs: full_disk())
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=EVERY_CALL)
    shapes = [torch.ones(n) for n in range(3, 11)]
    for _ in range(3):
        for x in shapes:
            fn(x)
    compiler.fails = lambda inputs: None
    for _ in range(3):
        for x in shapes:
            fn(x)
    assert fn.stats.compiled_calls == 24
    assert fn.state is CompileState.COMPILED


def test_another_shapes_code_may_cover_a_fallback() -> None:
    """With automatic dynamic shapes, another shape's code may serve the failed shape; that is a recovery too."""
    compiler = Compiler(lambda inputs: full_disk())
    fn = compile_with_fallback(sine, backend=compiler, policy=RetryPolicy(wait=None, wait_calls=2))
    fn(torch.ones(3))
    fn(torch.ones(4))
    compiler.fails = lambda inputs: None
    for n in range(5, 80):
        fn(torch.ones(n))
    assert fn.stats.compiled_calls == 75
    assert fn.state is CompileState.COMPILED
    assert fn.stats.recoveries == 1


def test_reset_by_the_user_at_any_moment() -> None:
    """After torch._dynamo.reset(), which drops all code, held-off frames stay held off, and recover."""
    compiler = Compiler(rows(4))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=3))
    a, b = torch.ones(3), torch.ones(4)
    fn(a), fn(b)
    torch._dynamo.reset()
    fn(b), fn(b)
    assert compiler.asked == 2
    compiler.fails = lambda inputs: None
    fn(b), fn(a)
    assert fn.state is CompileState.COMPILED
    torch._dynamo.reset()
    fn(a), fn(b)
    assert (fn.stats.failures, fn.stats.recoveries, fn.state) == (1, 1, CompileState.COMPILED)
    assert compiler.ran == 5


def test_many_shapes_wait() -> None:
    """However many shapes are turned away, the failing one stays held off and the others get their turn."""
    compiler = Compiler(rows(3))
    fn = compile_with_fallback(sine, backend=compiler, dynamic=False, policy=RetryPolicy(wait=None, wait_calls=100))
    fn(torch.ones(2))
    fn(torch.ones(3))
    for n in range(4, 103):
        fn(torch.ones(n))
    assert compiler.asked == 2
    fn(torch.ones(3))
    for _ in range(120):
        fn(torch.ones(4))
    assert fn.stats.failures == 2
    assert fn.stats.compiled_calls > 10


@pytest.mark.parametrize("exc", [full_disk, NotImplementedError])
def test_a_fallback_that_fits_other_shapes_too(exc: Callable[[], Exception]) -> None:
    """With automatic dynamic shapes, the second shape's graph fits the first one too, which keeps its code."""
    compiler = Compiler(rows(4, exc))
    fn = compile_with_fallback(sine, backend=compiler, policy=RetryPolicy(wait=None, wait_calls=100))
    for n in (3, 4, 3, 4, 3):
        fn(torch.ones(n))
    assert (fn.stats.compiled_calls, fn.stats.eager_calls) == (3, 2)
    with torch.no_grad():
        torch.testing.assert_close(fn(torch.ones(5)), torch.ones(5).sin())
