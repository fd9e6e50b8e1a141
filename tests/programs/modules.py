"""Programs about modules and training: hooks, buffers, optimizers, schedules, mixed precision."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from programs.program import Call, Function, Made, called, differentiated, program

X = torch.arange(12.0).reshape(3, 4) / 10


class Net(nn.Module):
    """A linear layer followed by any other module."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.inner = nn.Linear(4, 4), inner or nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.layer(x))
        return out


def in_mode(net: Net, training: bool) -> Call:
    """Return a call in training or in evaluation mode."""

    def call(fn: Function) -> Tensor:
        net.train(training)
        out: Tensor = fn(X)
        return out.detach()

    return call


@program(backend="aot")
def module() -> Made:
    """A module compiled in place that counts its calls."""

    class Counting(Net):
        n_calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.n_calls = (self.n_calls + 1) % 2
            return super().forward(x) + self.n_calls

    net = Counting()

    def call(fn: Function) -> object:
        return differentiated(X)(fn), net.n_calls

    return Made(net, [call] * 2, net)


@program()
def training_and_evaluation() -> Made:
    """A module with batch norm that switches from training to evaluation and back."""
    net = Net(nn.BatchNorm1d(4))
    return Made(net, [in_mode(net, training) for training in (True, False, True)], net)


@program(backend="aot")
def dropout() -> Made:
    """Dropout in a module, with its gradient."""
    net = Net(nn.Dropout(0.5))

    def call(fn: Function) -> object:
        net.zero_grad()
        out = fn(X)
        out.sum().backward()
        return out.detach(), net.layer.bias.grad

    return Made(net, [call] * 2)


