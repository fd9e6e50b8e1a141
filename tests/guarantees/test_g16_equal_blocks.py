"""Functions with the same code, options and policy share their compiled code, and fail and recover together (G16)."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.events import Event, Recovered
from compile_retry.testing import FakeClock, record_events
from support import Compiler, first, full_disk, train

COMPILER = Compiler()
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.b(torch.relu(self.a(x)))
        return y


class Stack(nn.Module):
    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def wrapped(stack: Stack, **options: Any) -> Stack:
    for block in stack.blocks:
        compile_with_fallback(block, **options)
    return stack


def test_equal_blocks_compile_as_often_as_with_stock() -> None:
    """Six equal blocks, wrapped one by one, make as many compiles as stock, and train like their eager twin."""
    eager = Stack()
    stock, ours = copy.deepcopy(eager), copy.deepcopy(eager)
    counts = Compiler(), Compiler()
    for block in stock.blocks:
        block.compile(backend=counts[0])
    wrapped(ours, backend=counts[1])
    expected = train(eager, 4)
    torch.testing.assert_close(train(stock, 4), expected)
    torch.testing.assert_close(train(ours, 4), expected)
    assert counts[0].asked == counts[1].asked <= 2
    assert [compiled_function(block).stats.compiled_calls for block in ours.blocks] == [4] * 6


def test_equal_blocks_fail_and_recover_together(caplog: pytest.LogCaptureFixture) -> None:
    """One failed attempt holds off all six blocks, and one line per transition says how many there are."""
    eager = Stack()
    ours, compiler = copy.deepcopy(eager), Compiler(first(2))
    wrapped(ours, backend=compiler, policy=RetryPolicy(wait=None, wait_calls=6))
    with caplog.at_level(logging.INFO, "compile_retry"):
        torch.testing.assert_close(train(ours, 8), train(eager, 8))
    lines = [record.message for record in caplog.records if record.name == "compile_retry"]
    assert [line.partition(": ")[0] for line in lines] == ["Block x6"] * len(lines)
    assert [line.split()[2] for line in lines] == ["attempt", "attempt", "compiled", "recovered"]
    functions = [compiled_function(block) for block in ours.blocks]
    assert {function.state for function in functions} == {CompileState.COMPILED}
    assert sum(function.stats.failures for function in functions) == 2
    assert sum(function.stats.recoveries for function in functions) == 1
    assert {function.stats.calls for function in functions} == {8}


def test_the_methods_of_many_instances_share() -> None:
    """The bound methods of several instances of a class compile once."""

    class Scale:
        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() * 2

    compiler = Compiler()
    instances = [Scale() for _ in range(5)]
    for instance in instances:
        fn = compile_with_fallback(instance.step, backend=compiler)
        torch.testing.assert_close(fn(torch.ones(3)), instance.step(torch.ones(3)))
    assert compiler.asked == 1


def factory(k: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * k

    return scaled


def test_closures_that_need_code_of_their_own_all_get_it() -> None:
    """Twenty closures of one factory with different constants are all compiled: the recompile limit grows with them."""
    functions = [compile_with_fallback(factory(k / 3), backend=COMPILER, dynamic=False) for k in range(20)]
    for _ in range(2):
        for k, fn in enumerate(functions):
            torch.testing.assert_close(fn(torch.ones(3)), torch.ones(3) * (k / 3))
    assert [fn.stats.compiled_calls for fn in functions] == [2] * 20


@pytest.mark.parametrize("fullgraph", [False, True])
def test_closures_that_are_made_and_dropped_all_get_compiled(fullgraph: bool) -> None:
    """At the recompile limit, the code of functions that are gone makes room, and that of others stays."""
    options: dict[str, Any] = {"backend": Compiler(), "dynamic": False, "fullgraph": fullgraph}
    kept, x = compile_with_fallback(factory(-1.0), **options), torch.ones(3)
    kept(x)
    for k in range(40):
        fn = compile_with_fallback(factory(k / 3), **options)
        torch.testing.assert_close(fn(x), x * (k / 3))
        assert fn.stats.compiled_calls == 1
        del fn
        gc.collect()
    torch.testing.assert_close(kept(x), -x)
    assert (kept.stats.compiled_calls, kept.stats.attempts) == (2, 1)


@pytest.mark.parametrize(
    "other",
    [
        {"policy": RetryPolicy(wait=None, wait_calls=2)},
        {"dynamic": True},
        {"name": "other"},
        {"fullgraph": True},
        {"backend": Compiler()},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_options_do_not_mix(other: dict[str, Any]) -> None:
    """A wrapper with another option or policy has code, failures and a schedule of its own."""
    compiler = Compiler(first(1))
    usual: dict[str, Any] = {"backend": compiler, "policy": RetryPolicy(wait=1e6, clock=FakeClock()), "dynamic": False}
    a, b = Block(), Block()
    compile_with_fallback(a, **usual)
    compile_with_fallback(b, **{**usual, **other})
    x = torch.randn(2, 8)
    a(x), b(x)
    assert compiled_function(a).state is CompileState.FALLBACK
    assert compiled_function(b).state is CompileState.COMPILED


def test_hooks_on_a_part_of_one_block() -> None:
    """A block with a hook inside runs it, although PyTorch does not guard hooks."""
    blocks = [Block(), Block()]
    blocks[1].a.register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(2, 8)
    expected = [block(x) for block in blocks]
    for block in blocks:
        compile_with_fallback(block, backend=COMPILER)
    torch.testing.assert_close([block(x) for block in blocks], expected)


def test_equal_policies_share() -> None:
    """Policies that are made in each turn of a loop are the same policy if they say the same."""
    compiler = Compiler(lambda inputs: full_disk())
    blocks = [Block() for _ in range(4)]
    for block in blocks:
        compile_with_fallback(block, backend=compiler, policy=RetryPolicy(wait=1e6))
        block(torch.randn(2, 8))
    assert compiler.asked == 1


def test_a_block_of_equal_blocks() -> None:
    """A block that contains equal blocks is attempted, held off and counted like any other."""

    class Tree(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.leaf = nn.Linear(8, 8)
            self.inner = Tree(depth - 1) if depth else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.leaf(x).relu()
            return x if self.inner is None else self.inner(x)

    eager = Tree(2)
    ours = copy.deepcopy(eager)
    compiler = Compiler(first(2))
    for tree in [module for module in ours.modules() if isinstance(module, Tree)]:
        compile_with_fallback(tree, backend=compiler, policy=EVERY_CALL)
    for _ in range(6):
        x = torch.randn(2, 8)
        torch.testing.assert_close(ours(x), eager(x))
    assert compiled_function(ours).state is CompileState.COMPILED


def test_a_call_within_the_probe_of_a_function_that_shares() -> None:
    """It is part of the probe, and may attempt; the probe's end is the recovery."""

    def step(depth: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            x = x.sin()
            torch._dynamo.graph_break()
            return functions[depth - 1](x).cos() if depth else x

        return run

    compiler = Compiler(first(1))
    policy = RetryPolicy(wait=None, wait_calls=6)
    functions = [compile_with_fallback(step(depth), backend=compiler, policy=policy, name="f") for depth in range(3)]
    x = torch.ones(3)
    expected = x.sin().sin().sin().cos().cos()
    for _ in range(8):
        torch.testing.assert_close(functions[2](x), expected)
    assert {fn.state for fn in functions} == {CompileState.COMPILED}
    assert sum(fn.stats.recoveries for fn in functions) == 1


def test_a_block_that_waits_is_not_forgotten_while_others_are_called() -> None:
    """A hundred equal blocks that run compiled code do not end the hold-off of one that is called after them."""
    compiler = Compiler(lambda inputs: full_disk() if inputs[0].shape[-1] == 5 else None)
    blocks = [*(Block() for _ in range(100)), Block(5)]
    for block in blocks:
        compile_with_fallback(block, backend=compiler, policy=EVERY_CALL, dynamic=False)
    last = compiled_function(blocks[-1])
    for step in range(3):
        for block in blocks:
            block(torch.randn(2, block.a.in_features))
        assert last.last_failure is not None
        assert (last.stats.recoveries, last.last_failure.attempt) == (0, step + 1)


def test_a_hook_on_each_block_is_called_once() -> None:
    """A hook that is registered for several functions that share is called once for each event."""
    stack, events = wrapped(Stack(3), backend=Compiler(first(1)), policy=EVERY_CALL), list[Event]()
    for block in stack.blocks:
        compiled_function(block).register_hook(events.append)
    stack(torch.randn(2, 8))
    assert [event.kind for event in events].count("failed") == 1
    assert {(event.function, event.functions) for event in events} == {("Block", 3)}


def test_a_function_that_is_gone_has_no_hooks() -> None:
    """A function that others share with is not counted once it is gone, even if it was the last one called."""
    compiler, events = Compiler(lambda inputs: full_disk() if len(inputs[0]) == 5 else None), list[Event]()
    a, b = (compile_with_fallback(factory(k), backend=compiler, dynamic=False) for k in (1.0, 2.0))
    a.register_hook(events.append)
    for _ in range(4):
        b(torch.ones(3)), a(torch.ones(3))
    del a
    gc.collect()
    events.clear()
    with record_events(kinds={"failed"}) as failed:
        b(torch.ones(5))
    assert (events, [event.functions for event in failed]) == ([], [1])


def test_a_function_that_is_gone_has_run_eagerly() -> None:
    """The eager calls of an episode include those of functions that were gone when it ended."""
    clock, compiler = FakeClock(), Compiler(first(1))
    options: dict[str, Any] = {"backend": compiler, "policy": RetryPolicy(wait=30, clock=clock)}
    kept, x = compile_with_fallback(factory(1.0), **options), torch.ones(3)
    kept(x)
    for _ in range(5):
        compile_with_fallback(factory(2.0), **options)(x)
    gc.collect()
    clock.advance(30)
    with record_events(kinds={"recovered"}) as events:
        kept(x)
    (recovered,) = events
    assert isinstance(recovered, Recovered)
    assert recovered.eager_calls == 6


def test_a_copy_of_a_block_shares() -> None:
    """A deep copy of a compiled block runs the code that is there."""
    compiler, block = Compiler(), Block()
    compile_with_fallback(block, backend=compiler)
    twin = copy.deepcopy(block)
    x = torch.randn(2, 8)
    torch.testing.assert_close(twin(x), block(x))
    assert compiler.asked == 1


def test_a_copy_of_a_block_that_cannot_be_compiled() -> None:
    """A deep copy is given up with the block, without an attempt of its own."""
    compiler, block = Compiler(lambda inputs: NotImplementedError("no")), Block()
    compile_with_fallback(block, backend=compiler)
    twin, x = copy.deepcopy(block), torch.randn(2, 8)
    for each in (block, twin):
        torch.testing.assert_close(each(x), each.b(each.a(x).relu()) + x)
    assert (compiler.asked, compiled_function(twin).state) == (1, CompileState.GAVE_UP)


def test_copies_after_a_reset_of_dynamo_share() -> None:
    """Deep copies of equal blocks share with each other and with new blocks, but not with the old ones."""
    stack, compiler = Stack(3), Compiler(first(1))
    policy, x = RetryPolicy(wait=1e6, clock=FakeClock()), torch.randn(4, 8)
    wrapped(stack, backend=compiler, policy=policy)(x)
    torch._dynamo.reset()
    twin, new = copy.deepcopy(stack), wrapped(Stack(2), backend=compiler, policy=policy)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), stack(x))
        new(x)
    assert compiler.asked == 2  # one of them failed
    states = [compiled_function(block).state for block in (*stack.blocks, *twin.blocks, *new.blocks)]
    assert states == [CompileState.FALLBACK] * 3 + [CompileState.COMPILED] * 5


