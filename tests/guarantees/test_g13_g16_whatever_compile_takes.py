"""G13 and G16: everything that torch.compile accepts, with as many compiles as it needs."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, compiled_function
from support import Compiler, first

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
X = torch.arange(8.0).reshape(2, 4)
Make = Callable[[Any, Compiler, Compiler], Any]


class Stock:
    """Compiles functions, and modules in place, with torch.compile."""

    def function(self, fn: Any, backend: Compiler, **options: Any) -> Any:
        return torch.compile(fn, backend=backend, **options)

    def module(self, module: nn.Module, backend: Compiler) -> nn.Module:
        module.compile(backend=backend)
        return module


class Ours:
    """Compiles functions, and modules in place, with compile_with_fallback."""

    def function(self, fn: Any, backend: Compiler, **options: Any) -> Any:
        return compile_with_fallback(fn, backend=backend, policy=EVERY_CALL, **options)

    module = function


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.relu()

    def score(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.sum(-1)

    @property
    def scorer(self) -> Any:
        return self.score


class Plain:
    factor = 3.0

    def method(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor

    @classmethod
    def of_class(cls, x: torch.Tensor) -> torch.Tensor:
        return x * cls.factor

    @staticmethod
    def static(x: torch.Tensor) -> torch.Tensor:
        return x.cos() + 1


class Calls:
    """A callable object."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def doubled(self: Net, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = self.linear(x)
    return y * 2


def assert_as_stock(make: Make) -> Any:
    """Compile with both, call three times, and compare results, errors and the backends' compiles.

    Args:
        make: Takes the compiler and two backends. The second is for parts compiled before the whole.

    Returns:
        The result of `make` for compile_with_fallback.
    """
    seen = []
    for kind in (Stock(), Ours()):
        torch._dynamo.reset()
        torch.manual_seed(0)
        outer, inner = Compiler(), Compiler()
        fn = make(kind, outer, inner)
        seen.append(([fn(X) for _ in range(3)], outer.asked, inner.asked))
    torch.testing.assert_close(*(results for results, *_ in seen))
    assert seen[1][1:] == seen[0][1:]
    return fn


FUNCTIONS: dict[str, Callable[[], Any]] = {
    "function": lambda: sine,
    "partial": lambda: functools.partial(sine),
    "partial of a builtin": lambda: functools.partial(torch.mul, other=3),
    "partial of a partial of a method": lambda: functools.partial(functools.partial(Plain().method)),
    "callable object": lambda: Calls(sine),
    "callable object in another": lambda: Calls(Calls(sine)),
    "method": lambda: Plain().method,
    "class method": lambda: Plain().of_class,
    "static method": lambda: Plain.static,
    "method of a module": lambda: Net().score,
    "method from a property": lambda: Net().scorer,
    "forward": lambda: Net().forward,
    "call of a module": lambda: Net().__call__,
    "forward of a Sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()).forward,
    "bound callable object": lambda: types.MethodType(Calls(lambda self, x: x.sin()), 3),
    "bound partial": lambda: types.MethodType(functools.partial(lambda a, b, x: x * a, 2), 3),
    "builtin": lambda: torch.sin,
    "operator": lambda: torch.ops.aten.sin.default,
    "decorated with wraps": lambda: functools.wraps(sine)(lambda *args: sine(*args) * 2),
    "under no_grad": lambda: torch.no_grad()(sine),
    "cached": lambda: functools.lru_cache(sine),
    "disabled": lambda: torch.compiler.disable(sine),
}


@pytest.mark.filterwarnings("ignore:.*lru_cache.*")
@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions(case: str) -> None:
    """All kinds of callables behave as under torch.compile."""
    assert_as_stock(lambda kind, outer, inner: kind.function(FUNCTIONS[case](), outer))


