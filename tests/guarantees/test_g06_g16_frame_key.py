"""Telling arguments apart runs no user code, and permanent failures cost no other calls their compiled code."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import record_events
from support import Compiler, first

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
HELD_OFF = RetryPolicy(wait=None, wait_calls=3)
X = torch.ones(3)


class LazyList(list[Any]):
    """A list that counts item accesses and rejects slices."""

    asked: int = 0

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            raise TypeError("integers only")
        self.asked += 1
        return super().__getitem__(index)


class NoValues(dict[str, Any]):
    """A dict whose values() raises."""

    def values(self) -> Any:
        raise RuntimeError("read the items one by one")


class NoDict:
    """An object whose __dict__ raises."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            raise RuntimeError("not telling")
        return super().__getattribute__(name)


class NoDevice(torch.Tensor):
    """A tensor whose device raises."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # a property that raises
        raise RuntimeError("not telling")


class Output(OrderedDict[str, Any]):
    """A model output, whose keys are also attributes."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None


class Meta(type):
    @property
    def __mro__(cls) -> Any:
        raise RuntimeError("not telling")


class NoHash(type):
    __hash__ = None  # type: ignore[assignment]  # as Python does if only `__eq__` is defined

    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("not telling")


class Unhashable(metaclass=NoHash):
    """An object whose class cannot be hashed."""


class Odd(metaclass=Meta):
    """An object whose class raises for __mro__."""


def add(batch: Any, x: torch.Tensor) -> torch.Tensor:
    return x + 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: LazyList([X, X]),
        lambda: NoValues(x=X),
        NoDict,
        lambda: Output(x=X),
        lambda: X.as_subclass(NoDevice),
        Odd,
        lambda: {"a": {"b": {"c": [X]}}},
        lambda: slice(None),
    ],
    ids=["list", "dict", "object", "output", "tensor", "class", "nested", "built-in"],
)
def test_values_that_resist_inspection(make: Callable[[], Any]) -> None:
    """They go through a failure, the hold-off and the recovery without an exception."""
    fn = compile_with_fallback(add, backend=Compiler(first(2)), policy=HELD_OFF)
    for _ in range(9):
        torch.testing.assert_close(fn(make(), X), X + 1)
    assert (fn.stats.failures, fn.stats.recoveries, fn.state) == (2, 1, CompileState.COMPILED)


def test_a_class_that_cannot_be_hashed() -> None:
    """Dynamo cannot compile it. The call succeeds anyway, also during the hold-off."""
    fn = compile_with_fallback(add, backend=Compiler(), policy=HELD_OFF)
    for _ in range(9):
        torch.testing.assert_close(fn(Unhashable(), X), X + 1)
    assert fn.stats.eager_calls == 9


@pytest.mark.parametrize("fails", [0, 2])
def test_batch_items_are_accessed_as_often_as_under_stock(fails: int) -> None:
    """Compiled calls access items as often as under stock torch.compile, and eager ones as often as in eager."""

    def step(batch: LazyList) -> Any:
        return batch[0] * batch[1]

    def touched(call: Callable[..., Any]) -> list[int]:
        counts = []
        for _ in range(5):
            batch = LazyList([X, X])
            call(batch)
            counts.append(batch.asked)
        return counts

    stock = touched(torch.compile(step, backend="eager"))
    torch._dynamo.reset()
    fn = compile_with_fallback(step, backend=Compiler(first(fails)), policy=EVERY_CALL)
    ours = touched(fn)
    # A failed attempt has traced the step before the step runs, but Dynamo's tracing accesses no item.
    assert ours[:fails] == [2] * fails
    assert ours[fails:] == stock[: 5 - fails]