def test_a_shallow_copy_does_not_share() -> None:
    """What ``copy.copy()`` returns starts uncompiled and without failures."""
    compiler = Compiler(first(1))
    fn = compile_with_fallback(factory(2.0), backend=compiler, policy=RetryPolicy(wait=1e6, clock=FakeClock()))
    fn(torch.ones(3))
    twin = copy.copy(fn)
    assert (fn.state, twin.state) == (CompileState.FALLBACK, CompileState.PENDING)
    twin(torch.ones(3))
    assert (fn.state, twin.state) == (CompileState.FALLBACK, CompileState.COMPILED)


def test_blocks_that_are_gone() -> None:
    """They leave no more than their code to blocks that are made later. With another backend, that is gone too."""
    graphs = list[weakref.ref[Any]]()

    def make_backend() -> Callable[..., Any]:
        def backend(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
            graphs.append(weakref.ref(graph_module))
            return graph_module.forward

        return backend

    backend = make_backend()
    stack = wrapped(Stack(3), backend=backend)
    stack(torch.randn(2, 8))
    references: list[weakref.ref[Any]] = [weakref.ref(block) for block in stack.blocks]
    references += [weakref.ref(compiled_function(block)) for block in stack.blocks]
    first_graphs = tuple(graphs)
    del stack
    gc.collect()
    assert [reference() for reference in references] == [None] * 6
    other = wrapped(Stack(1), backend=backend)
    other(torch.randn(2, 8))
    assert len(graphs) == len(first_graphs)
    del other
    other = wrapped(Stack(1), backend=make_backend())
    gc.collect()
    other(torch.randn(2, 8))  # this compile drops them
    gc.collect()
    assert [graph() for graph in first_graphs] == [None] * len(first_graphs)


def test_wrappers_start_anew_after_a_reset_of_dynamo() -> None:
    """After ``torch._dynamo.reset()``, a new wrapper does not inherit a hold-off."""
    compiler = Compiler(first(1))
    block, policy = Block(), RetryPolicy(wait=1e6, clock=FakeClock())
    compile_with_fallback(block, backend=compiler, policy=policy)
    block(torch.randn(2, 8))
    torch._dynamo.reset()
    twin = Block()
    compile_with_fallback(twin, backend=compiler, policy=policy)
    twin(torch.randn(2, 8))
    assert compiled_function(block).state is CompileState.FALLBACK
    assert compiled_function(twin).state is CompileState.COMPILED


def test_functions_with_equal_code_objects_do_not_share() -> None:
    """Dynamo keeps compiled code per code object, so one of them cannot use the other's, nor fail in its place."""
    compiler, policy = Compiler(first(1)), RetryPolicy(wait=1e6, clock=FakeClock())

    def make() -> Any:
        namespace: dict[str, Any] = {}
        exec(compile("def step(x):\n    return x.sin()", "step.py", "exec"), namespace)
        return compile_with_fallback(namespace["step"], backend=compiler, policy=policy)

    a, b = make(), make()
    assert a.__code__ == b.__code__
    a(torch.ones(2)), b(torch.ones(2))
    assert (a.state, b.state) == (CompileState.FALLBACK, CompileState.COMPILED)
