"""Programs that raise: their own exceptions, caught or not, and errors that occur only when the code runs."""

from __future__ import annotations

import torch
from torch import Tensor

from programs.program import Made, called, program

X = torch.arange(6.0)


@program(given_up="Stock never recompiles a frame that has raised.")
def exception_after_break() -> Made:
    """The program's own exception, with two arguments, raised between two graphs in every third call."""

    class Trouble(Exception):
        pass

    log: list[str] = []

    def step(x: Tensor, good: bool) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        log.append("between")
        if not good:
            raise Trouble("no", 7)
        return y.cos()

    return Made(step, [called(X, True), called(X, True), called(X, False)], log=log)


@program()
def exception_first() -> Made:
    """An exception with a cause, raised before any tensor is used."""

    def check(k: int) -> None:
        try:
            {1: "one"}[k]
        except KeyError as exc:
            raise ValueError(f"no {k}") from exc

    def step(x: Tensor, k: int) -> Tensor:
        check(k)
        return x * k

    return Made(step, [called(X, 1), called(X, 2), called(X, 1)])


@program()
def exception_caught() -> Made:
    """An exception raised in a callee and caught in the program, with `else` and `finally`."""
    log: list[str] = []

    def risky(x: Tensor, k: int) -> Tensor:
        if k > 1:
            raise LookupError("k", k)
        return x.sin()

    def step(x: Tensor, k: int) -> Tensor:
        y = x + 1
        try:
            y = risky(y, k)
        except LookupError as exc:
            log.append(str(exc.args[0]))
            y = y.cos()
        else:
            log.append("fine")
        finally:
            log.append("finally")
        return y * 2

    return Made(step, [called(X, 1), called(X, 2)], log=log)


@program(
    backend="aot",
    differs="The `except` misses stock's IndexError, which the backend raises after Dynamo has traced.",
)
def index_error_caught() -> Made:
    """A dimension out of range, caught by the program."""

    def step(x: Tensor, dim: int) -> Tensor:
        try:
            return torch.softmax(x * 2, dim=dim)
        except IndexError:
            return x + 1

    return Made(step, [called(X, 10), called(X, 0)])


@program(backend="aot")
def index_error() -> Made:
    """A dimension out of range that only the backend rejects."""

    def step(x: Tensor, dim: int) -> Tensor:
        return torch.softmax(x, dim=dim)

    return Made(step, [called(X, 10), called(X, 0)])


@program(differs="Stock wraps a fake tensor's RuntimeError in a TorchRuntimeError.")
def shape_mismatch() -> Made:
    """Matrices with mismatched shapes in the second of two graphs."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        return x @ y

    return Made(step, [called(torch.ones(2, 3), torch.ones(n, 2)) for n in (4, 3)])


@program(given_up="Stock never recompiles a frame that has raised.")
def assertion() -> Made:
    """An assert with a message, on a tensor and on a number."""

    def step(x: Tensor, k: int) -> Tensor:
        assert k < 3, f"k is {k}"
        y = x.sin()
        torch._dynamo.graph_break()
        assert k < 2, ("k", k)
        return y * k

    return Made(step, [called(X, k) for k in (1, 2, 3)])


@program()
def class_context_manager() -> Made:
    """A context manager that swallows an exception."""
    log: list[str] = []

    class Swallow:
        def __init__(self, log: list[str]) -> None:  # Dynamo loses items appended to a closure's list here
            self.log = log

        def __enter__(self) -> None:
            self.log.append("enter")

        def __exit__(self, error_type: type[BaseException] | None, *_: object) -> bool:
            self.log.append(error_type.__name__ if error_type else "fine")
            return error_type is ValueError

    def step(x: Tensor, good: bool) -> Tensor:
        y = x.sin()
        with Swallow(log):
            y = y + 1
            if not good:
                raise ValueError("swallowed")
            y = y + 1
        return y.cos()

    return Made(step, [called(X, True), called(X, False)], log=log)


@program(backend="aot")
def modes_after_an_error() -> Made:
    """An index out of range that fails only when the code runs, under no_grad and autocast; both modes must end."""
    torch.manual_seed(0)
    table, w = torch.randn(10, 8), torch.randn(8, 8)

    def step(index: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return table[index] @ w

    return Made(step, [called(torch.tensor([k])) for k in (1, 99, 2)])
