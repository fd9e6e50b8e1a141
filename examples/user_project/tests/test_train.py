"""Tests that the training survives failed compiles, with the fixtures that come with compile-retry."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import train

from compile_retry import CompiledFunction, RetryPolicy, compile_with_fallback
from compile_retry.events import Event
from compile_retry.testing import FakeClock, Faults, assert_compiled, assert_max_attempts


@pytest.fixture(autouse=True)
def train_step(monkeypatch: pytest.MonkeyPatch) -> CompiledFunction[..., Any]:
    """A copy of the train step for each test, uncompiled and without failures."""
    fresh = copy.copy(train.train_step)
    monkeypatch.setattr(train, "train_step", fresh)
    return fresh


def test_recovery(
    train_step: CompiledFunction[..., Any],
    compile_faults: Callable[..., Faults],
    compile_events: list[Event],
    compile_strict: Callable[[bool], None],
) -> None:
    """A disk that is full for two attempts delays compiled code, but changes no loss."""
    compile_strict(False)  # this test is about the fallback
    expected = train.train(steps=8)
    train_step.reset()
    torch._dynamo.reset()  # compile again

    compile_events.clear()
    faults = compile_faults(OSError(28, "No space left on device"), times=2, function="train_step")
    losses = train.train(steps=8)

    assert faults.failed == 2  # otherwise this test would test nothing
    assert losses == pytest.approx(expected)
    assert_compiled(train_step)
    assert [event.kind for event in compile_events if event.kind in ("failed", "recovered")] == [
        *["failed", "failed"],
        "recovered",
    ]


def test_max_attempts(train_step: CompiledFunction[..., Any]) -> None:
    """The run compiles once: nothing in the loop forces a recompile."""
    with assert_max_attempts(1, train_step):
        train.train(steps=8)


def test_the_wait_in_seconds(
    compile_clock: FakeClock, compile_faults: Callable[..., Faults], compile_strict: Callable[[bool], None]
) -> None:
    """The next attempt is a minute away, as in production, but the test does not wait for it."""
    compile_strict(False)
    step = compile_with_fallback(train.train_step.eager, policy=RetryPolicy(wait=60, clock=compile_clock))
    arguments = torch.nn.Linear(4, 1), torch.ones(8, 4), torch.ones(8, 1)
    compile_faults(MemoryError, times=1)
    step(*arguments)
    with assert_max_attempts(0):
        compile_clock.advance(59)
        step(*arguments)
    compile_clock.advance(1)
    step(*arguments)
    assert_compiled(step)


def test_it_compiles_at_all(compile_strict: Callable[[bool], None]) -> None:
    """In strict mode a failed compile fails this test instead of falling back."""
    compile_strict(True)
    train.train(steps=2)
