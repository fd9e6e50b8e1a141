"""Programs about all kinds of tensors: views, in-place writes, complex, nested and sharded ones, subclasses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from programs.program import Function, Made, called, differentiated, program

X = torch.arange(6.0)


@program(backend="aot")
def in_place_on_an_input() -> Made:
    """An argument written to before and after a graph break."""
    x = X.clone()

    def step(x: Tensor) -> Tensor:
        x.add_(1)
        torch._dynamo.graph_break()
        x[2:4].mul_(2)
        return x.sin()

    return Made(step, [called(x)] * 2, x)


@program(backend="aot")
def views() -> Made:
    """Results that are views of an argument and of each other; the caller writes to them."""
    x = torch.arange(12.0)

    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = x.view(3, 4)
        return a, a[1], x

    def call(fn: Function) -> object:
        a, row, same = fn(x)
        row.add_(1)
        return a, row, same is x, a.data_ptr() == x.data_ptr()

    return Made(step, [call] * 2, x)


@program(backend="aot")
def write_through_a_view() -> Made:
    """The caller's view, written to by the function in a graph with gradients."""
    base = torch.zeros(3, 4)
    w = torch.ones(4, requires_grad=True)

    def step(row: Tensor, x: Tensor) -> Tensor:
        row.copy_(x)
        return (row * w).sum()

    return Made(step, [differentiated(base[1], torch.arange(4.0))], (base, w))


@program(backend="aot")
def input_returned() -> Made:
    """An argument returned unchanged, next to a detached one."""

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.detach() * 2

    def call(fn: Function) -> object:
        out, twice = fn(x)
        return out is x, out.requires_grad, twice

    x = X.clone().requires_grad_()
    return Made(step, [call] * 2)


@program(differs="The program's `except` misses the error of stock's fake tensor.")
def leaf_in_place() -> Made:
    """An in-place write to a leaf that requires a gradient, which autograd forbids."""
    w = X.clone().requires_grad_()
    log: list[str] = []

    def step(x: Tensor) -> Tensor:
        try:
            x.add_(1)
        except RuntimeError:
            log.append("refused")
        return x * 2

    return Made(step, [called(w)] * 2, log=log)


@program(backend="aot")
def complex_numbers() -> Made:
    """Complex arithmetic with a Fourier transform, and its gradient."""
    w = torch.ones(6, dtype=torch.complex64, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        y = torch.fft.fft(x.to(torch.complex64)) * w
        out: Tensor = y.abs() + y.real.sin() + torch.view_as_real(y)[:, 1]
        return out

    return Made(step, [differentiated(X)] * 2, w)


@program(backend="aot")
def strides() -> Made:
    """Non-contiguous arguments and results."""

    def step(x: Tensor) -> object:
        return x.t() * 2, x.to(memory_format=torch.contiguous_format).expand(2, *x.shape), x.flip(0)

    return Made(step, [called(torch.ones(4, 3).t()), called(torch.ones(4, 6)[:, ::2])])


@program()
def dtypes() -> Made:
    """Promotion between dtypes, numbers and zero-dimensional tensors."""

    def step(x: Tensor, k: Tensor) -> object:
        return x + k, x / 2, (x > 2) & (k > 0), k * 2.5, x.to(torch.bfloat16).sum(), torch.tensor(3)

    return Made(step, [called(torch.arange(4), torch.tensor(2)), called(torch.arange(4).bool(), torch.tensor(2.0))])


@program()
def default_dtype() -> Made:
    """A default dtype that the caller changes between calls."""

    def call(dtype: torch.dtype) -> Any:
        def do(fn: Function) -> object:
            torch.set_default_dtype(dtype)
            return fn(X)

        return do

    return Made(lambda x: x + torch.ones(6), [call(torch.float32), call(torch.float64)])


@program()
def nested() -> Made:
    """A jagged tensor, from its parts to a padded result."""
    parts = [torch.ones(n, 3) * n for n in (2, 4, 1)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)

    def step(x: Tensor) -> object:
        y = x.sin() * 2
        return y, y.values().sum(), y.to_padded_tensor(0.0)

    return Made(step, [called(jagged)] * 2)


@program()
def sparse() -> Made:
    """A sparse matrix, for which stock skips the frame, and a callee that gets only dense tensors."""
    a = torch.eye(6).to_sparse()

    def layer(x: Tensor) -> Tensor:
        return x.sin() * 2

    def step(a: Tensor, x: Tensor) -> Tensor:
        return layer(a @ x.unsqueeze(1))

    return Made(step, [called(a, X)] * 2)


class Plain(Tensor):
    """A user's tensor subclass that implements only `__torch_function__`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch has no annotations here
        return out + 1 if func is Tensor.sin else out


@program(differs="Stock returns a plain tensor instead of the subclass.")
def own_torch_function() -> Made:
    """A tensor subclass whose `__torch_function__` changes the meaning of `sin`, as argument and result."""
    x = X.as_subclass(Plain)
    return Made(lambda x: x.sin() * 2, [called(x), called(X), called(x)])


class Scaled(Tensor):
    """A traceable wrapper around a tensor and its scale."""

    @staticmethod
    def __new__(cls, inner: Tensor, scale: float) -> Any:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner: Tensor, scale: float) -> None:
        self.tensor, self.scale = inner, scale

    def __repr__(self) -> str:  # type: ignore[override]  # torch's would read the data
        return f"Scaled({self.scale})"

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["tensor"], self.scale

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], scale: float, *_: object) -> Scaled:
        return Scaled(tensors["tensor"], scale)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the base class's is not a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        scales = [x.scale for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Scaled)]
        plain = torch.utils._pytree.tree_map_only(Scaled, lambda x: x.tensor, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        wrapped = torch.utils._pytree.tree_map_only(Tensor, lambda x: Scaled(x, max(scales)), out)
        return return_and_correct_aliasing(func, args, kwargs or {}, wrapped)


@program(backend="aot")
def wrapper_subclass() -> Made:
    """A traceable wrapper subclass, which AOTAutograd unwraps and wraps again."""
    return Made(lambda x: (x * 2).sin() + 1, [called(Scaled(X, 3.0)), called(Scaled(X + 1, 3.0)), called(X)])


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A process group of one rank, without a network."""
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # it exists
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@program(backend="aot", within=one_rank)
def sharded() -> Made:
    """DTensors on a mesh with one rank, with a redistribution and gradients."""
    mesh = init_device_mesh("cpu", (1,))
    w = distribute_tensor(torch.ones(6, 6), mesh, [Shard(0)]).requires_grad_()
    x = distribute_tensor(X.unsqueeze(0), mesh, [Replicate()])

    def step(x: Any) -> Any:
        y = (x @ w).sin()
        return y.redistribute(mesh, [Replicate()]).to_local() * 2

    return Made(step, [differentiated(x)] * 2, w)


@program(within=one_rank)
def collective() -> Made:
    """A collective inside the function, in a group with one rank."""

    def step(x: Tensor) -> Tensor:
        y = x.sin()
        torch.distributed.all_reduce(y)
        return y * 2

    return Made(step, [called(X)] * 2)
