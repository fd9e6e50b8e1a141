"""Programs about the Python around tensors: side effects, arguments and results of all types, random numbers."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import io
import random
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from programs.program import Function, Made, called, program

X = torch.arange(6.0)


@program()
def lists_and_dicts() -> Made:
    """The caller's containers, appended to, updated and reversed."""
    log: list[object] = []
    table: dict[str, Any] = {"k2": X.sum()}

    def step(x: Tensor, key: str) -> Tensor:
        y = x * 2
        log.append(y)
        table[key] = y.sum()
        torch._dynamo.graph_break()
        log.extend([key, 2])
        log.reverse()
        table.pop("k1", None)
        return y.sin()

    return Made(step, [called(X, "k1"), called(X, "k2")], table, log)


@program()
def counters() -> Made:
    """A closure's number, an attribute, a default argument and a Counter, each alternating between two values."""
    total = 0
    seen: Counter[str] = Counter()

    class Steps:
        n = 0

    steps = Steps()

    def step(x: Tensor, history: list[int] = [0]) -> Tensor:  # noqa: B006  # it remembers on purpose
        nonlocal total
        total = (total + 1) % 2
        steps.n = total * 2
        seen["calls"] = 1 - seen["calls"]
        history[0] = 1 - history[0]
        return x * total + steps.n + history[0]

    def call(fn: Function) -> object:
        return fn(X), total, steps.n, dict(seen)

    return Made(step, [call] * 2)


LEVEL = 0


@program()
def global_number() -> Made:
    """A module's global variable, read and written."""
    globals()["LEVEL"] = 0

    def step(x: Tensor) -> Tensor:
        global LEVEL  # noqa: PLW0603  # the point of it
        y = x + LEVEL
        LEVEL = 1 - LEVEL
        torch._dynamo.graph_break()
        return y * LEVEL

    def call(fn: Function) -> object:
        return fn(X), LEVEL

    return Made(step, [call] * 2)


@program()
def prints() -> Made:
    """Lines printed before, between and after graphs."""

    def step(x: Tensor, k: int) -> Tensor:
        print("step", k)  # noqa: T201  # the point of it
        y = x.sin()
        print("sum", float(y.sum()))  # noqa: T201  # likewise
        return y.cos()

    def call(fn: Function) -> object:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            result = fn(X, 3)
        return result, out.getvalue()

    return Made(step, [call] * 2)


@program(backend="aot")
def random_numbers() -> Made:
    """Draws from torch's generator, on both sides of a graph break."""

    def step(x: Tensor) -> Tensor:
        y = x + torch.rand(6)
        torch._dynamo.graph_break()
        return y * torch.randn_like(x) + torch.randint(0, 9, (6,))

    return Made(step, [called(X)] * 2)


@program()
def random_module() -> Made:
    """Draws from Python's random module."""

    def step(x: Tensor) -> Tensor:
        y = x * random.random()
        torch._dynamo.graph_break()
        return y + random.randint(0, 9) + random.uniform(1, 2)

    return Made(step, [called(X)] * 2)


@program()
def own_generator() -> Made:
    """Draws from the program's own torch.Generator."""
    generator = torch.Generator()
    generator.manual_seed(3)

    def step(x: Tensor) -> Tensor:
        return x.sin() + torch.rand(6, generator=generator)

    return Made(step, [called(X)] * 2)


@program()
def seeded_inside() -> Made:
    """A seed set inside, and the generator's state saved and restored."""

    def step(x: Tensor) -> Tensor:
        state = torch.get_rng_state()
        torch.manual_seed(7)
        y = x + torch.rand(6)
        torch.set_rng_state(state)
        return y + torch.rand(6)

    return Made(step, [called(X)] * 2)


class Mode(enum.Enum):
    """A flag of a program."""

    UP = "up"
    DOWN = "down"


@program()
def flags() -> Made:
    """Arguments other than tensors: an enum, numbers, strings, extra positional arguments, a dtype, a slice."""

    def step(x: Tensor, mode: Mode, k: float = 1.0, name: str = "sin", *rest: int, **named: Any) -> object:
        y = getattr(x, name)() * k + sum(rest)
        if mode is Mode.DOWN:
            y = -y
        if named.get("to") is not None:
            y = y.to(named["to"])
        return y[named.get("part", slice(None))], mode, name.upper(), sorted(named)

    return Made(
        step,
        [
            called(X, Mode.UP),
            called(X, Mode.DOWN, 2.0, "cos", 1, 2, to=torch.float64),
            called(X, mode=Mode.UP, k=3.0, part=slice(1, 4)),
        ],
    )


@dataclass
class Batch:
    """A batch of a program."""

    x: Tensor
    y: Tensor
    tags: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.x.shape[0]


class Pair(NamedTuple):
    """A result of a program."""

    first: Tensor
    second: Any


