"""G13: functions, methods, modules, copies, pickles, outer compiles, DDP, and many wrappers of one code object."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compile_retry
from compile_retry import CompiledFunction, CompileState, RetryPolicy, compile_with_fallback, compiled_function
from module_level import double
from support import Compiler, first

X = torch.ones(3)
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)


class Holder:
    """A class with all kinds of decorated methods."""

    factor = 3.0

    @compile_with_fallback(backend="eager")
    def method(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor

    @staticmethod
    @compile_with_fallback(backend="eager")
    def static_inside(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @compile_with_fallback(backend="eager")
    @staticmethod
    def static_outside(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @classmethod
    @compile_with_fallback(backend="eager")
    def class_inside(cls, x: torch.Tensor) -> torch.Tensor:
        return x * cls.factor

    @compile_with_fallback(backend="eager")
    @classmethod
    def class_outside(cls, x: torch.Tensor) -> torch.Tensor:
        return x * cls.factor


def test_methods() -> None:
    """Methods bind through instance and class, and their calls are counted."""
    holder = Holder()
    cases: list[tuple[Callable[..., torch.Tensor], int]] = [
        (holder.method, 3),
        (functools.partial(Holder.method, holder), 3),
        (holder.static_inside, 2),
        (Holder.static_outside, 2),
        (holder.class_inside, 3),
        (Holder.class_outside, 3),
    ]
    for bound, factor in cases:
        torch.testing.assert_close(bound(X), X * factor)
    assert isinstance(Holder.method, CompiledFunction)
    method: Any = holder.method  # a callable without attributes, to a type checker
    class_outside: Any = Holder.class_outside
    assert method.stats.compiled_calls == 2
    assert class_outside.stats.compiled_calls == 1
    assert pickle.loads(pickle.dumps(holder.method))(X).tolist() == (X * 3).tolist()


class Sine:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


def test_other_callables() -> None:
    """Lambdas, closures, partials, bound methods, callable objects and builtins can be decorated."""
    shift = torch.ones(3)

    def closure(x: torch.Tensor) -> torch.Tensor:
        return x + shift

    cases: list[tuple[Callable[..., torch.Tensor], torch.Tensor]] = [
        (lambda x: x * 2, X * 2),
        (closure, X + 1),
        (functools.partial(torch.mul, other=5), X * 5),
        (functools.partial(functools.partial(closure)), X + 1),
        (Sine(), X.sin()),
        (torch.sin, X.sin()),
    ]
    for fn, expected in cases:
        compiler = Compiler(first(2))
        ours = compile_with_fallback(fn, backend=compiler, policy=EVERY_CALL)
        for _ in range(4):
            torch.testing.assert_close(ours(X), expected)
        assert (ours.stats.compiled_calls, ours.stats.failures) == (2, 2)
        assert ours.name


def test_pickle_and_copies() -> None:
    """Decorated functions are pickled by reference, as functions are; copies start from scratch."""
    assert pickle.loads(pickle.dumps(double)) is double
    double(X)
    for fresh in (copy.copy(double), copy.deepcopy(double)):
        assert fresh is not double
        assert (fresh.eager, fresh.policy, fresh.name) == (double.eager, double.policy, double.name)
        assert fresh.stats.calls == 0
        torch.testing.assert_close(fresh(X), 2 * X)
        assert fresh.stats.compiled_calls == 1
    local = compile_with_fallback(lambda x: x)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(local)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(compile_with_fallback(functools.partial(double.eager)))


def make_module() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())


def test_module_in_place() -> None:
    """The module keeps its object, class and state_dict keys, falls back and recovers, and its hooks run once."""
    module = make_module()
    keys, hooks = list(module.state_dict()), []
    module.register_forward_hook(lambda *args: hooks.append(1))
    twin = copy.deepcopy(module)
    compiled = compile_with_fallback(module, backend=Compiler(first(2)), policy=EVERY_CALL)
    assert compiled is module
    assert type(compiled) is torch.nn.Sequential
    assert list(compiled.state_dict()) == keys
    x = torch.randn(5, 3)
    for _ in range(4):
        torch.testing.assert_close(compiled(x), twin(x))
    assert compiled.state_dict()["1.num_batches_tracked"] == 4
    assert len(hooks) == 8
    function = compiled_function(module)
    assert (function.stats.eager_calls, function.stats.compiled_calls, function.state) == (2, 2, CompileState.COMPILED)
    assert function.name == "Sequential"


def test_module_copies_and_files() -> None:
    """A deep copy gets its own compiled call; a saved module loads as a plain one."""
    module = compile_with_fallback(make_module(), backend="eager", policy=RetryPolicy(clock=lambda: 0.0))
    x = torch.randn(5, 3)
    module(x)
    twin = copy.deepcopy(module)
    assert compiled_function(twin) is not compiled_function(module)
    with torch.no_grad():
        twin.get_parameter("0.weight").zero_()
    assert not torch.equal(twin(x), module(x))
    assert (compiled_function(twin).stats.calls, compiled_function(module).stats.calls) == (1, 2)

    holder = torch.nn.ModuleList([module])
    assert compiled_function(copy.deepcopy(holder)[0]) is not compiled_function(module)

    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded.eval()(x), module.eval()(x))
    with pytest.raises(TypeError, match="Sequential has not been compiled"):
        compiled_function(loaded)
    again = compile_with_fallback(loaded, backend="eager")
    again(x)
    assert compiled_function(again).stats.compiled_calls == 1


def test_module_decorated_twice() -> None:
    """The second decoration replaces the first."""
    module = compile_with_fallback(
        compile_with_fallback(make_module(), backend="eager", name="a"), backend="eager", name="b"
    )
    module(torch.randn(5, 3))
    assert compiled_function(module).name == "b"


def test_decorated_twice() -> None:
    """Decorating a decorated or compiled function compiles the plain function."""
    once = compile_with_fallback(lambda x: x.sin(), backend="eager")
    twice = compile_with_fallback(once, backend=Compiler(first(1)), policy=EVERY_CALL)
    after_torch = compile_with_fallback(torch.compile(once.eager), backend=Compiler(first(1)), policy=EVERY_CALL)
    assert twice.eager is after_torch.eager is once.eager
    for fn in (twice, after_torch):
        for _ in range(3):
            torch.testing.assert_close(fn(X), X.sin())
        assert (fn.stats.eager_calls, fn.stats.compiled_calls) == (1, 2)
    assert once.stats.calls == 0


@pytest.mark.parametrize("held_off", [False, True])
def test_inside_an_outer_compile(held_off: bool) -> None:
    """An outer torch.compile(fullgraph=True) or torch.export traces the plain function, also as a method."""
    compiler = Compiler(first(10))
    inner = compile_with_fallback(lambda x: x.sin(), backend=compiler)
    holder = Holder()
    if held_off:
        inner(X)
    calls = inner.stats.calls
    cases: list[tuple[Callable[..., torch.Tensor], torch.Tensor]] = [
        (lambda x: inner(x) + 1, X.sin() + 1),
        (lambda x: holder.method(x) + 1, X * 3 + 1),
        (lambda x: Holder.static_inside(x) + Holder.static_outside(x), X * 4),
        (inner, X.sin()),
    ]
    for outer, expected in cases:
        graphs = Compiler()
        compiled = torch.compile(outer, fullgraph=True, backend=graphs)
        for _ in range(2):
            torch.testing.assert_close(compiled(X), expected)
        assert (graphs.asked, graphs.ran) == (1, 2)

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = inner(x) + 1
            return y

    for strict in (False, True):
        exported = torch.export.export(Net(), (X,), strict=strict)
        torch.testing.assert_close(exported.module()(X), X.sin() + 1)
    assert compiler.asked == held_off
    assert inner.stats.failures == held_off
    assert inner.stats.calls <= calls + 1


def test_class_methods_inside_an_outer_compile() -> None:
    """Dynamo breaks the graph there, because class methods must be plain functions to it; the result is correct."""
    cls: Any = Holder  # mypy binds class methods only if they are plain functions
    outer = torch.compile(lambda x: cls.class_inside(x * 2) + cls.class_outside(x), backend="eager")
    for _ in range(2):
        torch.testing.assert_close(outer(X), X * 9)


def test_an_outer_compile_that_breaks() -> None:
    """If the outer compile cannot trace the decorated function, the function still runs, once."""
    ran: list[int] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        torch.compiler.disable(ran.append)(1)
        return x.sin()

    inner = compile_with_fallback(step, backend="eager")
    outer = torch.compile(lambda x: inner(x * 2) + 1, backend="eager")
    for n in range(1, 4):
        torch.testing.assert_close(outer(X), (X * 2).sin() + 1)
        assert len(ran) == n


def test_a_compiled_module_inside_an_outer_compile() -> None:
    """An outer compile traces the plain module."""
    module = compile_with_fallback(make_module(), backend=Compiler(first(10)))
    outer = torch.compile(lambda x: module(x) + 1, backend="eager", fullgraph=True)
    outer(torch.randn(5, 3))
    assert compiled_function(module).stats.calls == 0


@pytest.mark.parametrize("fails", [0, 2])
def test_ten_closures_of_one_factory(fails: int) -> None:
    """All ten compile, although the recompile limit is eight."""

    def make(k: float) -> CompiledFunction[[torch.Tensor], torch.Tensor]:
        return compile_with_fallback(lambda x: x * k, backend=Compiler(first(fails)), policy=EVERY_CALL)

    functions = [make(float(k)) for k in range(10)]
    for _ in range(4):
        for k, fn in enumerate(functions):
            torch.testing.assert_close(fn(X), X * k)
    assert all(fn.stats.compiled_calls == 4 - fails for fn in functions)


def plus_one_after_a_graph_break(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x + 1


@pytest.mark.skipif(torch.__version__ < "2.12", reason="there a function that all of them call has one limit")
@pytest.mark.parametrize("fails", [0, 3])
def test_many_closures_of_one_factory(fails: int) -> None:
    """They exceed torch's limit for all compiles of one code object, and fallbacks do not count towards it."""

    def make(k: float) -> CompiledFunction[[torch.Tensor], torch.Tensor]:
        def step(x: torch.Tensor) -> torch.Tensor:
            return plus_one_after_a_graph_break(x * k)

        return compile_with_fallback(step, backend=Compiler(first(fails)), policy=EVERY_CALL)

    with torch._dynamo.config.patch(accumulated_recompile_limit=10):
        functions = [make(float(k)) for k in range(11)]
        for _ in range(6):
            for k, fn in enumerate(functions):
                torch.testing.assert_close(fn(X), X * k + 1)
    assert {(fn.state, fn.stats.failures) for fn in functions} == {(CompileState.COMPILED, fails)}
    assert min(fn.stats.compiled_calls for fn in functions) >= 2


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x).relu())
        return y


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning")
@pytest.mark.parametrize("where", ["module inside DDP", "step round DDP"])
def test_ddp(where: str) -> None:
    """A module compiled in place under DDP, and a step that calls a DDP module, fall back, recover, and train."""
    torch.manual_seed(0)
    plain = Net()
    twin = copy.deepcopy(plain)
    compiler = Compiler(first(2))
    step: Callable[..., torch.Tensor]
    function: CompiledFunction[..., Any]
    if where == "module inside DDP":
        compile_with_fallback(plain, backend=compiler, policy=EVERY_CALL)
        model = torch.nn.parallel.DistributedDataParallel(plain)
        step, function = model.__call__, compiled_function(plain)
    else:
        model = torch.nn.parallel.DistributedDataParallel(plain)

        def call_model(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = model(x)
            return y

        step = function = compile_with_fallback(call_model, backend=compiler, policy=EVERY_CALL)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, twin)]
    for _ in range(5):
        x = torch.randn(4, 3)
        losses = [step(x).pow(2).mean(), twin(x).pow(2).mean()]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(plain.state_dict(), twin.state_dict())
    assert function.stats.failures == 2
    assert function.state is CompileState.COMPILED
    assert function.stats.compiled_calls >= 2