class Notes(TorchFunctionMode):
    """A mode that records the functions that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fails", [0, 2])
def test_a_users_mode(fails: int) -> None:
    """The mode sees the same functions as in eager, and causes no recompiles."""
    weight = torch.ones(3, 3)

    def step(x: torch.Tensor) -> torch.Tensor:
        return (x @ weight).relu().sum()

    def seen(call: Callable[..., Any]) -> list[list[Any]]:
        notes = []
        for _ in range(8):
            with Notes() as mode:
                call(X)
            notes.append(mode.seen)
        return notes

    compiler = Compiler(first(fails))
    assert seen(compile_with_fallback(step, backend=compiler, policy=HELD_OFF)) == seen(step)
    assert compiler.asked == 1 + fails


class Mode(enum.Enum):
    PREFILL = 1
    DECODE = 2


class Holder:
    def __init__(self, phase: object) -> None:
        self.phase = phase


class Module(torch.nn.Module):
    def __init__(self, phase: object) -> None:
        super().__init__()
        self.phase = phase


def phase_of(value: Any) -> object:
    return getattr(value, "phase", value)


def step(x: torch.Tensor, how: Any) -> torch.Tensor:
    if x.shape[0] > 5 or phase_of(how) in (3, Mode.PREFILL, "debug", 2.5) or phase_of(how) is True:
        torch._dynamo.graph_break()
    return x.sin()


BAD_AND_GOOD = [
    (3, 2),
    (Mode.PREFILL, Mode.DECODE),
    ("debug", "train"),
    (True, False),
    (True, 1),
    (2.5, 1.5),
    (Holder(3), Holder(2)),
    (Module(3), Module(2)),
]


@pytest.mark.parametrize(("bad", "good"), BAD_AND_GOOD)
@pytest.mark.parametrize("bad_first", [True, False])
def test_what_cannot_be_traced_costs_only_itself(bad: Any, good: Any, bad_first: bool) -> None:
    """Under fullgraph, a call that cannot be traced costs other calls nothing, whichever comes first."""
    fn = compile_with_fallback(step, backend=Compiler(), fullgraph=True, dynamic=False)
    for how in (bad, good, good, bad) if bad_first else (good, bad, good, bad):
        torch.testing.assert_close(fn(X, how), X.sin())
    assert (fn.stats.eager_calls, fn.stats.compiled_calls, fn.stats.failures) == (2, 2, 1)
    assert fn.state is CompileState.GAVE_UP


@pytest.mark.parametrize("prefill_first", [True, False])
def test_a_prefill_that_cannot_be_traced(prefill_first: bool) -> None:
    """Decoding is compiled although prefill cannot be traced."""
    prefill, decode = torch.ones(6), torch.ones(1)
    fn = compile_with_fallback(step, backend=Compiler(), fullgraph=True, policy=EVERY_CALL)
    for x in (prefill, decode, decode) if prefill_first else (decode, prefill, decode):
        torch.testing.assert_close(fn(x, 0), x.sin())
    assert (fn.stats.eager_calls, fn.stats.compiled_calls) == (1, 2)


def test_after_eight_permanent_failures_the_code_is_given_up() -> None:
    """After eight kinds of calls, the code is given up, and the log says so. Compiled code stays."""
    fn = compile_with_fallback(step, backend=Compiler(), fullgraph=True, dynamic=False, policy=EVERY_CALL)
    fn(X, 0)
    with record_events(kinds={"gave up"}) as events:
        for n in range(6, 18):
            fn(torch.ones(n), 0)
    assert len(events) == fn.stats.failures == 8
    assert ["for all arguments" in event.message for event in events] == [False] * 7 + [True]
    fn(torch.ones(4), 0)  # it could be compiled, but is no longer attempted
    fn(X, 0)
    assert (fn.stats.eager_calls, fn.stats.compiled_calls) == (13, 2)
    fn.reset()
    fn(torch.ones(4), 0)
    assert fn.stats.compiled_calls == 3


def test_counted_calls_look_the_same() -> None:
    """A call counter in a closure and a module created for each call do not cause new attempts."""
    calls = 0

    def train(x: torch.Tensor, criterion: torch.nn.Module) -> torch.Tensor:
        nonlocal calls
        calls += 1
        torch._dynamo.graph_break()
        return x.sin()

    fn = compile_with_fallback(train, backend=Compiler(), fullgraph=True, policy=EVERY_CALL)
    for _ in range(5):
        fn(X, torch.nn.MSELoss())
    assert (calls, fn.stats.failures) == (5, 1)


@pytest.mark.parametrize("changing", [int, Holder, lambda n: torch.ones(n + 2)], ids=["number", "attribute", "size"])
def test_a_recovery_although_calls_differ(changing: Callable[[int], Any]) -> None:
    """A number or a size that changes with each call does not prevent the recovery."""

    def scaled(x: torch.Tensor, how: Any) -> torch.Tensor:
        return x * how.sum() if isinstance(how, torch.Tensor) else x + 1

    fn = compile_with_fallback(scaled, backend=Compiler(first(2)), policy=EVERY_CALL)
    for n in range(6):
        fn(X, changing(n))
    assert (fn.stats.recoveries, fn.state) == (1, CompileState.COMPILED)