@program()
def dataclasses_and_tuples() -> Made:
    """A dataclass that is read and changed, and a named tuple containing a dataclass as the result."""
    batch = Batch(X, X + 1, ["first"])

    def step(batch: Batch) -> Pair:
        batch.tags[0] = str(batch.size)
        total = batch.x + batch.y
        batch.y = total
        return Pair(total.sin(), Batch(total * 2, batch.x, ["new"]))

    return Made(step, [called(batch)] * 2, batch)


class Output(OrderedDict[str, Any]):
    """A model output, as model libraries define them."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None


@program()
def model_output() -> Made:
    """A model output, an OrderedDict with attributes, as argument and result."""

    def step(x: Output) -> Output:
        return Output(loss=x["logits"].sum(), logits=x["logits"] * 2, state=x)

    return Made(step, [called(Output(logits=X)), called(Output(logits=X + 1))])


class LazyList(list[Any]):
    """A list that logs item accesses and rejects slices."""

    def __init__(self, items: list[Any], log: list[int]) -> None:
        super().__init__(items)
        self.log = log

    def __getitem__(self, i: Any) -> Any:
        if not isinstance(i, int):
            raise TypeError("integers only")
        self.log.append(i)
        return super().__getitem__(i)


class NoValues(dict[str, Any]):
    """A dict that can only be read key by key."""

    def values(self) -> Any:
        raise RuntimeError("read the items one by one")


@program()
def list_with_side_effects() -> Made:
    """A list subclass with side effects on item access."""
    log: list[int] = []
    return Made(lambda b: b[0] @ b[1] + b[0], [called(LazyList([X, X + 1], log))] * 2, log=log)


@program()
def dict_that_rejects_values() -> Made:
    """A dict subclass that rejects `values()`."""
    batch = NoValues(x=X, y=X + 1)
    return Made(lambda b: b["x"] @ b["y"], [called(batch)] * 2)


@program()
def deque_and_set() -> Made:
    """A deque that rotates and a set that toggles an item."""
    window = deque([X, X + 1])
    names = {"a"}

    def step(x: Tensor, name: str) -> Tensor:
        window.append(x.sin())
        window.popleft()  # Dynamo gets the order of a deque with a maxlen wrong
        names.symmetric_difference_update({name})
        return torch.stack(list(window)).sum(0) * len(names)

    def call(fn: Function) -> object:
        return fn(X, "b"), list(window), sorted(names)

    return Made(step, [call] * 2)


@program()
def bound_method() -> Made:
    """A method of an object that counts its calls, with a property and a static method."""

    class Worker:
        scale = 2.0

        def __init__(self) -> None:
            self.log: list[float] = []

        @property
        def doubled(self) -> float:
            return self.scale * 2

        @staticmethod
        def helper(x: Tensor) -> Tensor:
            return x.cos()

        def step(self, x: Tensor) -> Tensor:
            self.log.append(self.doubled)
            return self.helper(x) * self.doubled

    worker = Worker()
    return Made(worker.step, [called(X)] * 2, log=worker.log)


@program()
def partial_and_callable() -> Made:
    """A partial, an object with `__call__` and a wrapped function, called inside."""

    class Scale:
        def __init__(self, k: float) -> None:
            self.k = k

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.k

    def noted(fn: Function) -> Function:
        @functools.wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs) + 1

        return wrapper

    scale = Scale(3.0)
    power = functools.partial(torch.pow, exponent=2)

    @noted
    def step(x: Tensor) -> Tensor:
        return power(scale(x))

    return Made(step, [called(X)] * 2)


@program(differs="Stock returns zero-dimensional arrays instead of NumPy scalars.")
def numpy_in_and_out() -> Made:
    """NumPy arrays as arguments and results."""

    def step(a: Any, b: Any) -> Any:
        return np.sum(np.sqrt(np.abs(a)) * b, axis=0) / 3, a.mean(), (a > 0).sum()

    a = np.random.RandomState(0).randn(5, 3).astype(np.float32)
    return Made(step, [called(a, np.arange(3))] * 2)


@program()
def numpy_between() -> Made:
    """A tensor converted to an array and back."""

    def step(x: Tensor) -> Tensor:
        a = x.sin().numpy()
        return torch.from_numpy(a * 2 + 1).cos()

    return Made(step, [called(X)] * 2)


@program()
def deep_copies() -> Made:
    """A structure of tensors, copied inside and then changed."""
    state = {"x": X.clone(), "n": [1]}

    def step(state: dict[str, Any]) -> object:
        mine = copy.deepcopy(state)
        mine["n"].append(2)
        return mine["x"].add_(1), mine["n"]

    return Made(step, [called(state)] * 2, state)


@program()
def attributes_of_tensors() -> Made:
    """Attributes on a tensor: one set by the caller is read, and another one is set."""
    x: Any = X.clone()
    x.scale = 3.0

    def step(x: Any) -> Tensor:
        y: Tensor = x * x.scale
        x.seen = True
        return y

    def call(fn: Function) -> object:
        return fn(x), getattr(x, "seen", None)

    return Made(step, [call] * 2)