@pytest.mark.long
def test_modules_that_other_threads_call_during_an_attempt(tmp_path: Path) -> None:
    """Inductor's first compile in a process traces with FX, which affects modules in all threads."""
    code = """
import threading, torch
from compile_retry import compile_with_fallback
module, errors, create_node, traced = torch.nn.Linear(2, 2), [], torch.fx.Tracer.create_node, []

def call():
    try:
        module(torch.ones(2))
    except Exception as exc:
        errors.append(exc)

def meanwhile(tracer, *args, **kwargs):
    traced.append(tracer)
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return create_node(tracer, *args, **kwargs)

torch.fx.Tracer.create_node = meanwhile
fn = compile_with_fallback(lambda x: x.sin() + 1)
fn(torch.ones(2))
assert fn.stats.compiled_calls == 1 and traced and not errors, errors
"""
    # The cache is off, and without vector instructions the compile is faster.
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200, env=environment)


@pytest.mark.usefixtures("measured")
def test_an_old_torch_is_refused() -> None:
    """Importing the package on an old torch raises an error that says so, before anything else can fail."""
    code = "import torch; torch.__version__ = type(torch.__version__)('2.9.1'); import compile_retry"
    process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=200)
    assert process.returncode == 1
    assert process.stderr.endswith("ImportError: compile_retry requires torch 2.10 or later, this is 2.9.1\n")


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning")
def test_ddp_with_buckets_that_dynamo_cannot_divide() -> None:
    """The step continues although torch raises before there is a graph, even in frames that Dynamo would skip."""
    plain = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    twin = copy.deepcopy(plain)
    model = torch.nn.parallel.DistributedDataParallel(plain, bucket_cap_mb=0.0001)
    compile_with_fallback(model, backend=Compiler(), policy=EVERY_CALL)
    for _ in range(3):
        x = torch.randn(4, 8)
        losses = [net(x).pow(2).mean() for net in (model, twin)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    for ours, theirs in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    stats = compiled_function(model).stats
    assert (stats.calls, stats.compiled_calls) == (3, 0)
    with compile_retry.set_strict(True), pytest.raises(AssertionError):
        model(torch.randn(4, 8))
