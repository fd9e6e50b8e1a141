"""G6a: if a frame can never be compiled, its callees are compiled on their own, within bounds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.testing import FakeClock
from support import Compiler, first

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)


class Cosine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cos()


class Block(nn.Module):
    """A block. A bad one computes a cosine, in one of several ways."""

    def __init__(self, *, is_bad: bool, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.flag = is_bad and how == "flag"
        self.part = Cosine() if is_bad and how == "part" else nn.ReLU()
        self.function = torch.cos if is_bad and how == "function" else torch.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.flag:
            y = y.cos()
        return x + self.function(self.part(y))


class Model(nn.Module):
    def __init__(self, bad: int, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(is_bad=i == bad, how=how) for i in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class NoCosine(Compiler):
    """A backend without a lowering for cosine."""

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if "cos" in graph_module.code:
            self.asked += 1
            raise NotImplementedError("no lowering for cos")
        return super().__call__(graph_module, inputs)


@pytest.mark.parametrize("policy", [EVERY_CALL, RetryPolicy()], ids=["every call", "default"])
@pytest.mark.parametrize("how", ["flag", "part", "function"])
@pytest.mark.parametrize("bad", [0, 7])
def test_eleven_of_twelve_blocks(bad: int, how: str, policy: RetryPolicy, caplog: pytest.LogCaptureFixture) -> None:
    """An operation without a lowering keeps only its block eager. The log names the block, and nothing is retried."""
    torch.manual_seed(0)
    model = Model(bad, how)
    twin, compiler = copy.deepcopy(model), NoCosine()

    def train_step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(x).square().mean()
        loss.backward()
        return loss

    fn = compile_with_fallback(train_step, backend=compiler, policy=policy)
    with caplog.at_level(logging.ERROR, logger="compile_retry"):
        for _ in range(6):
            x = torch.randn(3, 4)
            torch.testing.assert_close(fn(model, x), train_step(twin, x))
    for ours, eager in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, eager.grad)
    before, ran = fn.stats, compiler.ran
    fn(model, x)
    # If the part is a module, only the part is given up, and the rest of its block is compiled too.
    assert compiler.ran - ran >= 11
    assert (fn.stats.mixed_calls - before.mixed_calls, fn.stats.attempts - before.attempts) == (1, 0)
    assert (fn.state, fn.next_retry) == (CompileState.GAVE_UP, None)
    narrowest = f"blocks.{bad}.part" if how == "part" else f"blocks.{bad}"
    assert f"forward of {narrowest} (" in caplog.records[-1].getMessage()


def test_a_module_that_is_decorated_itself() -> None:
    """The blocks of a decorated module are compiled, too."""
    model, compiler = Model(5, "flag"), NoCosine()
    twin = copy.deepcopy(model)
    fn = compiled_function(compile_with_fallback(model, backend=compiler, policy=EVERY_CALL))
    x = torch.randn(3, 4)
    for _ in range(4):
        torch.testing.assert_close(model(x), twin(x))
    assert compiler.ran > 22
    assert fn.stats.mixed_calls >= 2


def test_one_failure_in_a_call() -> None:
    """In the call that failed nothing else is attempted. From the next call on, the frame's callees are compiled."""
    compiler = NoCosine()

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def step(x: torch.Tensor) -> torch.Tensor:
        return inner(x).cos()

    fn = compile_with_fallback(step, backend=compiler, policy=EVERY_CALL)
    attempts = []
    for _ in range(3):
        fn(torch.ones(3))
        attempts.append(fn.stats.attempts)
    assert attempts == [1, 2, 2]
    assert (fn.stats.eager_calls, fn.stats.mixed_calls) == (1, 2)


def test_a_callee_that_fails_for_a_while() -> None:
    """It is retried, although the frame around it was given up."""
    compiler = NoCosine(first(1))

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def step(x: torch.Tensor) -> torch.Tensor:
        return inner(x).cos()

    fn = compile_with_fallback(step, backend=compiler, policy=EVERY_CALL)
    for _ in range(3):
        fn(torch.ones(3))
    assert (fn.stats.failures, fn.stats.mixed_calls, compiler.ran) == (2, 1, 1)
    assert (fn.stats.recoveries, fn.state, fn.next_retry) == (1, CompileState.GAVE_UP, None)


def test_a_compiler_that_refuses_everything() -> None:
    """A few functions are attempted at once, and the rest within `max_overhead`."""
    clock = FakeClock()
    namespace: dict[str, Any] = {}
    depth = 30
    exec("def f0(x): return x.sin()", namespace)
    for n in range(1, depth):
        exec(f"def f{n}(x): return f{n - 1}(x) + {n}", namespace)

    def refuse(inputs: list[Any]) -> Exception:
        clock.advance(10.0)
        return NotImplementedError("nothing can be compiled")

    options: dict[str, Any] = {"backend": Compiler(refuse), "policy": RetryPolicy(max_overhead=0.1, clock=clock)}
    fn = compile_with_fallback(namespace[f"f{depth - 1}"], **options)
    x = torch.ones(3)
    start = clock()
    shares = []
    for call in range(1000):
        if call == 20:  # one that shares starts no new series
            fn = compile_with_fallback(fn.eager, **options)
        torch.testing.assert_close(fn(x), x.sin() + sum(range(1, depth)))
        clock.advance(1.0)
        shares.append(10.0 * options["backend"].asked / (clock() - start))
    assert 9 <= options["backend"].asked <= 20
    assert shares[-1] <= 0.1
    assert all(share <= 0.1 for share in shares[900:])


def test_a_success_ends_a_series_of_permanent_failures() -> None:
    """A success lets the next functions be attempted at once, in spite of earlier permanent failures."""
    clock, compiler = FakeClock(), NoCosine()

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        clock.advance(10.0)
        return compiler(graph_module, inputs)

    namespace: dict[str, Any] = {"torch": torch}
    functions = 40
    for n in range(functions):
        exec(f"def f{n}(x): return x.{'cos' if n % 2 else 'sin'}() + {n}", namespace)
    body = "; ".join(f"x = f{n}(x)" for n in range(functions))
    exec(f"def step(x):\n    {body}\n    return x", namespace)
    fn = compile_with_fallback(namespace["step"], backend=backend, policy=RetryPolicy(clock=clock))
    x = torch.ones(3)
    for _ in range(functions):
        torch.testing.assert_close(fn(x), namespace["step"](x))
    before = compiler.ran
    fn(x)
    assert compiler.ran - before == functions // 2