FORWARDS: dict[str, Callable[[Net, Any, Compiler], Any]] = {
    "lambda": lambda net, kind, inner: lambda x, forward=net.forward: forward(x) + 1,
    "partial": lambda net, kind, inner: functools.partial(net.forward),
    "partial that looks like it": lambda net, kind, inner: functools.update_wrapper(
        functools.partial(lambda forward, x: forward(x), net.forward), net.forward
    ),
    "callable object": lambda net, kind, inner: Calls(net.forward),
    "another method": lambda net, kind, inner: types.MethodType(doubled, net),
    "bound callable object": lambda net, kind, inner: types.MethodType(Calls(doubled), net),
    "function of torch's": lambda net, kind, inner: torch.sin,
    "compiled": lambda net, kind, inner: kind.function(net.forward, inner),
    "compiled by torch": lambda net, kind, inner: torch.compile(net.forward, backend=inner),
    "partial of compiled": lambda net, kind, inner: functools.partial(kind.function(net.forward, inner)),
    "disabled": lambda net, kind, inner: torch.compiler.disable(net.forward),
}


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("how", ["in place", "in place before", "its forward", "its score", "its call"])
def test_a_replaced_forward(forward: str, how: str) -> None:
    """If `forward` is replaced, as by inference scripts, adapters and placement hooks, module and methods compile."""

    def make(kind: Any, outer: Compiler, inner: Compiler) -> Any:
        net: Any = Net()
        if how == "in place before":
            kind.module(net, outer)
        net.forward = FORWARDS[forward](net, kind, inner)
        if how == "in place":
            kind.module(net, outer)
        if how == "its forward":
            net.forward = kind.function(net.forward, outer)
        return {"its score": net.score, "its call": net.__call__}.get(how, net)

    def compiled(kind: Any, outer: Compiler, inner: Compiler) -> Any:
        made = make(kind, outer, inner)
        return made if isinstance(made, nn.Module) else kind.function(made, outer)

    assert_as_stock(compiled)


@pytest.mark.parametrize("forward", ["partial", "callable object", "compiled"])
def test_a_replaced_forward_falls_back_and_recovers(forward: str) -> None:
    """Failures are counted for the compiled function."""
    net: Any = Net()
    expected = net(X)
    compiler = Compiler(first(2))
    net.forward = FORWARDS[forward](net, Ours(), compiler)
    function = net.forward if forward == "compiled" else compiled_function(Ours().module(net, compiler))
    for _ in range(4):
        torch.testing.assert_close(net(X), expected)
    stats = function.stats
    assert (stats.eager_calls, stats.compiled_calls, stats.failures, stats.recoveries) == (2, 2, 2, 1)
    assert function.state is CompileState.COMPILED


def in_class(kind: Any, backend: Compiler) -> Any:
    class InClass(Net):
        forward = kind.function(Net.forward, backend)

        def call_twice(self, x: torch.Tensor) -> Any:
            return self(self(x))

    return InClass


def broken(x: torch.Tensor) -> torch.Tensor:
    x = x.sin()
    torch._dynamo.graph_break()
    return x.cos()


