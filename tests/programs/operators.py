"""Programs about operators, functions hidden from Dynamo, and the user's own modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.scan import scan
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from programs.program import Function, Made, called, differentiated, program

X = torch.arange(6.0)


@program(backend="aot")
def cond() -> Made:
    """`torch.cond`, with both outcomes."""

    def step(x: Tensor) -> Tensor:
        out: Tensor = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos() * 2, (x,))
        return out + 1

    return Made(step, [called(X), called(-X)])


@program(backend="aot")
def loop_operator() -> Made:
    """`while_loop`."""

    def step(x: Tensor) -> object:
        return while_loop(lambda n, x: x.norm() > 1, lambda n, x: (n + 1, x / 2), (torch.tensor(0), x))

    return Made(step, [called(X), called(X * 4)])


@program(backend="aot")
def scan_operator() -> Made:
    """`scan`, a cumulative sum with a carry."""

    def step(x: Tensor) -> object:
        return scan(lambda carry, x: (carry + x, carry * x), torch.ones(()), x)

    return Made(step, [called(X)] * 2)


@program(backend="aot")
def nested_region() -> Made:
    """A `nested_compile_region` called three times."""
    w = torch.eye(6).requires_grad_()

    @torch.compiler.nested_compile_region
    def region(x: Tensor) -> Tensor:
        return torch.tanh(x @ w)

    def step(x: Tensor) -> Tensor:
        out: Tensor = region(region(region(x)))
        return out

    return Made(step, [differentiated(X)] * 2, w)


@program(backend="aot")
def attention() -> Made:
    """`flex_attention` with a score that depends on the distance."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))

    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - (i - j).abs() * 0.1)

    return Made(step, [called(q, k, v)] * 2)


LOG: list[str] = []


@torch.library.custom_op("compile_retry_programs::scale", mutates_args=())
def scale(x: Tensor, k: float) -> Tensor:
    """The program's own operator."""
    LOG.append("kernel")
    return x * k


@scale.register_fake
def _(x: Tensor, k: float) -> Tensor:
    return torch.empty_like(x)


@program(backend="aot")
def custom_operator() -> Made:
    """The program's own operator, with a kernel that logs each call."""
    LOG.clear()
    return Made(lambda x: scale(x.sin(), 3.0) + 1, [called(X)] * 2, log=LOG)


@program()
def kept_from_dynamo() -> Made:
    """A function with Dynamo disabled, called twice, which raises in the second of three calls."""
    log: list[str] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no annotations here
    def noted(x: Tensor) -> Tensor:
        log.append("noted")
        if x.sum() > 9:
            raise OverflowError("too much", 9)
        return x + 1

    def step(x: Tensor) -> Tensor:
        out: Tensor = noted(noted(x / 2).cos())
        return out * 2

    return Made(step, [called(X), called(X * 5), called(X)], log=log)


@program()
def constant_result() -> Made:
    """A function evaluated at compile time, and one that enters the graph untraced."""

    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # likewise
    def size() -> int:
        return 3

    def opaque(x: Tensor) -> Tensor:
        return x.sin() + 1

    torch._dynamo.allow_in_graph(opaque)
    return Made(lambda x: opaque(x) * size(), [called(X)] * 2)


@program()
def compiled_inside() -> Made:
    """A function compiled on its own by torch.compile, called inside."""
    inner = torch.compile(lambda x: x.sin() * 2, backend="eager")
    return Made(lambda x: inner(x) + inner(x + 1), [called(X)] * 2)


class Notes(TorchFunctionMode):
    """A mode that logs each function."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append(getattr(func, "__name__", "?"))
        return func(*args, **(kwargs or {}))


@program()
def function_mode_outside() -> Made:
    """The caller's TorchFunctionMode, which logs each function."""

    def call(fn: Function) -> object:
        log: list[str] = []
        with Notes(log):
            out = fn(X)
        return out, len(log)

    return Made(lambda x: (x * 2).relu().sum(), [call] * 3)


@program()
def function_mode_inside() -> Made:
    """A TorchFunctionMode that the function enters itself."""

    class Negate(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return -out if func is torch.sin else out

    def step(x: Tensor) -> Tensor:
        with Negate():
            y = torch.sin(x) * 2
        return torch.sin(y)

    return Made(step, [called(X)] * 2)


@program(given_up="Stock never recompiles a frame that was called under a dispatch mode.")
def dispatch_mode() -> Made:
    """The caller's TorchDispatchMode around one of the calls, which logs each operator."""
    log: list[str] = []

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            log.append(str(func))
            return func(*args, **(kwargs or {}))

    def noted(fn: Function) -> object:
        log.clear()
        with Dispatched():  # type: ignore[no-untyped-call]  # torch has no annotations here
            out = fn(X)
        return out, tuple(log)

    return Made(lambda x: x.sin() * 2, [called(X), noted, called(X)])


@program()
def device_context() -> Made:
    """The caller's default device."""

    def call(fn: Function) -> object:
        with torch.device("cpu"):
            return fn(X)

    return Made(lambda x: x + torch.ones(6), [call, called(X)])


@program()
def compiler_flags() -> Made:
    """A function that checks `is_compiling()`, and computes the same either way."""

    def step(x: Tensor) -> Tensor:
        return x.sin() * 2 if torch.compiler.is_compiling() else x.sin() + x.sin()

    return Made(step, [called(X)] * 2)


@program(backend="inductor", differs="Inductor draws different numbers than eager.")
def generated_code() -> Made:
    """A random draw in code generated by Inductor."""
    return Made(lambda x: x + torch.rand_like(x), [called(X)] * 2)
