"""G9 and G10: nothing else changes, and nothing is kept."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config

from compile_retry import CompileFailure, CompileState, RetryPolicy, compile_with_fallback
from support import Compiler, first, full_disk, process_state

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)


def one_graph(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def two_graphs(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    torch._dynamo.graph_break()
    return y.cos()


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_nothing_else_changes(fails: int) -> None:
    """Configuration, environment, random generators, callbacks, stance and other functions' code stay unchanged."""
    other_compiler = Compiler()
    other = torch.compile(two_graphs, backend=other_compiler)
    ours = compile_with_fallback(two_graphs, backend=Compiler(first(fails)), policy=EVERY_CALL)
    x = torch.ones(3)
    other(x)

    before = process_state(), torch.get_rng_state().tolist()
    for _ in range(5):
        ours(x)
    assert (process_state(), torch.get_rng_state().tolist()) == before
    other(x)
    assert (other_compiler.asked, other_compiler.ran) == (2, 4)
    assert ours.state is CompileState.COMPILED


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_no_input_is_alive_after_a_failed_call(fails: int) -> None:
    """After a failure or a failed retry, the inputs are released at once, even before garbage collection."""
    fn = compile_with_fallback(two_graphs, backend=Compiler(first(fails)), policy=EVERY_CALL)
    x = torch.ones(1000)
    for _ in range(fails - 1):
        fn(x)
    gc.collect()
    gc.disable()
    try:
        y = fn(x)
        alive = weakref.ref(x), weakref.ref(y)
        del x, y
        assert fn.stats.failures == fails
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_wrappers_are_collected() -> None:
    """Fifteen functions are decorated, called, failed and dropped, and all objects are gone."""

    def make(fails: int) -> tuple[weakref.ref[Any], ...]:
        weight = torch.ones(3)
        fn = compile_with_fallback(lambda x: x * weight, backend=Compiler(first(fails)), policy=EVERY_CALL)
        for _ in range(fails + 1):
            fn(torch.ones(3))
        return weakref.ref(fn), weakref.ref(fn.eager)

    made = [make(k % 3) for k in range(15)]
    gc.collect()
    assert [ref() for refs in made for ref in refs if ref() is not None] == []


@pytest.mark.parametrize("fails", [0, 1, 100])
def test_wrappers_of_a_function_that_stays(fails: int) -> None:
    """If the function outlives its wrappers, the code compiled for them goes with them.

    This excludes functions with a graph break: torch keeps their first graph even after its own reset.
    """

    def make() -> None:
        fn = compile_with_fallback(one_graph, backend=Compiler(first(fails)), dynamic=False, policy=EVERY_CALL)
        for n in (3, 4, 3, 4):
            fn(torch.ones(n))

    def graphs() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.fx.GraphModule) for thing in gc.get_objects())

    make()
    before = graphs()
    for _ in range(6):
        make()
    assert graphs() <= before


def test_the_record_is_text() -> None:
    """A failure can be pickled, compared and printed, and holds no exception."""
    fn = compile_with_fallback(two_graphs, backend=Compiler(first(1)), policy=EVERY_CALL)
    fn(torch.ones(3))
    failure = fn.last_failure
    assert failure is not None
    assert pickle.loads(pickle.dumps(failure)) == failure
    assert isinstance(failure, CompileFailure)
    assert (failure.kind, failure.error_type, failure.stage) == ("transient", "builtins.OSError", "backend")
    assert (failure.attempt, failure.call) == (1, 1)
    assert failure.frame[0].endswith("two_graphs")
    assert failure.frame[1] == __file__
    assert str(failure) == "OSError: [Errno 28] No space left on device"
    assert "full_disk" not in failure.message
    assert "OSError: [Errno 28]" in failure.traceback


def test_held_off_calls_keep_nothing() -> None:
    """Ten thousand held-off calls leave no objects behind."""
    fn = compile_with_fallback(two_graphs, backend=Compiler(lambda inputs: full_disk()), policy=RetryPolicy(wait=1e9))
    x = torch.ones(3)
    for _ in range(200):
        fn(x)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(10_000):
        fn(x)
    gc.collect()
    assert len(gc.get_objects()) - before < 50
