"""G12: compiled and held-off calls go through almost no code of the library.

The benchmarks measure times. These tests count the functions that a call goes through.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType

import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from support import LIBRARY, Compiler, first

X = torch.ones(3)
HELD_OFF = 1  # the call itself
COMPILED = 2  # the call itself and its graph


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def gone_through(fn: Callable[[torch.Tensor], torch.Tensor], folder: str = LIBRARY) -> int:
    """Return the number of Python functions in this folder that at least nine of ten calls go through."""
    seen: list[int] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            seen[-1] += 1

    sys.setprofile(note)
    try:
        for _ in range(200):
            seen.append(0)
            fn(X)
    finally:
        sys.setprofile(None)
    [(usual, times)] = Counter(seen).most_common(1)
    assert times > 180
    return usual


def test_a_compiled_call() -> None:
    """A compiled call goes through one function, and one more per graph, which calls the compiled code directly."""
    fn = compile_with_fallback(sine, backend=Compiler())
    assert gone_through(fn) == COMPILED
    assert fn.stats.compiled_calls == fn.stats.calls == 200


def test_a_held_off_call() -> None:
    """A held-off call goes through one function, which reads only the clock."""
    fn = compile_with_fallback(sine, backend=Compiler(first(1)), policy=RetryPolicy(wait=1e9))
    for _ in range(70):
        fn(X)
    assert gone_through(fn) == HELD_OFF
    assert fn.stats.eager_calls == fn.stats.calls == 270


def test_after_a_recovery() -> None:
    """After a recovery, calls are as cheap as if nothing had failed."""
    policy = RetryPolicy(wait=None, wait_calls=2)
    fn = compile_with_fallback(sine, backend=Compiler(first(2)), policy=policy)
    for _ in range(5):
        fn(X)
    assert fn.state is CompileState.COMPILED
    assert gone_through(fn) == COMPILED


def test_no_more_functions_than_without_the_library() -> None:
    """A compiled call goes through no more Python functions, including torch's own, than under stock torch."""
    ours, stock = compile_with_fallback(sine, backend="eager"), torch.compile(sine, backend="eager")
    ours(X), stock(X)
    assert gone_through(ours, "") <= gone_through(stock, "")
