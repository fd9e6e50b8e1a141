"""G13: a decorated function keeps the original's attributes, in copies and files too."""

from __future__ import annotations

import abc
import copy
import functools
import inspect
import io
import pickle
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compile_retry import CompiledFunction, CompileState, RetryPolicy, compile_with_fallback, compiled_function
from compile_retry.testing import FakeClock
from support import Compiler, full_disk

X = torch.arange(8.0).reshape(2, 4)


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


class Calls:
    """A callable object."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)


def test_attributes() -> None:
    """It has the original's attributes, later ones do not reach the original, and the library's own names win."""

    def step(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
        return x * by

    step.__dict__.update(tag="encoder", state="mine", reset="mine", eager="mine", stats="mine", name="mine")
    fn: Any = compile_with_fallback(step, backend="eager")
    stock: Any = torch.compile(step, backend="eager")
    assert fn.tag == stock.tag == "encoder"
    fn.tag, fn.later = "decoder", [1]
    torch.testing.assert_close(fn(X), X * 2)
    fn.reset()
    assert (fn.state, fn.eager, fn.name, fn.eager.name) == (
        CompileState.COMPILED,
        step,
        "step",
        "mine",
    )
    assert (step.__dict__["tag"], "later" in vars(step)) == ("encoder", False)
    for twin in (copy.copy(fn), copy.deepcopy(fn)):
        assert (twin.tag, twin.later, twin.__wrapped__) == ("decoder", [1], step)
        torch.testing.assert_close(twin(X), X * 2)


def line_of(text: str) -> int:
    """The number of this file's only line with this text."""
    lines = [n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith(f"# {text}")]
    (number,) = lines
    return number


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # forward of its own
        return x * 2

    def encode(self, x: torch.Tensor) -> torch.Tensor:  # another method
        return x * 3


def test_where_a_failure_is_located(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the function or forward; where it was decorated if that is torch's or not Python. Deep copies keep that."""
    decorate: Any = compile_with_fallback(
        backend=Compiler(lambda inputs: full_disk()), policy=RetryPolicy(wait=1, clock=FakeClock())
    )
    sequential = decorate(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))  # a Sequential
    linear = compile_with_fallback(nn.Linear(4, 4), backend=Compiler(lambda inputs: full_disk()))  # a plain call
    tree: Any = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    tree.apply(lambda m: decorate(m) if isinstance(m, nn.Linear) else None)  # a lambda
    applied = nn.Sequential(nn.Linear(4, 4))
    applied.apply(decorate)  # apply itself
    expected = {
        sequential: ("Sequential", "a Sequential"),
        copy.deepcopy(sequential): ("Sequential", "a Sequential"),
        linear: ("Linear", "a plain call"),
        tree[0][0]: ("Linear", "a lambda"),
        applied: ("Sequential", "apply itself"),
    }
    for module, (name, text) in expected.items():
        module(X)
        failure = compiled_function(module).last_failure
        assert failure is not None
        assert (failure.frame, text) == ((name, __file__, line_of(text)), text)
    monkeypatch.setattr(torch, "compile", broken)  # so that there is no frame
    own = {
        compiled_function(decorate(Twice())): ("Twice", line_of("forward of its own")),
        decorate(Twice().encode): ("Twice", line_of("another method")),
        decorate(sine): ("sine", sine.__code__.co_firstlineno),
        decorate(functools.partial(sine)): ("sine", line_of("a partial")),  # a partial
        decorate(torch.sin): ("_VariableFunctionsClass.sin", line_of("a builtin")),  # a builtin
    }
    for fn, (name, line) in own.items():
        fn(X)
        assert fn.last_failure.frame == (name, __file__, line)


def broken(*args: Any, **kwargs: Any) -> Any:
    raise full_disk()


def test_compiled_function_of_anything() -> None:
    """A module, a bound method and the decorated function itself; anything else is refused."""

    class Model:
        @compile_with_fallback(backend="eager")
        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x

    fn = compile_with_fallback(sine, backend="eager")
    net = compile_with_fallback(nn.Linear(4, 4), backend="eager")
    assert compiled_function(fn) is fn
    assert compiled_function(Model().step) is compiled_function(Model.step) is vars(Model)["step"]
    assert compiled_function(net).name == "Linear"
    with pytest.raises(TypeError, match=r"fn must be a function or module from .*, not <function"):
        compiled_function(sine)
    with pytest.raises(TypeError, match=r"Linear has not been compiled by compile_with_fallback\(\)"):
        compiled_function(nn.Linear(1, 1))


@pytest.mark.parametrize("attribute", ["policy", "name"])
def test_what_cannot_be_assigned(attribute: str) -> None:
    """The policy and the name: the error says what to do instead. Copies keep them."""
    policy = RetryPolicy(wait=7)
    fn: Any = compile_with_fallback(sine, backend="eager", policy=policy, name="mine")
    for each in (fn, copy.copy(fn), copy.deepcopy(fn)):
        with pytest.raises(AttributeError, match=rf"the {attribute} of mine cannot be .*\(fn, {attribute}=\.\.\.\)"):
            setattr(each, attribute, getattr(each, attribute))
        with pytest.raises(AttributeError):
            delattr(each, attribute)
        assert (each.policy, each.name) == (policy, "mine")
    again = compile_with_fallback(fn, policy=RetryPolicy(wait=8), name="other")
    assert (again.policy.wait, again.name, again.eager) == (8, "other", sine)


