"""G10, G16: functions that are decorated anew, such as once per request, after the wrapper before them is gone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import FakeClock
from support import Compiler, full_disk


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.b(torch.relu(self.a(x)))
        return y


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@pytest.mark.parametrize("make", [lambda: plain, Block], ids=["function", "module"])
@pytest.mark.parametrize("options", [{}, {"dynamic": True}], ids=str)
def test_a_wrapper_made_for_each_call_compiles_once(make: Callable[[], Any], options: dict[str, Any]) -> None:
    """It finds the code of the wrapper before it, which is gone, as with stock."""
    x = torch.randn(2, 8)
    stock, ours = Compiler(), Compiler()
    for _ in range(5):
        compiled: Callable[..., Any] = torch.compile(make(), backend=stock, **options)
        compiled(x)
        compile_with_fallback(make(), backend=ours, **options)(x)
        gc.collect()
    assert ours.asked == stock.asked == 1


def test_a_wrapper_made_for_each_call_is_held_off() -> None:
    """A broken compiler does not run for each of them, and holds off other functions only while one of them lives."""
    clock = FakeClock()

    def fails(inputs: object) -> Exception | None:
        clock.advance(10)
        return full_disk() if clock() < 100 else None

    compiler = Compiler(fails)
    options: dict[str, Any] = {"backend": compiler, "policy": RetryPolicy(clock=clock)}
    other = compile_with_fallback(lambda x: x.cos(), backend="eager", policy=options["policy"])
    for _ in range(5):
        fn = compile_with_fallback(plain, **options)
        fn(torch.ones(2))
        assert fn.state is CompileState.FALLBACK
    assert compiler.asked == 1
    other(torch.ones(2))
    assert other.stats.attempts == 0
    del fn
    gc.collect()
    other(torch.ones(2))
    assert other.state is CompileState.COMPILED
    clock.advance(100)
    fn = compile_with_fallback(plain, **options)
    fn(torch.ones(2))
    assert (fn.state, compiler.asked) == (CompileState.COMPILED, 2)


def test_a_wrapper_made_anew_runs_compiled_code_while_other_functions_fail() -> None:
    """It needs no attempt, so it does not wait until it can afford one."""
    clock = FakeClock()

    def fails(inputs: object) -> Exception:
        clock.advance(10)
        return full_disk()

    policy = RetryPolicy(clock=clock)
    compile_with_fallback(plain, backend="eager", policy=policy)(torch.ones(2))
    failing = compile_with_fallback(lambda x: x.cos(), backend=Compiler(fails), policy=policy)
    failing(torch.ones(2))
    fn = compile_with_fallback(plain, backend="eager", policy=policy)
    fn(torch.ones(2))
    assert failing.state is CompileState.FALLBACK
    assert fn.stats.compiled_calls == 1
    fn(torch.ones(2, 2))
    assert fn.stats.eager_calls == 1


def test_a_wrapper_made_anew_and_exported_leaves_compiled_code_alone() -> None:
    """While a new shape must wait for other functions, it does not make the others of its kind run eagerly."""
    clock = FakeClock()

    def fails(inputs: object) -> Exception:
        clock.advance(10)
        return full_disk()

    options: dict[str, Any] = {"backend": "eager", "policy": RetryPolicy(clock=clock), "dynamic": False}
    fn = compile_with_fallback(plain, **options)
    fn(torch.ones(2))
    failing = compile_with_fallback(lambda x: x.cos(), backend=Compiler(fails), policy=options["policy"])
    failing(torch.ones(2))
    fn(torch.ones(3, 3))
    assert fn.next_retry is not None

    another = compile_with_fallback(plain, **options)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = another(x)
            return y

    for _ in range(6):  # later and later calls of it are timed
        torch.export.export(Model(), (torch.ones(2),), strict=False)
    compiled = fn.stats.compiled_calls
    for _ in range(5):
        fn(torch.ones(2))
    assert fn.stats.compiled_calls == compiled + 5


@pytest.mark.parametrize("error", [NotImplementedError("no"), full_disk()], ids=lambda error: type(error).__name__)
def test_a_wrapper_made_anew_after_torch_compile_itself_failed(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It does not call it again before that is due, although another one has been compiled."""
    options: dict[str, Any] = {"backend": "eager", "policy": RetryPolicy(wait=1e6, clock=FakeClock())}
    compiled = compile_with_fallback(plain, **options)
    compiled(torch.ones(2))
    asked = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", fails)
        functions = [compile_with_fallback(plain, **options) for _ in range(3)]
        for fn in functions:
            torch.testing.assert_close(fn(torch.ones(2)), plain(torch.ones(2)))
    assert len(asked) == 1
    assert [fn.stats.eager_calls for fn in functions] == [1, 1, 1]


def test_wrappers_with_new_objects_do_not_pile_up() -> None:
    """Only the last of those that differ in a backend or a clock alone is kept, and none that outlives its code."""

    def alive(backends: list[weakref.ref[Any]]) -> int:
        gc.collect()
        return sum(backend() is not None for backend in backends)

    def make(fn: Callable[..., Any]) -> weakref.ref[Any]:
        backend = Compiler()
        compile_with_fallback(fn, backend=backend, policy=RetryPolicy(clock=FakeClock()))(torch.ones(2))
        return weakref.ref(backend)

    def short_lived() -> weakref.ref[Any]:
        namespace: dict[str, Any] = {}
        exec("def step(x):\n    return x.sin()", namespace)
        return make(namespace["step"])

    short_lived()  # Dynamo keeps the code that it compiles first in a process
    kept = [make(plain) for _ in range(5)]
    gone = [short_lived() for _ in range(5)]
    torch._dynamo.reset()  # Dynamo keeps backends until then
    assert (alive(kept), alive(gone)) == (1, 0)


def test_wrappers_of_many_functions_do_not_pile_up() -> None:
    """The compiled code of 64 functions is kept for wrappers to come, as long as the functions live."""
    backends, functions = list[weakref.ref[Any]](), list[Callable[..., Any]]()
    for _ in range(70):
        namespace: dict[str, Any] = {}
        exec("def step(x):\n    return x.sin()", namespace)
        functions.append(namespace["step"])
        backend = Compiler()
        backends.append(weakref.ref(backend))
        compile_with_fallback(functions[-1], backend=backend)(torch.ones(2))
    del backend
    torch._dynamo.reset()  # Dynamo keeps backends until then
    gc.collect()
    assert sum(backend() is not None for backend in backends) == 64