@program(backend="aot")
def module_hooks() -> Made:
    """Hooks before and after forward, and on backward, that change values and log the call."""
    net, log = Net(), list[str]()

    def before(module: nn.Module, args: Any) -> Any:
        log.append("before")
        return (args[0] * 2,)

    def after(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        log.append("after")
        return out + 1

    net.layer.register_forward_pre_hook(before)
    net.inner.register_forward_hook(after)
    net.register_forward_hook(after)
    return Made(net, [differentiated(X)] * 2, net, log)


@program()
def backward_hooks() -> Made:
    """Full backward hooks on a submodule and on the module itself."""
    net, log = Net(), list[str]()

    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        log.append(type(module).__name__)

    net.inner.register_full_backward_hook(hook)
    net.register_full_backward_hook(hook)
    return Made(net, [differentiated(X)] * 2, net, log)


@program()
def module_hook_that_raises() -> Made:
    """A forward hook of a submodule that raises in evaluation."""
    net, log = Net(), list[bool]()

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        log.append(module.training)
        if not module.training:
            raise RuntimeError("stop here", 7)

    net.layer.register_forward_hook(hook)
    return Made(net, [in_mode(net, training) for training in (True, False, True)], net, log)


@program(differs="Stock does not guard on module hooks: code compiled without a hook does not call it.")
def hook_removed_later() -> Made:
    """A forward hook that the caller adds before the second call and removes after it."""
    net = Net()

    def hooked(fn: Function) -> object:
        log: list[str] = []
        with net.inner.register_forward_hook(lambda *_: log.append("hook")):
            return fn(X).detach(), log

    return Made(net, [called(X), hooked, called(X)], net)


@program(backend="aot")
def blocks() -> Made:
    """Four equal blocks called in a loop by the compiled function."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))

    def step(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return Made(step, [differentiated(X)] * 2, layers)


@program(backend="aot")
def functional_call() -> Made:
    """`functional_call` with other parameters, and its gradients."""
    net = nn.Linear(4, 4)
    other = {name: torch.full_like(p, 0.3).requires_grad_() for name, p in net.named_parameters()}

    def step(params: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(net, params, (x,))
        return out.sin()

    return Made(step, [differentiated(other, X)] * 2, other)


@program()
def copied_module() -> Made:
    """A function that calls a module and a deep copy of it in turn."""
    net = Net()
    twin = copy.deepcopy(net)

    def step(net: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = net(x)
        return out.sin()

    return Made(step, [called(net, X), called(twin, X)], (net, twin))


@program(backend="aot")
def tied_and_parametrized() -> Made:
    """A parametrized weight shared by two layers."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    nn.utils.parametrizations.weight_norm(a)

    def step(x: Tensor) -> Tensor:
        out: Tensor = nn.functional.linear(b(a(x)), a.weight)
        return out

    return Made(step, [differentiated(X)] * 2, (a, b))


@program()
def lazy_module() -> Made:
    """A module whose parameters get their shapes in the first call.

    The generator is seeded again after each call, because Dynamo restores its state after drawing the parameters.
    """
    net = Net(nn.LazyLinear(3))

    def seeded(fn: Function) -> object:
        out = fn(X).detach()
        torch.manual_seed(0)
        return out

    return Made(net, [seeded] * 2, net)


@program(backend="aot")
def optimizer_inside() -> Made:
    """A training step with SGD and momentum inside the function."""
    net = nn.Linear(4, 4)
    nn.init.eye_(net.weight)
    nn.init.zeros_(net.bias)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Made(step, [called(X)] * 2, (net, optimizer))


@program(backend="aot")
def optimizer_step() -> Made:
    """Only the step of Adam is compiled."""
    net = nn.Linear(4, 4)
    nn.init.eye_(net.weight)
    nn.init.zeros_(net.bias)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

    def call(fn: Function) -> object:
        optimizer.zero_grad()
        net(X).pow(2).sum().backward()
        return fn()

    return Made(optimizer.step, [call] * 2, (net, optimizer))


@program(backend="aot")
def schedule() -> Made:
    """A learning rate that a scheduler changes between steps."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    def call(fn: Function) -> object:
        optimizer.zero_grad()
        loss = fn(X)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.detach(), scheduler.get_last_lr()

    return Made(lambda x: net(x).pow(2).mean(), [call] * 2, (net, optimizer))


@program(backend="aot")
def mixed_precision() -> Made:
    """Autocast and GradScaler with an overflow, which skips a step."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = net(x)
        return out.float().pow(2).mean()

    def call(fn: Function, scale: float) -> object:
        optimizer.zero_grad()
        loss = fn(X)
        scaler.scale(loss * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return Made(forward, [lambda fn: call(fn, 1.0), lambda fn: call(fn, float("inf"))], (net, optimizer, scaler))


@program(backend="aot")
def accumulation_and_clipping() -> Made:
    """Gradients of two micro-batches, clipped, and an averaged copy of the model."""
    net = nn.Linear(4, 4)
    nn.init.eye_(net.weight)
    nn.init.zeros_(net.bias)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(net)

    def call(fn: Function) -> object:
        optimizer.zero_grad()
        for part in (X, X + 1):
            fn(part).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)
        return norm

    return Made(lambda x: net(x).pow(2).mean(), [call] * 2, (net, optimizer, average))


@program()
def forward_replaced() -> Made:
    """A `forward` that is an instance attribute instead of a method, as adapters and placement hooks leave it."""
    net: Any = Net()
    old: Function = net.forward

    class Placed:
        def __call__(self, x: Tensor) -> Any:
            return old(x * 2)

    net.forward = Placed()
    return Made(net, [called(X)] * 2, net)


@program()
def buffer_written() -> Made:
    """A cache in a buffer, written at a position, and a buffer that is replaced."""

    class Cache(nn.Module):
        rows: Tensor
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(20, 4))
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            self.rows[at] = x.sin()
            self.total = self.total + x.sum()
            return self.rows.sum(0) + self.total

    net = Cache()
    return Made(net, [called(X, torch.tensor([k, k + 1, k + 2])) for k in (0, 5)], net)
