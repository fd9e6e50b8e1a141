"""Arguments are told apart without running anybody's code, and what fails for good costs nothing else its code."""

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
    """Decodes an item when it is asked for it. Slices are not supported."""

    asked: int = 0

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            raise TypeError("integers only")
        self.asked += 1
        return super().__getitem__(index)


class Angry(dict[str, Any]):
    """Must be read item by item."""

    def values(self) -> Any:
        raise RuntimeError("read the items one by one")


class Secretive:
    """Tells nothing about itself."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            raise RuntimeError("not telling")
        return super().__getattribute__(name)


class Moody(torch.Tensor):
    """A tensor that will not tell its device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # a property that raises
        raise RuntimeError("not telling")


class Output(OrderedDict[str, Any]):
    """A model output, whose keys are attributes."""

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
    __hash__ = None  # type: ignore[assignment]  # what Python itself does where only `__eq__` is defined

    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("not telling")


class Unhashable(metaclass=NoHash):
    """An object whose class cannot be a key."""


class Odd(metaclass=Meta):
    """An object whose class is of no use."""


def add(batch: Any, x: torch.Tensor) -> torch.Tensor:
    return x + 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: LazyList([X, X]),
        lambda: Angry(x=X),
        Secretive,
        lambda: Output(x=X),
        lambda: X.as_subclass(Moody),
        Odd,
        lambda: {"a": {"b": {"c": [X]}}},
        lambda: slice(None),
    ],
    ids=["list", "dict", "object", "output", "tensor", "class", "nested", "built-in"],
)
def test_values_with_ideas_of_their_own(make: Callable[[], Any]) -> None:
    """They pass through a failure, the hold-off and the recovery, and raise nothing into the call."""
    fn = compile_with_fallback(add, backend=Compiler(first(2)), policy=HELD_OFF)
    for _ in range(9):
        torch.testing.assert_close(fn(make(), X), X + 1)
    assert (fn.stats.failures, fn.stats.recoveries, fn.state) == (2, 1, CompileState.COMPILED)


def test_a_class_that_cannot_be_hashed() -> None:
    """Dynamo cannot compile it. The call survives that, in the hold-off too."""
    fn = compile_with_fallback(add, backend=Compiler(), policy=HELD_OFF)
    for _ in range(9):
        torch.testing.assert_close(fn(Unhashable(), X), X + 1)
    assert fn.stats.eager_calls == 9


@pytest.mark.parametrize("fails", [0, 2])
def test_a_batch_is_touched_as_often_as_by_stock(fails: int) -> None:
    """In calls that run compiled code; in the others, as often as by eager."""

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
    # An attempt that fails has traced the step before the step runs; Dynamo's tracing asks for no item.
    assert ours[:fails] == [2] * fails
    assert ours[fails:] == stock[: 5 - fails]


class Notes(TorchFunctionMode):
    """Notes what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fails", [0, 2])
def test_a_users_mode(fails: int) -> None:
    """It sees what it sees in eager, and causes no recompiles."""
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
    """Under fullgraph, whichever comes first."""
    fn = compile_with_fallback(step, backend=Compiler(), fullgraph=True, dynamic=False)
    for how in (bad, good, good, bad) if bad_first else (good, bad, good, bad):
        torch.testing.assert_close(fn(X, how), X.sin())
    assert (fn.stats.eager_calls, fn.stats.compiled_calls, fn.stats.failures) == (2, 2, 1)
    assert fn.state is CompileState.GAVE_UP


@pytest.mark.parametrize("prefill_first", [True, False])
def test_a_prefill_that_cannot_be_traced(prefill_first: bool) -> None:
    """Decoding is compiled all the same."""
    prefill, decode = torch.ones(6), torch.ones(1)
    fn = compile_with_fallback(step, backend=Compiler(), fullgraph=True, policy=EVERY_CALL)
    for x in (prefill, decode, decode) if prefill_first else (decode, prefill, decode):
        torch.testing.assert_close(fn(x, 0), x.sin())
    assert (fn.stats.eager_calls, fn.stats.compiled_calls) == (1, 2)


def test_after_eight_looks_the_code_is_given_up() -> None:
    """With a line in the log that says so. What is compiled stays."""
    fn = compile_with_fallback(step, backend=Compiler(), fullgraph=True, dynamic=False, policy=EVERY_CALL)
    fn(X, 0)
    with record_events(kinds={"gave up"}) as events:
        for n in range(6, 18):
            fn(torch.ones(n), 0)
    assert len(events) == fn.stats.failures == 8
    assert ["for all arguments" in event.message for event in events] == [False] * 7 + [True]
    fn(torch.ones(4), 0)  # it could be compiled, but nobody asks any more
    fn(X, 0)
    assert (fn.stats.eager_calls, fn.stats.compiled_calls) == (13, 2)
    fn.reset()
    fn(torch.ones(4), 0)
    assert fn.stats.compiled_calls == 3


def test_calls_that_are_counted_look_the_same() -> None:
    """A number in an enclosing function, and a module that is made anew in each call, are no reason to try again."""
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
def test_a_recovery_though_calls_differ(changing: Callable[[int], Any]) -> None:
    """A number or a size that is another one in each call keeps nothing waiting for the call that failed."""

    def scaled(x: torch.Tensor, how: Any) -> torch.Tensor:
        return x * how.sum() if isinstance(how, torch.Tensor) else x + 1

    fn = compile_with_fallback(scaled, backend=Compiler(first(2)), policy=EVERY_CALL)
    for n in range(6):
        fn(X, changing(n))
    assert (fn.stats.recoveries, fn.state) == (1, CompileState.COMPILED)
