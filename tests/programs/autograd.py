"""Programs about differentiation: hooks, functions with their own backward, checkpointing, transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from programs.program import Function, Made, called, differentiated, program

X = torch.arange(6.0)


def weight() -> Tensor:
    """Return a square matrix that requires a gradient."""
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()


@program(backend="aot")
def gradients() -> Made:
    """A forward and a backward graph."""
    w = weight()
    return Made(lambda x: (x @ w).sin(), [differentiated(X), differentiated(X + 1)], w)


@program(backend="aot")
def gradients_of_two_graphs() -> Made:
    """Two forward graphs with a break between them, and their two backward graphs."""
    w = weight()

    def step(x: Tensor) -> Tensor:
        y = (x @ w).sin()
        torch._dynamo.graph_break()
        return (y @ w).cos()

    return Made(step, [differentiated(X)], w)


@program(backend="aot")
def with_and_without_gradients() -> Made:
    """The same function under no_grad and with gradients."""
    w = weight()

    def no_grad(fn: Function) -> object:
        with torch.no_grad():
            return fn(X)

    return Made(lambda x: (x @ w).sin(), [no_grad, differentiated(X), no_grad], w)


@program(backend="aot")
def own_backward() -> Made:
    """An autograd.Function with saved tensors whose backward is not the derivative."""

    class Clamp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clamp(0, 2)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            slope: Tensor = x * 3
            return grad * slope

    w = weight()
    apply: Function = Clamp.apply
    return Made(lambda x: apply(x @ w).sum(), [differentiated(X)] * 2, w)


@program()
def backward_with_notes() -> Made:
    """An autograd.Function that appends to a list, forward and backward, which Dynamo may not trace.

    Its forward may belong to a checkpoint, so a retry waits for an optimizer step.
    """
    log: list[str] = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            log.append("forward")
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            log.append("backward")
            return grad * 2

    w = weight()
    apply: Function = Noted.apply
    optimizer, differentiate = torch.optim.SGD([w], lr=0.0), differentiated(X)

    def call(fn: Function) -> object:
        outcome = differentiate(fn)
        optimizer.step()
        return outcome

    return Made(lambda x: apply(x @ w).sin(), [call] * 2, w, log)


@program(backend="aot")
def hook_on_a_leaf() -> Made:
    """The caller's hooks on a parameter: one scales and logs its gradient, one runs after accumulation."""
    w, log = weight(), list[str]()

    def scale(grad: Tensor) -> Tensor:
        log.append("hook")
        return grad * 2

    w.register_hook(scale)
    w.register_post_accumulate_grad_hook(lambda p: log.append("accumulated"))
    return Made(lambda x: (x @ w).sin(), [differentiated(X)] * 2, w, log)


@program()
def hook_on_an_intermediate() -> Made:
    """A hook that the function registers on a tensor that it has created."""
    w = weight()

    def step(x: Tensor) -> Tensor:
        y = x @ w
        y.register_hook(lambda grad: grad * 3)
        return y.sin()

    return Made(step, [differentiated(X)] * 2, w)


@program()
def hook_that_raises() -> Made:
    """A hook that raises in the backward pass of every second call."""
    w, log = weight(), list[str]()

    def angry(grad: Tensor) -> None:
        log.append("hook")
        if grad.sum() > 0:
            raise ArithmeticError("bad gradient", 3)

    w.register_hook(angry)
    return Made(lambda x, k: x @ w * k, [differentiated(X, torch.tensor(sign)) for sign in (-1.0, 1.0)], w, log)


@program()
def transforms() -> Made:
    """`grad`, `vmap` and `jvp` inside the function."""

    def loss(x: Tensor) -> Tensor:
        return (x.sin() * x).sum()

    def step(x: Tensor) -> object:
        batch = torch.vmap(torch.func.grad(loss))(x)
        return batch, torch.func.jvp(loss, (x[0],), (x[1],))

    return Made(step, [called(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))] * 2)


@program()
def compiled_inside_transforms() -> Made:
    """The function inside the caller's `grad` and `vmap`."""

    def under_grad(fn: Function) -> object:
        return torch.func.grad(lambda x: fn(x).sum())(X)

    def under_vmap(fn: Function) -> object:
        return torch.vmap(fn)(torch.stack([X, X + 1]))

    return Made(lambda x: x.sin() * x, [called(X), under_grad, under_vmap, called(X)])


@program()
def forward_mode() -> Made:
    """The caller's dual numbers."""

    def call(fn: Function) -> object:
        with torch.autograd.forward_ad.dual_level():
            out = fn(torch.autograd.forward_ad.make_dual(X, X + 1))
            return tuple(torch.autograd.forward_ad.unpack_dual(out))

    return Made(lambda x: x.sin() * x, [called(X), call, call, called(X)])


@program()
def second_derivative() -> Made:
    """The gradient of a gradient, with a backend that keeps the graph differentiable."""
    w = weight()

    def call(fn: Function) -> object:
        (grad,) = torch.autograd.grad(fn(X).sum(), w, create_graph=True)
        grad.pow(2).sum().backward()
        return grad.detach()

    return Made(lambda x: (x @ w).sin(), [call] * 2, w)


