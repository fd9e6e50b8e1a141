"""Helpers for tests of the integrations: an episode to be told of, and a process where nothing is set up."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from support import Compiler, first, full_disk

X = torch.ones(3)
ALL = ("structlog", "prometheus", "opentelemetry")


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def episode(name: str) -> Any:
    """Fails in calls 1 and 3, of which each call but the last is eager, and recovers in call 5."""
    policy = RetryPolicy(wait=None, wait_calls=2)
    fn = compile_with_fallback(sine, backend=Compiler(first(2)), policy=policy, name=name)
    for _ in range(5):
        fn(X)
    assert fn.state is CompileState.COMPILED
    return fn


def full_disk_in_dynamo(self: object) -> None:
    """In place of ``InstructionTranslator.run``: fails before there is a graph."""
    raise full_disk()


def run(code: str, **environment: str) -> str:
    """In a process of its own, where nothing has been imported or set up."""
    prelude = """
import logging, sys, torch
from compile_retry import RetryPolicy, compile_with_fallback, instrumentation
from compile_retry.testing import fail_compiles
logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)

@compile_with_fallback(backend="eager", policy=RetryPolicy(wait=None, wait_calls=1))
def step(x):
    return x.sin()
"""
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
