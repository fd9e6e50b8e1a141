"""`install()`: ``torch.compile`` itself falls back and recovers, and is otherwise stock."""

from __future__ import annotations

import bisect
import copy
import functools
import inspect
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn

import compile_retry
from compile_retry import CompileState, RetryPolicy, compile_with_fallback, compiled_function, install, set_strict
from compile_retry.testing import fail_compiles
from support import Compiler, first

STOCK = torch.compile
X = torch.linspace(-1, 1, 6).reshape(2, 3)


def torch_compile(fn: Any, **options: Any) -> Any:
    return torch.compile(fn, **options)


def stock_compile(fn: Any, **options: Any) -> Any:
    return STOCK(fn, **options)


@pytest.fixture
def installed() -> Iterator[None]:
    with install(RetryPolicy.every(calls=2)):
        yield


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.relu()


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def descend(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_looks_like_stock() -> None:
    """``torch.compile`` keeps its signature, name and doc, and is stock's own again after the block."""
    with install():
        assert torch.compile is not STOCK
        assert inspect.signature(torch.compile) == inspect.signature(STOCK)
        assert (torch.compile.__name__, torch.compile.__module__) == (STOCK.__name__, STOCK.__module__)
        assert torch.compile.__doc__ == STOCK.__doc__
        assert pickle.loads(pickle.dumps(torch.compile)) is torch.compile
    assert torch.compile is STOCK


def test_installed_twice() -> None:
    """Installing again does not wrap again. The newest policy is used, and the last removal restores stock."""
    outer, inner = RetryPolicy.every(calls=3), RetryPolicy.every(calls=5)
    with install(outer):
        only = torch.compile
        handle = install(inner)
        assert torch.compile is only
        assert compiled_function(torch_compile(sine)).policy is inner
        handle.remove()
        handle.remove()
        assert compiled_function(torch_compile(sine)).policy is outer
    assert torch.compile is STOCK


def test_installed_by_many_threads() -> None:
    """After all threads have removed their installations, ``torch.compile`` is stock's own."""

    def repeat() -> None:
        for _ in range(200):
            with install():
                pass

    threads = [threading.Thread(target=repeat) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.compile is STOCK


def test_a_patch_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's patch stays in place, and what it calls is stock again once removed."""
    handle = install()
    ours = torch.compile

    def patched(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", patched)
    fn = torch_compile(sine, backend=Compiler(first(1)))
    torch.testing.assert_close(fn(X), sine(X))
    assert compiled_function(fn).stats.failures == 1
    handle.remove()
    assert torch.compile is patched
    with pytest.raises(TypeError, match="must be a function or module"):
        compiled_function(torch_compile(sine, backend="eager"))
    monkeypatch.undo()
    torch.compile = STOCK


def test_a_wrong_policy() -> None:
    """Raises, and installs nothing."""
    with pytest.raises(TypeError, match="policy must be a RetryPolicy"):
        install(30)  # type: ignore[arg-type]  # the wrong type, on purpose
    assert torch.compile is STOCK


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("make", [make_model, Block], ids=["torch's own forward", "user's forward"])
def test_a_module_survives(make: Callable[[], nn.Module]) -> None:
    """It trains like its eager twin through a failure and the recovery."""
    plain = make()
    model, twin = copy.deepcopy(plain), plain
    compiled = torch_compile(model, backend=Compiler(first(1)))
    assert descend(compiled, 5) == pytest.approx(descend(twin, 5))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    function = compiled_function(compiled)
    assert (function.stats.calls, function.stats.failures, function.state) == (5, 1, CompileState.COMPILED)
    assert function.name == type(plain).__qualname__


@pytest.mark.usefixtures("installed")
def test_a_compiled_module_is_that_of_stock() -> None:
    """It has the class, names, attributes and hooks of what stock returns."""
    model = make_model()
    compiled, stock = torch_compile(model, backend="aot_eager"), stock_compile(model, backend="aot_eager")
    assert type(compiled) is type(stock)
    assert compiled._orig_mod is model
    assert list(compiled.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert vars(compiled).keys() == vars(stock).keys()
    assert compiled.get_compiler_config() == stock.get_compiler_config()
    assert compiled.dynamo_ctx.fullgraph == stock.dynamo_ctx.fullgraph
    seen: list[str] = []
    model.register_forward_hook(lambda *args: seen.append("model"))
    compiled.register_forward_hook(lambda *args: seen.append("compiled"))
    for _ in range(2):
        compiled(X)
    assert seen.count("compiled") == 2
    assert compiled_function(compiled).stats.compiled_calls == 2


@pytest.mark.usefixtures("installed")
def test_copies_of_a_compiled_module() -> None:
    """A deep copy has a fallback of its own. A pickle is that of stock, and needs no compile_retry to be loaded."""
    compiled = torch_compile(make_model(), backend="aot_eager")
    twin = copy.deepcopy(compiled)
    with fail_compiles(OSError, times=1):
        torch.testing.assert_close(twin(X), compiled(X))
    assert compiled_function(twin) is not compiled_function(compiled)
    assert twin._orig_mod is not compiled._orig_mod
    data = pickle.dumps(compiled)
    assert b"compile_retry" not in data
    torch.testing.assert_close(pickle.loads(data)(X), compiled(X))
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), compiled(X))


@pytest.mark.usefixtures("installed")
def test_a_lazy_module() -> None:
    """Its parameters are initialized at the first call, and its call survives."""
    model = nn.LazyLinear(2)
    compiled = torch_compile(model, backend=Compiler(first(1)))
    outputs = [compiled(X) for _ in range(4)]
    torch.testing.assert_close(outputs, [model(X)] * 4)
    assert compiled_function(compiled).stats.failures == 1


@pytest.mark.usefixtures("installed")
def test_modules_compiled_in_place() -> None:
    """``nn.Module.compile`` survives. A deep copy is not compiled, as in stock."""
    model, twin = make_model(), make_model()
    model.compile(backend=Compiler(first(1)))
    assert descend(model, 4) == pytest.approx(descend(twin, 4))
    stats = compiled_function(model).stats
    assert (stats.failures, stats.recoveries) == (1, 1)
    with pytest.raises(TypeError, match="has not been compiled"):
        compiled_function(copy.deepcopy(model))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("compiler", [torch.compile, torch.compiler.compile], ids=["torch", "torch.compiler"])
def test_functions(compiler: Callable[..., Any]) -> None:
    """A function stays a function with the attributes that stock gives it, and survives."""
    compiler = torch.compile if compiler is STOCK else compiler
    fn, stock = compiler(sine, backend=Compiler(first(1))), stock_compile(sine, backend="eager")
    assert type(fn) is FunctionType
    assert vars(fn).keys() == vars(stock).keys()
    assert (fn.__name__, inspect.unwrap(fn), inspect.signature(fn)) == ("sine", sine, inspect.signature(sine))
    for _ in range(3):
        torch.testing.assert_close(fn(X), sine(X))
    assert (compiled_function(fn).stats.failures, compiled_function(fn).stats.recoveries) == (1, 1)


@pytest.mark.usefixtures("installed")
def test_decorators_with_arguments() -> None:
    """They work on functions and on methods in a class body."""
    backend = Compiler(first(1))

    class Scale:
        def __init__(self, by: float) -> None:
            self.by = by

        @torch.compile(backend=backend, fullgraph=True)
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.by * x

    for _ in range(3):
        torch.testing.assert_close(Scale(2.0)(X), 2 * X)
    assert backend.asked == 2
    assert compiled_function(Scale.__call__).stats.recoveries == 1


@pytest.mark.usefixtures("installed")
def test_what_a_decorator_with_arguments_is() -> None:
    """It is a function, as in stock, can be used repeatedly, and takes a function only. A partial works as well."""
    decorator, stock = torch_compile(None, dynamic=True, backend="aot_eager"), stock_compile(None, dynamic=True)
    assert (type(decorator), decorator.__name__) == (type(stock), stock.__name__)
    partial = functools.partial(torch.compile, backend="aot_eager", dynamic=True)
    for fn in (decorator(sine), decorator(sine), partial(sine)):
        with fail_compiles(OSError, times=1):
            torch.testing.assert_close([fn(X) for _ in range(3)], [sine(X)] * 3)
        assert compiled_function(fn).stats.calls == 3
    with pytest.raises(RuntimeError) as expected:
        stock(None)
    with pytest.raises(RuntimeError, match=str(expected.value)):
        decorator(None)


def breaks(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2


@pytest.mark.usefixtures("installed")
def test_a_graph_break_with_fullgraph(caplog: pytest.LogCaptureFixture) -> None:
    """It is a permanent failure: eager results, an ERROR line, and no retry. Strict mode raises, as stock does."""
    fn = torch_compile(breaks, backend="eager", fullgraph=True)
    torch.testing.assert_close([fn(X) for _ in range(4)], [breaks(X)] * 4)
    assert (compiled_function(fn).state, compiled_function(fn).stats.attempts) == (CompileState.GAVE_UP, 1)
    (line,) = (record for record in caplog.records if record.name == "compile_retry")
    assert (line.levelname, "graph_break" in line.getMessage()) == ("ERROR", True)
    with set_strict(True), pytest.raises(torch._dynamo.exc.Unsupported):
        torch_compile(breaks, backend=Compiler(), fullgraph=True)(X)  # another backend: it shares no verdict


def compile_module(block: nn.Module, backend: Any) -> Any:
    return torch.compile(block, backend=backend)


def compile_in_place(block: nn.Module, backend: Any) -> nn.Module:
    block.compile(backend=backend)
    return block


def compile_forward(block: nn.Module, backend: Any) -> nn.Module:
    block.forward = torch.compile(block.forward, backend=backend)
    return block


@pytest.mark.parametrize(
    ("compiles", "make"),
    [
        (compile_module, Block),
        (compile_in_place, Block),
        (compile_forward, Block),
        (compile_module, make_model),  # in place, stock compiles none of these
    ],
)
def test_equal_blocks(compiles: Callable[[nn.Module, Any], Any], make: Callable[[], nn.Module]) -> None:
    """Twenty equal blocks are compiled as often as in stock, not twenty times."""

    def count() -> int:
        torch._dynamo.reset()
        backend = Compiler()
        blocks = [compiles(make(), backend) for _ in range(20)]
        for _ in range(2):
            for block in blocks:
                block(X)
        return backend.asked

    expected = count()
    with install(RetryPolicy.every(calls=2)):
        assert count() == expected
    assert 1 <= expected <= 2


@pytest.mark.usefixtures("installed")
def test_compiled_in_many_threads() -> None:
    """Threads may call ``torch.compile`` and what it returns at once: each has its result, through a failure."""
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        fn = torch_compile(lambda x: x * number, backend=Compiler(first(1)))
        model = torch_compile(nn.Identity(), backend=Compiler(first(1)))
        results[number] = [fn(model(X)) for _ in range(4)], compiled_function(fn).stats.recoveries

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(results, {number: ([X * number] * 4, 1) for number in range(4)})


@pytest.mark.usefixtures("installed")
def test_disabled_functions_and_stances() -> None:
    """``torch.compiler.disable`` and ``torch.compiler.set_stance`` have the effect that they have in stock."""
    inside: list[bool] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no annotations here
    def off(x: torch.Tensor) -> torch.Tensor:
        inside.append(torch.compiler.is_compiling())
        return x + 1

    def calls_off(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = off(x * 2)
        return y * 3

    backend = Compiler(first(1))
    fn = torch_compile(calls_off, backend=backend)
    torch.testing.assert_close([fn(X) for _ in range(4)], [(X * 2 + 1) * 3] * 4)
    assert inside == [False] * 4

    backend = Compiler()
    fn = torch_compile(sine, backend=backend)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(fn(X), sine(X))
    assert backend.asked == 0
    torch.testing.assert_close(fn(X), sine(X))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(fn(X), sine(X))
        with pytest.raises(RuntimeError, match="recompile"):
            fn(X.double())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:  # a parameter of the test
    """``torch.export`` takes a compiled module, and modules that contain one, as in stock."""
    model = Block()
    compiled = torch_compile(model, backend=Compiler(first(10)))
    for target in (compiled, nn.Sequential(compiled)):
        exported = torch.export.export(target, (X,), strict=strict)
        torch.testing.assert_close(exported.module()(X), model(X))
    assert compiled_function(compiled).stats.failures == 0


@pytest.mark.usefixtures("installed")
def test_callable_objects() -> None:
    """An object with a ``__call__`` and a bound method survive."""

    class Doubles:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    for target in (Doubles(), Doubles().__call__):
        fn = torch_compile(target, backend=Compiler(first(1)))
        for _ in range(3):
            torch.testing.assert_close(fn(X), 2 * X)
        assert compiled_function(fn).stats.recoveries == 1


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "options",
    [{"backend": "nonsense"}, {"bakend": "inductor"}, {"mode": "default", "options": {}}, {"mode": "nonsense"}],
    ids=str,
)
def test_wrong_arguments(options: dict[str, Any]) -> None:
    """Raise the error of stock, in a plain call and as a decorator."""
    with pytest.raises(Exception) as expected:
        STOCK(sine, **options)
    with pytest.raises(type(expected.value)) as raised:
        torch_compile(sine, **options)
    assert str(raised.value) == str(expected.value)
    with pytest.raises(type(expected.value)):
        torch_compile(None, **options)(sine)


@pytest.mark.usefixtures("installed")
def test_options_are_not_changed() -> None:
    """``torch.compile`` removes some entries from ``options``; later attempts need them."""
    options = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    fn = torch_compile(sine, options=dict(options), backend="eager")
    torch.testing.assert_close(fn(X), sine(X))
    assert compiled_function(fn).state is CompileState.COMPILED


def compiled_by_torch(fn: Callable[..., Any]) -> Any:
    """Compile in a frame of one of PyTorch's own files."""
    names: dict[str, Any] = {"torch": torch, "fn": fn}
    exec(compile("result = torch.compile(fn, backend='eager')", torch.__file__, "exec"), names)
    return names["result"]


def generate(x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield x + 1


@pytest.mark.usefixtures("installed")
def test_what_stays_stock() -> None:
    """PyTorch's own compiles, generator functions and disabled compiles get no fallback."""
    assert torch_compile(sine, disable=True) is sine
    generator = torch_compile(generate, backend="eager")
    torch.testing.assert_close(list(generator(X)), [X + 1])
    for fn in (compiled_by_torch(sine), generator):
        with pytest.raises(TypeError, match="must be a function or module"):
            compiled_function(fn)


@pytest.mark.usefixtures("installed")
def test_compiled_again() -> None:
    """What has been compiled or decorated before is compiled once, from the plain function or module."""
    decorated = compile_with_fallback(sine, backend="eager")
    for fn in (torch_compile(sine, backend="eager"), decorated):
        again = torch_compile(fn, backend=Compiler(first(1)))
        assert compiled_function(again).eager is sine
        for _ in range(3):
            torch.testing.assert_close(again(X), sine(X))
        assert compiled_function(again).stats.recoveries == 1
        assert compile_with_fallback(again).eager is sine
    model, stock = torch_compile(Block(), backend="eager"), stock_compile(Block(), backend="eager")
    again = torch_compile(model, backend="eager")
    assert type(again) is type(stock_compile(stock, backend="eager"))
    torch.testing.assert_close(again(X), model(X))
    assert compiled_function(again).eager == model._orig_mod.forward


@pytest.mark.usefixtures("installed")
def test_inside_an_outer_compile() -> None:
    """It is traced as the plain function or module, and so is a compile that the outer function makes."""
    inner, block = torch_compile(sine, backend="eager"), torch_compile(Block(), backend="eager")
    backend = Compiler()

    @torch.compile(backend=backend, fullgraph=True)
    def outer(x: torch.Tensor) -> Any:
        return block(inner(x))

    torch.testing.assert_close(outer(X), block._orig_mod(sine(X)))
    assert backend.asked == 1
    assert compiled_function(inner).stats.calls == 0

    @torch.compile(backend=backend)
    def compiles(x: torch.Tensor) -> Any:
        return torch_compile(sine, backend="eager")(x) + 1

    torch.testing.assert_close(compiles(X), sine(X) + 1)


@pytest.mark.usefixtures("installed")
def test_behind_a_graph_break() -> None:
    """A function that is called where Dynamo sees its frame, here from C, compiles on its own."""
    inner = torch_compile(sine, backend=Compiler(first(1)))

    @torch.compile(backend="eager")
    def outer(x: torch.Tensor) -> int:
        return bisect.bisect([x * 2], 1.5, key=inner)

    for _ in range(3):
        assert outer(torch.tensor(1.0)) == 0
    assert compiled_function(inner).stats.calls == 3
    assert compiled_function(inner).stats.recoveries == 1


@pytest.mark.usefixtures("installed")
def test_a_context_that_compiles_other_functions() -> None:
    """Lightning compiles the steps of a LightningModule with the ``dynamo_ctx`` of the compiled module."""
    model = Block()
    context = torch_compile(model, backend=Compiler(first(1))).dynamo_ctx
    step = context(model.forward)
    for _ in range(3):
        torch.testing.assert_close(step(X), model.forward(X))
    assert compiled_function(step).stats.recoveries == 1


@pytest.mark.usefixtures("installed")
def test_the_report() -> None:
    """It includes what ``torch.compile`` has returned."""
    torch_compile(make_model(), backend="eager")(X)
    fn = torch_compile(sine, backend="eager")
    assert fn is not None
    assert compile_retry.report().functions[-1].name == "sine"