def test_only_what_a_function_has_is_copied_by_wraps() -> None:
    """A wrapper made with `wraps`, and wrappers of it, get the function's attributes and none of the library's."""
    inner: Any = compile_with_fallback(functools.wraps(sine)(lambda x: x * 2), backend="eager")
    inner.tag = 1
    wrapper = functools.wraps(inner)(lambda x: inner(x) + 1)
    names = {"__module__", "__name__", "__qualname__", "__doc__", "__annotations__", "__annotate__", "__wrapped__"}
    assert vars(wrapper).keys() - names - {"__type_params__"} == {"tag"}
    outer: Any = compile_with_fallback(wrapper, backend="eager")
    torch.testing.assert_close(outer(X), X * 2 + 1)
    assert (outer.tag, outer.eager, outer.__wrapped__, outer.stats.calls, inner.stats.calls) == (
        1,
        wrapper,
        wrapper,
        1,
        0,
    )


def test_a_deep_copy_of_a_callable_object() -> None:
    """The object's attributes are copied with it."""
    fn: Any = compile_with_fallback(Calls(Calls(sine)), backend="eager")
    assert fn.fn is fn.eager.fn
    twin = copy.deepcopy(fn)
    assert twin.fn is twin.eager.fn is not fn.fn
    assert twin.__wrapped__ is twin.eager
    torch.testing.assert_close(twin(X), sine(X))


def test_abstract_methods() -> None:
    """Abstract methods stay abstract, whatever the order of decorators."""
    decorate = compile_with_fallback(backend="eager")

    class Abstract(abc.ABC):
        @decorate
        @abc.abstractmethod
        def inside(self) -> None: ...

        @abc.abstractmethod
        @decorate
        def outside(self) -> None: ...

        @decorate
        @staticmethod
        @abc.abstractmethod
        def static() -> None: ...

        @decorate
        @classmethod
        @abc.abstractmethod
        def of_class(cls) -> None: ...

        @property
        @decorate
        @abc.abstractmethod
        def value(self) -> None: ...

    assert Abstract.__abstractmethods__ == {"inside", "outside", "static", "of_class", "value"}
    with pytest.raises(TypeError, match="abstract"):
        Abstract()  # type: ignore[abstract]  # on purpose


def test_attributes_of_static_and_class_methods() -> None:
    """Attributes set by decorators below are kept on the method object."""
    kinds: tuple[Any, ...] = (staticmethod, classmethod)
    for kind in kinds:
        method = kind(sine)
        method.tag = 1
        assert compile_with_fallback(method, backend="eager").tag == 1


def test_looks() -> None:
    """Names, annotations, source, code and defaults are the function's. Partials and objects have a name, too."""

    def step(x: torch.Tensor, by: float = 2.0, *, shift: float = 1.0) -> torch.Tensor:
        """Multiply and add."""
        return x * by + shift

    fn: Any = compile_with_fallback(step, backend="eager")
    assert typing.get_type_hints(fn) == typing.get_type_hints(step)
    assert inspect.getsource(fn) == inspect.getsource(step)
    assert inspect.signature(fn) == inspect.signature(step)
    for name in ("name", "qualname", "module", "doc", "code", "defaults", "kwdefaults", "globals", "closure"):
        assert getattr(fn, f"__{name}__") is getattr(step, f"__{name}__")
    assert (fn.__wrapped__, repr(fn)) == (step, "<CompiledFunction step: pending>")
    assert inspect.isroutine(fn)
    assert not inspect.iscoroutinefunction(fn)
    partial: Any = compile_with_fallback(functools.partial(step, by=1.0), backend="eager")
    called: Any = compile_with_fallback(Calls(step), backend="eager")
    assert (partial.__name__, called.__name__) == ("step", "Calls")
    assert inspect.signature(partial) == inspect.signature(partial.eager)
    assert partial.__annotations__ == {}
    assert not hasattr(partial, "__code__")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.relu()


class Decorated(Net):
    forward = compile_with_fallback(Net.forward, backend="eager")


def test_modules_with_a_decorated_forward_are_copied_and_saved() -> None:
    """They are copied and saved like other modules. A forward set on the instance cannot be pickled, as under stock."""
    net = Decorated()
    assert list(net.state_dict()) == list(Net().state_dict())
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(X), net(X))
    other: Any = Net()
    other.forward = compile_with_fallback(other.forward, backend="eager")
    twin = copy.deepcopy(other)
    assert twin.forward.eager.__self__ is twin
    with pytest.raises(pickle.PicklingError, match="not the same object"):
        pickle.dumps(other)


def test_copies_of_a_module_that_the_library_no_longer_compiles() -> None:
    """Copies of a module that torch has compiled since, or of a shallow copy, are plain modules."""
    net = compile_with_fallback(Net(), backend="eager")
    shallow = copy.copy(net)
    assert isinstance(compiled_function(copy.deepcopy(net)), CompiledFunction)
    twins = [copy.deepcopy(shallow)]
    net.compile(backend="eager")
    twins.append(copy.deepcopy(net))
    for twin in twins:
        torch.testing.assert_close(twin(X), net(X))
        with pytest.raises(TypeError, match="Net has not been compiled"):
            compiled_function(twin)