@program(backend="aot")
def backward_inside() -> Made:
    """A whole training step: the function calls `backward` and updates the parameter."""
    w = weight()

    def step(x: Tensor) -> Tensor:
        loss = (x @ w).sin().sum()
        loss.backward()
        with torch.no_grad():
            assert w.grad is not None
            w.sub_(0.1 * w.grad)
            w.grad = None
        return loss.detach()

    return Made(step, [called(X)] * 2, w)


@program()
def gradient_inside() -> Made:
    """`torch.autograd.grad` inside the function."""

    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(x.sin().sum(), x)
        return grad * 2

    return Made(step, [called(X)] * 2)


@program(backend="aot")
def grad_modes_inside() -> Made:
    """no_grad, enable_grad, set_grad_enabled and detach inside the function."""
    w = weight()

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x @ w
            with torch.enable_grad():
                z = x @ w
        torch.set_grad_enabled(False)
        y = y @ w
        torch.set_grad_enabled(True)
        return (y + z * z.detach()).sin()

    return Made(step, [differentiated(X)] * 2, w)


@program()
def inference_mode() -> Made:
    """inference_mode inside the function, as a context manager and as a decorator."""

    @torch.inference_mode()
    def encode(x: Tensor) -> Tensor:
        return x.sin()

    def step(x: Tensor) -> object:
        with torch.inference_mode():
            y = x * 2
        return encode(x), y, y.is_inference()

    return Made(step, [called(X)] * 2)


def masks_agree(loss: Tensor, w: Tensor) -> tuple[bool, object]:
    """Compare the loss, which is linear in w.sum(), with its gradient: they match if both passes used the same mask."""
    w.grad = None
    torch.manual_seed(1000)  # a draw of the caller's between the passes must not matter
    loss.backward()
    assert w.grad is not None
    return torch.allclose(w.grad, (loss / w.sum()).detach().expand_as(w)), loss.detach()


def _checkpointed(**kwargs: Any) -> Made:
    w = weight()

    def block(x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x * w.sum(), 0.5)

    def step(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(block, x, **kwargs)
        return out.sum()

    return Made(step, [lambda fn: masks_agree(fn(torch.ones(4, 8, requires_grad=True)), w)] * 2)


@program(backend="aot")
def checkpoint_inside() -> Made:
    """Dropout in a checkpointed block inside the function."""
    return _checkpointed(use_reentrant=False)


@program(backend="aot")
def reentrant_checkpoint_inside() -> Made:
    """The same with the reentrant implementation, at which Dynamo breaks the graph."""
    return _checkpointed(use_reentrant=True)


@program(backend="aot")
def checkpoint_inside_without_generator() -> Made:
    """A checkpointed block with `preserve_rng_state=False` inside the function."""
    w = weight()

    def step(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda x: (x @ w).sin(), x, use_reentrant=False, preserve_rng_state=False)
        return out

    return Made(step, [differentiated(X)], w)


@program(differs="Without AOTAutograd a captured checkpoint keeps no generator state: stock's gradients are wrong.")
def checkpoint_under_a_graph_backend() -> Made:
    """Dropout in a checkpointed block, with a backend that runs graphs as they are."""
    return _checkpointed(use_reentrant=False)


def _outside(**kwargs: Any) -> Made:
    """Call the function under the caller's checkpoint, with optimizer steps, after which a retry may be made."""
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.1)

    def step(x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x * w.sum(), 0.5)

    def call(fn: Function) -> object:
        out: Tensor = checkpoint(fn, torch.ones(4, 8, requires_grad=True), **kwargs)
        agreed = masks_agree(out.sum(), w)
        optimizer.step()
        return agreed

    return Made(step, [call] * 3)


@program(backend="aot")
def checkpoint_outside() -> Made:
    """The caller's checkpoint around the function, with dropout."""
    return _outside(use_reentrant=False)


@program(backend="aot")
def reentrant_checkpoint_outside() -> Made:
    """The caller's reentrant checkpoint around the function, which first runs it without gradients."""
    return _outside(use_reentrant=True)


@program(backend="aot")
def selective_checkpoint() -> Made:
    """A checkpoint that saves the matrix products and recomputes the rest."""
    w = weight()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def block(x: Tensor) -> Tensor:
        return torch.sigmoid((x @ w).sin() @ w)

    def step(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return out

    return Made(step, [differentiated(torch.ones(3, 6))] * 2, w)


@program(backend="aot")
def saved_tensors_hooks() -> Made:
    """The caller's hooks on saved tensors, as for offloading."""
    w = weight()

    def call(fn: Function) -> object:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
            loss = fn(X).sum()
        loss.backward()
        return loss.detach()

    return Made(lambda x: (x @ w).sin(), [call] * 2, w)


@program(backend="aot")
def anomaly_mode() -> Made:
    """The caller's anomaly detection, with NaN gradients in the second call."""
    w = weight()

    def call(fn: Function, x: Tensor) -> object:
        w.grad = None
        with torch.autograd.detect_anomaly(check_nan=False):
            return differentiated(x)(fn)

    return Made(lambda x: (x @ w).sqrt(), [lambda fn: call(fn, X), lambda fn: call(fn, -X)], w)
