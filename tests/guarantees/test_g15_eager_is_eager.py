"""G15: while held off, the program itself runs, with its modes, its random state and its own types."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from support import Compiler, dynamo_fails_in, first

HELD_OFF = RetryPolicy(wait=None, wait_calls=3)


def aot(fails: int) -> Callable[..., Any]:
    compiler = Compiler(first(fails))

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiler(graph_module, inputs)
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)

    return backend


def modes() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def test_an_error_inside_a_mode_leaves_no_mode_behind() -> None:
    """No mode stays behind, neither while the function is held off nor after it has been compiled."""
    table, weight, before = torch.randn(10, 8), torch.randn(8, 8), modes()

    def step(index: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return table[index] @ weight

    fn = compile_with_fallback(step, backend=aot(1), policy=RetryPolicy(wait=None, wait_calls=5))
    fn(torch.tensor([1]))
    for _ in range(8):
        with pytest.raises(IndexError):
            fn(torch.tensor([99]))
        assert modes() == before
        fn(torch.tensor([1]))
    assert (fn.stats.failures, fn.state) == (1, CompileState.COMPILED)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_inside_a_checkpointed_block(use_reentrant: bool) -> None:
    """The backward pass uses the forward pass's masks, so gradients match the loss in every call."""
    weight = torch.randn(6, 6, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x * weight.sum(), 0.5)

    def step(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(block, x, use_reentrant=use_reentrant)
        return y.sum()

    fn = compile_with_fallback(step, backend=aot(2), policy=RetryPolicy(wait=None, wait_calls=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo breaks the graph at a reentrant checkpoint, and warns
        for seed in range(8):
            torch.manual_seed(seed)
            weight.grad = None
            loss = fn(torch.ones(4, 8, requires_grad=use_reentrant))
            torch.manual_seed(1000 + seed)
            loss.backward()
            assert weight.grad is not None
            torch.testing.assert_close(weight.grad, (loss / weight.sum()).detach().expand(6, 6))
    assert fn.stats.failures == 2


def test_the_policy_of_a_selective_checkpoint() -> None:
    """Its operations are recomputed as often as in eager."""
    weight, computed = torch.randn(4, 4, requires_grad=True), [0]

    @torch.library.custom_op("compile_retry_tests::noted", mutates_args=())
    def noted(x: torch.Tensor) -> torch.Tensor:
        computed[0] += 1
        return x.clone()

    noted.register_fake(torch.empty_like)
    noted.register_autograd(lambda ctx, grad: grad)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_noted = op is torch.ops.compile_retry_tests.noted.default
        return CheckpointPolicy.MUST_SAVE if is_noted else CheckpointPolicy.PREFER_RECOMPUTE

    def block(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = noted(x @ weight)
        return y.sin()

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def step(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return y.sum()

    def often(call: Callable[..., torch.Tensor]) -> int:
        computed[0] = 0
        call(torch.ones(2, 4)).backward()
        return computed[0]

    fn = compile_with_fallback(step, backend=aot(1), policy=HELD_OFF)
    eager = often(step)
    assert [often(fn) for _ in range(3)] == [eager] * 3
    assert fn.stats.failures == 1


def test_a_nested_region() -> None:
    """`nested_compile_region` falls back and recovers, with and without gradients."""
    weight = torch.randn(8, 8, requires_grad=True)

    @torch.compiler.nested_compile_region
    def region(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ weight)

    def step(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = region(region(x))
        return y.sum()

    def run(call: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight.grad = None
        loss = call(torch.ones(6, 8))
        loss.backward()
        return loss.detach(), weight.grad

    fn = compile_with_fallback(step, backend=aot(1), policy=RetryPolicy(wait=None, wait_calls=2))
    want = run(step)
    for _ in range(5):
        torch.testing.assert_close(run(fn), want)
    with torch.no_grad():
        torch.testing.assert_close(fn(torch.ones(6, 8)), want[0])
    assert (fn.stats.failures, fn.state) == (1, CompileState.COMPILED)


def test_numpy() -> None:
    """During the whole hold-off, results have eager's type."""

    def step(a: Any) -> Any:
        a = a * 2
        a += 1
        return a.mean(), (a > 0).sum()

    a = np.arange(5.0)
    fn = compile_with_fallback(step, backend=Compiler(first(2)), policy=RetryPolicy(wait=None, wait_calls=70))
    kinds = []
    for _ in range(140):
        results = fn(a)
        np.testing.assert_allclose([float(result) for result in results], [5.0, 5.0])
        kinds.append(tuple(map(type, results)))
    assert set(kinds) == {tuple(map(type, step(a)))}
    assert fn.stats.eager_calls == 140


def test_try_and_finally() -> None:
    """The program's own handlers and context managers run unchanged."""
    log: list[str] = []

    @contextmanager
    def noted() -> Iterator[None]:
        log.append("enter")
        try:
            yield
        finally:
            log.append("exit")

    def step(x: torch.Tensor, index: int) -> torch.Tensor:
        try:
            with noted():
                return x[index]
        except IndexError:
            log.append("caught")
            return x.sum()
        finally:
            log.append("finally")

    fn = compile_with_fallback(step, backend=Compiler(first(10**6)), policy=HELD_OFF)
    x = torch.arange(3.0)
    for index in (0, 5, 1, 5, 5, 2):
        log.clear()
        want, noted_by_eager = step(x, index), list(log)
        log.clear()
        torch.testing.assert_close(fn(x, index), want)
        assert log == noted_by_eager


def test_ctrl_c_inside_a_held_off_call() -> None:
    """It leaves the program at its own place, through the program's `finally`, and changes nothing else."""
    log: list[str] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        try:
            y = x.sin()
            interrupt()
            return y
        finally:
            log.append("finally")

    def interrupt_if_armed() -> None:
        if armed:
            signal.raise_signal(signal.SIGINT)

    armed, interrupt = False, torch.compiler.disable(interrupt_if_armed)
    fn = compile_with_fallback(step, backend=Compiler(), policy=HELD_OFF)
    x = torch.ones(3)
    with dynamo_fails_in("step", MemoryError(), times=1):
        fn(x)
    armed = True
    with pytest.raises(KeyboardInterrupt):
        fn(x)
    armed = False
    assert log == ["finally"] * 2
    for _ in range(3):
        torch.testing.assert_close(fn(x), x.sin())
    # Dynamo skips a frame that breaks the graph inside `try`.
    assert (fn.stats.failures, fn.stats.eager_calls) == (1, 5)
