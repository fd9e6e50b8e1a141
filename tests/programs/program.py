"""A program: a function to compile, its calls, and the state that they change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

Function = Callable[..., Any]
"""A function to compile, a module to compile in place, or the compiled result."""

Call = Callable[[Function], object]
"""One call of a program, possibly with a backward pass or an optimizer step. It returns what the caller sees."""


class Made(NamedTuple):
    """A fresh instance of a program.

    `watched` is compared after each call: tensors with their gradients, modules, optimizers, or a tuple of these. So is
    `log`, which the program appends to. It is emptied before each call, because Dynamo guards on its length.
    """

    function: Function
    calls: Sequence[Call]
    watched: object = None
    log: Sequence[Any] = ()


@dataclass(frozen=True, eq=False)
class Program:
    """A program. `make` creates an instance with fresh state.

    `backend` is the compiler of each graph: "eager" runs it, "aot" differentiates it and compiles forward and backward
    graphs separately, "inductor" generates code.

    `differs` is the reason why stock torch.compile and eager disagree on this program. Without it they must agree. With
    it, calls must share no state, because eager and compiled calls alternate.

    `given_up` is the reason why stock stops compiling a part of this program, unlike the library.
    """

    name: str
    make: Callable[[], Made]
    backend: Literal["eager", "aot", "inductor"]
    options: Mapping[str, Any]
    within: Callable[[], AbstractContextManager[object]]
    differs: str | None
    given_up: str | None


def program(
    *,
    backend: Literal["eager", "aot", "inductor"] = "eager",
    options: Mapping[str, Any] | None = None,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
    differs: str | None = None,
    given_up: str | None = None,
) -> Callable[[Callable[[], Made]], Program]:
    """Turn a function that makes instances into a program of the same name.

    `options` are passed to torch.compile. `within` is entered for each run of the program.
    """
    return lambda make: Program(make.__name__, make, backend, options or {}, within, differs, given_up)


def called(*args: object, **kwargs: object) -> Call:
    """Return a call with these arguments."""
    return lambda fn: fn(*args, **kwargs)


def differentiated(*args: object, **kwargs: object) -> Call:
    """Return a call with these arguments, followed by a backward pass from the sum of its result."""

    def call(fn: Function) -> Tensor:
        out: Tensor = fn(*args, **kwargs)
        out.sum().backward()
        return out.detach()

    return call
