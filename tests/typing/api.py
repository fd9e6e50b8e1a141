"""The public signatures. This file is type-checked and never run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta

import tenacity
import torch
from typing_extensions import assert_type

import compile_retry
from compile_retry import (
    CompileFailure,
    CompileState,
    CompileStats,
    Installation,
    NextRetry,
    RetryPolicy,
    compile_repeated_blocks,
    compile_with_fallback,
    compiled_function,
    install,
    instrumentation,
    is_transient,
    report,
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
    compile_with_fallback(model, group="everyone")  # type: ignore[call-overload]  # must be refused
    bare("x")  # type: ignore[arg-type]  # must be refused
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
    bare.policy = RetryPolicy()  # type: ignore[assignment]  # must be refused
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
    compiled_function(3)  # type: ignore[call-overload]  # must be refused


def repeated_blocks(model: torch.nn.Transformer) -> None:
    assert_type(compile_repeated_blocks(model), torch.nn.Transformer)
    assert_type(compile_repeated_blocks(model, "Block", name="block", dynamic=True), torch.nn.Transformer)
    compile_repeated_blocks(model, [torch.nn.TransformerEncoderLayer, "Block"], policy=RetryPolicy.never())
    compile_repeated_blocks(model, model)  # type: ignore[arg-type]  # must be refused
    compile_repeated_blocks(len)  # type: ignore[type-var]  # must be refused


class Trainer:
    @compile_with_fallback
    def method(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @compile_with_fallback(dynamic=True)
    @staticmethod
    def static(x: torch.Tensor) -> torch.Tensor:
        return x

    @classmethod
    @compile_with_fallback
    def of(cls, x: torch.Tensor) -> torch.Tensor:
        return x


def methods(x: torch.Tensor) -> None:
    assert_type(Trainer().method(x), torch.Tensor)
    assert_type(Trainer.static(x), torch.Tensor)


def policies() -> None:
    RetryPolicy()
    RetryPolicy(wait=30, wait_calls=None)
    RetryPolicy(wait=None, wait_calls=tenacity.wait_exponential(multiplier=2, max=64))
    RetryPolicy(retry=tenacity.retry_if_exception_type(OSError), clock=FakeClock())
    assert_type(RetryPolicy.every(calls=100), RetryPolicy)
    assert_type(RetryPolicy.never(), RetryPolicy)
    RetryPolicy.every(seconds=timedelta(minutes=5), stop=tenacity.stop_after_attempt(10), clock=FakeClock(timedelta(1)))
    RetryPolicy.every(100)  # type: ignore[call-arg]  # must be refused
    RetryPolicy(wait=timedelta(seconds=30))
    RetryPolicy(wait_calls=timedelta(1))  # type: ignore[arg-type]  # must be refused
    RetryPolicy(stop=5)  # type: ignore[arg-type]  # must be refused
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
        assert_type(handle, Installation)
    assert_type(handle.remove(), None)


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
    str(compile_retry.polcy)  # type: ignore[attr-defined]  # must be refused


def integrations() -> None:
    instrumentation.disable()
    instrumentation.enable("structlog", "prometheus", "opentelemetry")
    assert_type(instrumentation.active(), tuple[str, ...])


def assertions(trainer: Trainer) -> None:
    for fn in (bare, torch.nn.Linear(1, 1), trainer.method):
        assert_type(assert_compiled(fn), None)
    with assert_max_attempts(2) as nothing, assert_max_attempts(0, bare):
        assert_type(nothing, None)
    assert_max_attempts("2")  # type: ignore[arg-type]  # must be refused