def call_and_double(step: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return step(x) * 2


class Holder(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.held = nn.ModuleList(modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.held:
            x = module(x)
        return x


def hooked(net: nn.Module, hook: Callable[..., None]) -> nn.Module:
    net.register_forward_pre_hook(hook)
    return net


def calling_its_parent(kind: Any, outer: Compiler) -> Any:
    class Child(in_class(kind, outer)):  # type: ignore[misc]  # a class defined for this test
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x) + 1

    return Child()


def partial_method(kind: Any, outer: Compiler) -> Any:
    class WithPartial:
        double = functools.partialmethod(kind.function(lambda self, by, x: x * by, outer), 2)

    return WithPartial().double


def cached_property(kind: Any, outer: Compiler) -> Any:
    class WithProperty:
        value = functools.cached_property(kind.function(lambda self: X.sin(), outer))

    return lambda x: WithProperty().value


MADE: dict[str, Make] = {
    "decorated forward": lambda kind, outer, inner: in_class(kind, outer)(),
    "decorated forward, module compiled too": lambda kind, outer, inner: kind.module(in_class(kind, inner)(), outer),
    "decorated forward, method beside it": lambda kind, outer, inner: kind.function(
        in_class(kind, inner)().score, outer
    ),
    "decorated forward, called by a method": lambda kind, outer, inner: kind.function(
        in_class(kind, inner)().call_twice, outer, fullgraph=True
    ),
    "decorated forward, held": lambda kind, outer, inner: kind.module(Holder(in_class(kind, inner)()), outer),
    "decorated forward, in a Sequential": lambda kind, outer, inner: nn.Sequential(in_class(kind, outer)()),
    "decorated forward, called by a subclass": lambda kind, outer, inner: calling_its_parent(kind, outer),
    "compiled modules, held": lambda kind, outer, inner: kind.module(
        Holder(kind.module(Net(), inner), kind.module(Net(), inner)), outer
    ),
    "module with a hook": lambda kind, outer, inner: kind.module(hooked(Net(), lambda *args: None), outer),
    "module with a disabled hook": lambda kind, outer, inner: kind.module(
        hooked(Net(), torch.compiler.disable(lambda *args: None)), outer
    ),
    "partial of compiled": lambda kind, outer, inner: kind.function(
        functools.partial(kind.function(sine, inner)), outer
    ),
    "callable object of compiled": lambda kind, outer, inner: kind.function(Calls(kind.function(sine, inner)), outer),
    "compiled by torch": lambda kind, outer, inner: kind.function(torch.compile(sine, backend=inner), outer),
    "compiled function that breaks the graph": lambda kind, outer, inner: kind.function(
        functools.partial(call_and_double, kind.function(broken, inner)), outer
    ),
    "partial method": lambda kind, outer, inner: partial_method(kind, outer),
    "cached property": lambda kind, outer, inner: cached_property(kind, outer),
}


@pytest.mark.parametrize("case", MADE)
def test_compiled_in_compiled(case: str) -> None:
    """Decorated methods and modules in each other are traced in one graph, or each compiles on its own."""
    assert_as_stock(MADE[case])


def test_a_decorated_forward_counts_its_own_calls() -> None:
    """If a module and its forward are both compiled, the forward's calls are compiled and the module's are eager."""
    net = Ours().module(in_class(Ours(), Compiler(first(1)))(), Compiler())
    for _ in range(3):
        net(X)
    forward: Any = net.forward
    assert (forward.stats.eager_calls, forward.stats.compiled_calls) == (1, 2)
    assert (compiled_function(net).stats.eager_calls, compiled_function(net).stats.attempts) == (3, 0)


def test_compiling_again_compiles_the_plain_function() -> None:
    """This includes bound methods of decorated or compiled functions, which torch.compile does not accept again."""
    decorators: tuple[Any, ...] = (compile_with_fallback(backend="eager"), torch.compile)
    for decorate in decorators:

        class Decorated(Plain):
            method = decorate(Plain.method)

        again: Any = compile_with_fallback(Decorated().method, backend=Compiler())
        torch.testing.assert_close(again(X), X * 3)
        assert again.stats.compiled_calls == 1


def test_a_wrapper_around_a_compiled_function() -> None:
    """It compiles in one graph. torch.compile refuses it, because functools.wraps copies its marks."""
    inner = torch.compile(sine, backend="eager")
    compiler = Compiler()
    fn = compile_with_fallback(functools.wraps(inner)(lambda x: inner(x) * 2), backend=compiler)
    torch.testing.assert_close(fn(X), sine(X) * 2)
    assert (fn.stats.compiled_calls, compiler.asked) == (1, 1)


class Parent(Net):
    forward = compile_with_fallback(Net.forward, backend="eager")


class CallsByName(Parent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Parent.forward(self, x) + 1


class CallsSuper(Parent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def test_decorated_parents_under_fullgraph() -> None:
    """They are traced if called by name. Dynamo cannot trace super(), and that call falls back."""
    for net, state in ((CallsByName(), CompileState.COMPILED), (CallsSuper(), CompileState.GAVE_UP)):
        fn = compile_with_fallback(net.forward, backend="eager", fullgraph=True)
        torch.testing.assert_close(fn(X), Net()(X) + 1)
        assert fn.state is state
