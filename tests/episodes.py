"""Helpers for tests of the integrations: an episode to report, and a fresh process."""

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
    """Make a function that fails in calls 1 and 3, runs eagerly in calls 1 to 4, and recovers in call 5."""
    policy = RetryPolicy(wait=None, wait_calls=2)
    fn = compile_with_fallback(sine, backend=Compiler(first(2)), policy=policy, name=name)
    for _ in range(5):
        fn(X)
    assert fn.state is CompileState.COMPILED
    return fn


def full_disk_in_dynamo(self: object) -> None:
    """Fail before there is a graph. Replaces ``InstructionTranslator.run``."""
    raise full_disk()


def run(code: str, **environment: str) -> str:
    """Run code in a fresh process and return its output."""
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
