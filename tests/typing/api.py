"""The public signatures. This file is checked by mypy and pyright, and never run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import tenacity
import torch
from typing_extensions import assert_type

import compile_retry
from compile_retry import (
    CompileFailure,
    CompileState,
    CompileStats,
    NextRetry,
    RetryPolicy,
    compile_repeated_blocks,
    compile_with_fallback,
    compiled_function,
    install,
    instrumentation,
    is_transient,
    report,
    set_active,
    set_strict,
)
from compile_retry.events import Event
from compile_retry.testing import (
    FakeClock,
    Faults,
    assert_compiled,
    assert_max_attempts,
    broken_compiler,
    fail_compiles,
    record_events,
)


@compile_with_fallback
def bare(x: torch.Tensor, n: int = 1) -> torch.Tensor:
    return x * n


@compile_with_fallback(
    dynamic=True,
    fullgraph=False,
    mode="default",
    name="train_step",
    policy=RetryPolicy(wait=tenacity.wait_exponential(multiplier=30, max=3600), stop=tenacity.stop_after_attempt(10)),
)
def train_step(
    model: torch.nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = model(inputs)
    return criterion(outputs, targets), outputs


def signatures(x: torch.Tensor, model: torch.nn.Module) -> None:
    assert_type(bare(x, n=2), torch.Tensor)
    assert_type(compile_with_fallback(model, group="world", agree_timeout=60), torch.nn.Module)
    compile_with_fallback(model, group="everyone")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    bare("x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    loss, outputs = train_step(model, x, x, torch.nn.functional.mse_loss)
    assert_type(loss, torch.Tensor)
    assert_type(outputs, torch.Tensor)
    assert_type(compile_with_fallback(lambda: 1)(), int)
    assert_type(bare.eager(x), torch.Tensor)
    assert_type(bare.state, CompileState)
    assert_type(bare.stats, CompileStats)
    assert_type(bare.last_failure, CompileFailure | None)
    assert_type(bare.next_retry, NextRetry | None)
    assert_type(bare.policy, RetryPolicy)
    assert_type(bare.name, str)
    bare.policy = RetryPolicy()  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    assert_type(bare.retry_now(), None)
    assert_type(bare.reset(), None)


def modules() -> None:
    linear = compile_with_fallback(torch.nn.Linear(1, 1), dynamic=True)
    assert_type(linear, torch.nn.Linear)
    assert_type(compile_with_fallback(dynamic=True)(torch.nn.Linear(1, 1)), torch.nn.Linear)
    function = compiled_function(linear)
    assert_type(function.stats.calls, int)
    assert_type(compiled_function(bare)(torch.ones(1), n=2), torch.Tensor)
    compiled_function(Trainer().method)
    compiled_function(3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


def repeated_blocks(model: torch.nn.Transformer) -> None:
    assert_type(compile_repeated_blocks(model), torch.nn.Transformer)
    assert_type(compile_repeated_blocks(model, "Block", name="block", dynamic=True), torch.nn.Transformer)
    compile_repeated_blocks(model, [torch.nn.TransformerEncoderLayer, "Block"], policy=RetryPolicy.never())
    compile_repeated_blocks(model, model)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    compile_repeated_blocks(len)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]


class Trainer:
    @compile_with_fallback
    def method(self, x: torch.Tensor, *, n: int = 1) -> torch.Tensor:
        return x * n

    @compile_with_fallback(dynamic=True)
    def chained(self, x: torch.Tensor) -> torch.Tensor:
        return self.method(self.method(x), n=2)

    @compile_with_fallback(dynamic=True)
    @staticmethod
    def static(x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    @compile_with_fallback
    def decorated_inside(x: torch.Tensor) -> torch.Tensor:
        return x

    @classmethod
    @compile_with_fallback
    def of(cls, x: torch.Tensor) -> torch.Tensor:
        return x

    @compile_with_fallback()
    @classmethod
    def decorated_outside(cls, x: torch.Tensor) -> torch.Tensor:
        return x


class SubTrainer(Trainer):
    @compile_with_fallback
    def inherited(self, x: torch.Tensor) -> torch.Tensor:
        return super().method(x, n=2)


def methods(x: torch.Tensor, trainer: SubTrainer) -> None:
    for fn in (Trainer().method, trainer.method):
        assert_type(fn(x), torch.Tensor)
        assert_type(fn(x, n=2), torch.Tensor)
        fn()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        fn("x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        fn(x, m=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(Trainer.method(trainer, x), torch.Tensor)
    assert_type(trainer.chained(x), torch.Tensor)
    assert_type(trainer.inherited(x), torch.Tensor)
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = [
        trainer.chained,
        trainer.static,
        Trainer.static,
        Trainer.decorated_inside,
        Trainer.of,
        trainer.of,
        Trainer.decorated_outside,
        trainer.decorated_outside,
    ]
    assert functions
    Trainer.static(x, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Trainer.of(x, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Trainer.decorated_outside("x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def attributes_of_methods(trainer: Trainer) -> None:
    assert_type(trainer.method.state, CompileState)
    assert_type(trainer.method.stats, CompileStats)
    assert_type(trainer.method.last_failure, CompileFailure | None)
    assert_type(trainer.method.next_retry, NextRetry | None)
    assert_type(trainer.method.policy, RetryPolicy)
    assert_type(trainer.method.name, str)
    trainer.method.register_hook(print)
    trainer.method.retry_now()
    trainer.method.reset()
    assert_type(trainer.method.eager(trainer, torch.ones(1)), torch.Tensor)
    assert_type(trainer.method.__self__, object)
    assert_type(trainer.method.__func__.state, CompileState)
    assert_type(Trainer.method.state, CompileState)
    assert_type(Trainer.static.state, CompileState)
    assert_type(trainer.static.state, CompileState)
    assert_type(Trainer.decorated_outside.state, CompileState)
    assert_type(trainer.of.state, CompileState)
    trainer.method.sate = 1  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


class Net(torch.nn.Module):
    # Pyright accepts no decorator at all here that returns an object.
    @compile_with_fallback
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x


def methods_of_modules(x: torch.Tensor, net: Net) -> None:
    assert_type(net.forward(x), torch.Tensor)
    net.forward("x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(Net.forward.state, CompileState)
    assert_type(compiled_function(net.forward).state, CompileState)


class Step:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


def whatever_is_callable(x: torch.Tensor, unknown: Callable[..., Any], module: torch.nn.Linear) -> None:
    assert_type(compile_with_fallback(Step())(x), torch.Tensor)
    assert_type(compile_with_fallback(torch.sin)(x), torch.Tensor)
    assert_type(compile_with_fallback(module.forward)(x), torch.Tensor)
    assert_type(compile_with_fallback(bare)(x, n=2), torch.Tensor)
    assert_type(compile_with_fallback(unknown).state, CompileState)
    assert_type(compile_with_fallback()(unknown)(x, x), Any)
    assert_type(compile_with_fallback(staticmethod(bare.eager)).__func__(x), torch.Tensor)


def backend(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    return graph_module.forward


def options(given: dict[str, Any], fn: Callable[[], None]) -> None:
    compile_with_fallback(
        fn,
        backend="inductor",
        mode="max-autotune",
        options={"max_autotune": True, "triton.cudagraphs": False},
        dynamic=None,
        fullgraph=True,
        disable=False,
        recompile_limit=16,
        isolate_recompiles=False,
        dynamic_shapes=None,
    )
    compile_with_fallback(backend=backend)
    assert_type(compile_with_fallback(fn, **given).state, CompileState)
    compile_with_fallback(mod="default")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    compile_with_fallback(fn, mod="default")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    compile_with_fallback(fullgraph="yes")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    compile_with_fallback(fn, wait=30)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


def repeated_block_options(model: torch.nn.Transformer) -> None:
    compile_repeated_blocks(model, mod="default")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    compile_repeated_blocks(model, dynamic="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@compile_with_fallback
async def coroutine(x: int) -> int:
    return x


@compile_with_fallback(dynamic=True)
async def another_coroutine(x: int) -> None: ...


# mypy disregards what the decorator of a class returns.
@compile_with_fallback
class Decorated:
    def __call__(self) -> int:
        return 1


async def what_cannot_be_compiled() -> None:
    await coroutine(1)  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    await another_coroutine(1)  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    compile_with_fallback(Step)()  # type: ignore[misc]  # pyright: ignore[reportOptionalCall]
    compile_with_fallback()(torch.nn.Linear)(1, 1)  # type: ignore[misc]  # pyright: ignore[reportOptionalCall]
    Decorated()  # pyright: ignore[reportOptionalCall]
    compile_with_fallback(3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


def policies() -> None:
    RetryPolicy()
    RetryPolicy(wait=30, wait_calls=None)
    RetryPolicy(wait=None, wait_calls=tenacity.wait_exponential(multiplier=2, max=64))
    RetryPolicy(retry=tenacity.retry_if_exception_type(OSError), clock=FakeClock())
    assert_type(RetryPolicy.every(calls=100), RetryPolicy)
    assert_type(RetryPolicy.never(), RetryPolicy)
    RetryPolicy.every(seconds=timedelta(minutes=5), stop=tenacity.stop_after_attempt(10), clock=FakeClock(timedelta(1)))
    RetryPolicy.every(100)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RetryPolicy(wait=timedelta(seconds=30))
    RetryPolicy(wait_calls=timedelta(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RetryPolicy(stop=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    compile_with_fallback(policy=tenacity.Retrying(wait=tenacity.wait_fixed(3)))
    assert_type(is_transient(OSError()), bool)


def records(stats: CompileStats, failure: CompileFailure) -> None:
    assert_type(stats.as_dict(), dict[str, int | float])
    assert_type(stats.compiled_fraction, float)
    assert_type(failure.frame, tuple[str, str, int])
    assert_type(failure.message, str)
    assert_type(str(report(expanded=True)), str)
    assert_type(report().groups[0].stats, CompileStats)
    assert_type(report().show(), None)


def installation() -> None:
    with install(RetryPolicy(wait=30)) as handle:
        assert_type(handle.policy, RetryPolicy)
    assert_type(handle.remove(), None)
    assert_type(set_active(False), AbstractContextManager[None])


def testing() -> None:
    strict: AbstractContextManager[None] = set_strict(True)
    with (
        strict,
        broken_compiler(),
        fail_compiles(OSError, times=1, function="f", graph=2) as faults,
        record_events("f") as events,
    ):
        assert_type(faults, Faults)
        assert_type(events, list[Event])


def package() -> None:
    assert_type(compile_retry.__version__, str)
    assert_type(compile_retry.testing.FakeClock(), FakeClock)
    compile_retry.plotting.plot_timeline(bare)
    compile_retry.events.register_hook(print)
    compile_retry.polcy = 1  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def integrations() -> None:
    instrumentation.disable()
    instrumentation.enable("structlog", "prometheus", "opentelemetry")
    assert_type(instrumentation.active(), tuple[str, ...])


def assertions(trainer: Trainer) -> None:
    for fn in (bare, torch.nn.Linear(1, 1), trainer.method):
        assert_type(assert_compiled(fn), None)
    with assert_max_attempts(2) as nothing, assert_max_attempts(0, bare):
        assert_type(nothing, None)
    assert_max_attempts("2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
