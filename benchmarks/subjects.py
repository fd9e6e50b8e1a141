"""The subjects: the library, the alternatives that a user would write or turn on, and plain eager."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo

from compile_retry import RetryPolicy, compile_with_fallback

Step = Callable[..., Any]


def bare(step: Step, **options: Any) -> Step:
    return torch.compile(step, **options)


def ours(step: Step, *, policy: RetryPolicy | None = None, **options: Any) -> Step:
    return compile_with_fallback(step, policy=policy, **options)


def latch(step: Step, **options: Any) -> Step:
    """A common workaround: after the first failure, stay eager forever."""
    compiled, latched = torch.compile(step, **options), False

    def run(*args: Any) -> Any:
        nonlocal latched
        if not latched:
            try:
                return compiled(*args)
            except Exception:
                latched = True
        return step(*args)

    return run


def retry(step: Step, **options: Any) -> Step:
    """A common workaround: try on every call."""
    compiled = torch.compile(step, **options)

    def run(*args: Any) -> Any:
        try:
            return compiled(*args)
        except Exception:
            return step(*args)

    return run


def eager(step: Step, **options: Any) -> Step:
    return step


def suppressed() -> AbstractContextManager[object]:
    patch: AbstractContextManager[object] = torch._dynamo.config.patch(suppress_errors=True)
    return patch


@dataclass(frozen=True)
class Subject:
    """One way to run a step.

    Attributes:
        name: Heading in the tables.
        make: Takes a step and the options for ``torch.compile``.
        setting: Context manager to hold while the step runs.
    """

    name: str
    make: Callable[..., Step]
    setting: Callable[[], AbstractContextManager[object]] = nullcontext

    def __str__(self) -> str:
        return self.name


BARE = Subject("bare `torch.compile`", bare)
OURS = Subject("`compile_with_fallback`", ours)
LATCH = Subject("latch to eager", latch)
RETRY = Subject("`try` in every call", retry)
SUPPRESS = Subject("`suppress_errors`", bare, suppressed)
EAGER = Subject("eager", eager)
SUBJECTS = (BARE, OURS, LATCH, RETRY, SUPPRESS, EAGER)
