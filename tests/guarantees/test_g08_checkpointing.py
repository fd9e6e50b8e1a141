"""G8: a recomputation in the backward pass runs eagerly what the forward pass ran eagerly, and vice versa."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.optim import optimizer as optimizers
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from compile_retry import CompiledFunction, CompileState, RetryPolicy, compile_with_fallback, mark_step_end
from compile_retry.testing import FakeClock, fail_compiles
from support import Compiler, first, full_disk, rows

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)


class AheadOfTime(Compiler):
    """A backend whose code saves other tensors for the backward pass than eager does, so that every mix is detected."""

    def __call__(self, graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        run = super().__call__(graph_module, inputs)
        del run
        code: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)
        return code


def region(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    (x * 3).exp().sin()  # no graph contains it, but eager saves tensors for it
    h = torch.tanh(x @ w) * torch.sigmoid(x)
    return torch.tanh(h @ w) + h.sin() * h.cos()


def broken_region(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = torch.tanh(x @ w)
    torch._dynamo.graph_break()
    return torch.nn.functional.dropout(h @ w, 0.4) + h.sin() * h.cos()


class Training:
    """Layers that share one checkpointed function, trained next to their eager twin."""

    def __init__(self, fn: CompiledFunction[..., torch.Tensor], widths: tuple[int, ...], reentrant: bool) -> None:
        self.fn = fn
        self.reentrant = reentrant
        weights = [torch.randn(n, n) for n in widths]
        self.ours, self.twins = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
        self.optimizer, self.twin_optimizer = torch.optim.SGD(self.ours, lr=0.05), torch.optim.SGD(self.twins, lr=0.05)

    def forward(self, fn: Callable[..., torch.Tensor], weights: list[torch.nn.Parameter]) -> torch.Tensor:
        torch.manual_seed(1)
        loss = torch.zeros(())
        for w in weights:
            x = torch.randn(7, len(w)).requires_grad_()
            loss = loss + checkpoint(fn, x, w, use_reentrant=self.reentrant).sum()
        return loss

    def step(
        self, between: Callable[[], object] = lambda: None, *, micro_batches: int = 1, retain: bool = False
    ) -> None:
        """Run one step of both; the gradients must be equal."""
        for _ in range(micro_batches):
            loss = self.forward(self.fn, self.ours)
            between()
            loss.backward(retain_graph=retain)
            twin = self.forward(self.fn.eager, self.twins)
            twin.backward(retain_graph=retain)
            if retain:
                loss.backward()
                twin.backward()
            torch.testing.assert_close(loss, twin)
        torch.testing.assert_close([w.grad for w in self.ours], [w.grad for w in self.twins])
        for optimizer in (self.optimizer, self.twin_optimizer):
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("body", [region, broken_region])
def test_a_retry_that_comes_due_before_the_recomputation(reentrant: bool, body: Callable[..., torch.Tensor]) -> None:
    """The retry waits for the next step, and gradients equal eager's throughout."""
    clock = FakeClock()
    fn = compile_with_fallback(body, backend=AheadOfTime(first(1)), policy=RetryPolicy(wait=10, clock=clock))
    training = Training(fn, (4,), reentrant)
    for _ in range(4):
        training.step(lambda: clock.advance(11))
    assert fn.state is CompileState.COMPILED
    assert fn.stats.failures == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("widths", [(4, 4, 4), (4, 5, 4)])
def test_layers_that_share_a_function(reentrant: bool, dynamic: bool, widths: tuple[int, ...]) -> None:
    """A retry that becomes due during a forward pass does not affect layers that ran before it."""
    compiler = AheadOfTime(first(3))
    fn = compile_with_fallback(region, backend=compiler, policy=EVERY_CALL, dynamic=dynamic)
    training = Training(fn, widths, reentrant)
    for _ in range(8):
        training.step()
    assert fn.state is CompileState.COMPILED
    before = fn.stats
    training.step()
    assert fn.stats.compiled_calls == before.compiled_calls + 2 * len(widths)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_share_a_function_held_off_for_long(reentrant: bool) -> None:
    """The same holds if calls have bypassed Dynamo up to the last ones before the due moment."""
    policy = RetryPolicy(wait=None, wait_calls=201)
    fn = compile_with_fallback(region, backend=AheadOfTime(first(1)), policy=policy)
    for _ in range(200):
        fn(torch.ones(7, 4, requires_grad=True), torch.nn.Parameter(torch.ones(4, 4)))
    training = Training(fn, (4, 4, 4), reentrant)
    for _ in range(4):  # call 202, the first due one, is the second of the first step
        training.step()
    assert fn.state is CompileState.COMPILED
    assert fn.stats.eager_calls >= 206
    assert fn.stats.compiled_calls >= 12


@pytest.mark.parametrize("seed", range(12))
def test_any_schedule_of_failures(seed: int) -> None:
    """With random failures, due moments, micro-batches, retained graphs and `retry_now`, gradients stay equal."""
    draw = random.Random(seed)
    rate = [0.7]
    compiler = AheadOfTime(lambda inputs: full_disk() if draw.random() < rate[0] else None)
    clock = FakeClock()
    policy = draw.choice([EVERY_CALL, RetryPolicy(wait=None, wait_calls=3), RetryPolicy(wait=1.0, clock=clock)])
    fn = compile_with_fallback(
        draw.choice([region, broken_region]), backend=compiler, policy=policy, dynamic=draw.choice([False, True])
    )
    training = Training(fn, draw.choice([(4,), (4, 4, 4), (4, 5), (4, 5, 4, 6)]), draw.choice([False, True]))

    def between() -> None:
        clock.advance(draw.choice([0, 0.5, 1.1]))
        if draw.random() < 0.1:
            fn.retry_now()

    for step in range(14):
        rate[0] = 0.7 if step < 5 else 0.0
        training.step(between, micro_batches=draw.choice([1, 2]), retain=draw.random() < 0.3)
    assert fn.state is CompileState.COMPILED


def test_new_code_is_not_used_for_layers_that_ran_before_it() -> None:
    """New code for one width that would also fit another one is not used for the other in the same step."""
    fn = compile_with_fallback(region, backend=AheadOfTime(rows(4)), policy=EVERY_CALL, dynamic=True)

    def forward(f: Callable[..., torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
        outputs = [checkpoint(f, torch.ones(len(w), len(w)), w, use_reentrant=False) for w in weights]
        return torch.stack([y.sum() for y in outputs]).sum()

    with fail_compiles(OSError, times=1):
        weights, twins = ([torch.eye(n).requires_grad_() for n in (4, 5, 4, 5)] for _ in range(2))
        for _ in range(6):
            forward(fn, list(weights)).backward()
            forward(region, list(twins)).backward()
            torch.testing.assert_close([w.grad for w in weights], [w.grad for w in twins])
    assert fn.stats.failures >= 1


def test_all_calls_under_an_autograd_function() -> None:
    """With reentrant checkpointing, a retry is made after an optimizer step, and not before."""
    fn = compile_with_fallback(region, backend=AheadOfTime(first(1)), policy=EVERY_CALL)
    w = torch.nn.Parameter(torch.randn(4, 4))
    sgd = torch.optim.SGD([w], lr=0.1)
    for _ in range(3):
        checkpoint(fn, torch.ones(7, 4).requires_grad_(), w, use_reentrant=True).sum().backward()
        assert fn.state is CompileState.FALLBACK
    sgd.step()
    checkpoint(fn, torch.ones(7, 4).requires_grad_(), w, use_reentrant=True).sum().backward()
    assert fn.state is CompileState.COMPILED


def test_a_loop_without_an_optimizer() -> None:
    """In loops that update their weights in another way, `mark_step_end` ends the step."""
    fn = compile_with_fallback(region, backend=AheadOfTime(first(1)), policy=EVERY_CALL)
    w = torch.randn(4, 4, requires_grad=True)

    def step() -> None:
        checkpoint(fn, torch.ones(7, 4).requires_grad_(), w, use_reentrant=True).sum().backward()

    step()
    step()
    assert fn.stats.attempts == 1
    mark_step_end()
    step()
    assert fn.state is CompileState.COMPILED


def test_an_optimizer_that_steps_within_the_backward_pass() -> None:
    """Such an optimizer does not end the step, because other layers still have to be recomputed."""
    fn = compile_with_fallback(region, backend=AheadOfTime(first(1)), policy=EVERY_CALL)
    weights = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    for w in weights:
        sgd = torch.optim.SGD([w], lr=0.1)
        w.register_post_accumulate_grad_hook(lambda _, sgd=sgd: sgd.step())
    for _ in range(2):
        y = torch.ones(7, 4).requires_grad_()
        for w in weights:
            y = checkpoint(fn, y, w, use_reentrant=True)
        y.sum().backward()
    assert fn.stats.attempts == 1
    mark_step_end()
    fn(torch.ones(7, 4), weights[0])
    assert fn.stats.attempts == 2


def test_a_plain_call_between_forward_and_backward() -> None:
    """A call outside checkpointing does not get code that the recomputation would then run."""
    fn = compile_with_fallback(region, backend=AheadOfTime(first(1)), policy=EVERY_CALL)
    w, v = (torch.eye(4).requires_grad_() for _ in range(2))
    x = torch.ones(7, 4)
    loss = checkpoint(fn, x, w, use_reentrant=False).sum()
    fn(x, w), fn(x, w)
    assert fn.stats.attempts == 1
    loss.backward()
    region(x, v).sum().backward()
    torch.testing.assert_close(w.grad, v.grad)
    fn(x, w)
    assert fn.state is CompileState.COMPILED


def test_a_reset_between_forward_and_backward() -> None:
    """After `reset` or a reset of Dynamo, the recomputation still runs eagerly what ran eagerly."""
    for reset in ("ours", "torch's"):
        fn = compile_with_fallback(torch.sin, backend=AheadOfTime(first(1)), policy=EVERY_CALL, name=reset)
        x = torch.ones(4).requires_grad_()
        y = checkpoint(fn, x, use_reentrant=False)
        fn.reset() if reset == "ours" else torch._dynamo.reset()
        y.sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(4).cos())
        fn(x)
        assert fn.state is CompileState.COMPILED


def test_another_threads_optimizer() -> None:
    """Another thread's optimizer ends that thread's step, not this one's."""
    fn = compile_with_fallback(region, backend=AheadOfTime(first(1)), policy=EVERY_CALL)
    w = torch.nn.Parameter(torch.eye(4))
    loss = checkpoint(fn, torch.ones(7, 4).requires_grad_(), w, use_reentrant=True).sum()
    other = torch.nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    thread = threading.Thread(target=torch.optim.SGD([other], lr=0.1).step)
    thread.start()
    thread.join(60)
    fn(torch.ones(7, 4), w)
    assert fn.stats.attempts == 1
    loss.backward()
    mark_step_end()
    fn(torch.ones(7, 4), w)
    assert fn.stats.attempts == 2


def test_the_step_of_a_thread_that_has_ended() -> None:
    """The step of a thread that has ended holds nothing off."""
    fn = compile_with_fallback(region, backend=AheadOfTime(first(1)), policy=EVERY_CALL)
    w = torch.eye(4).requires_grad_()
    thread = threading.Thread(target=lambda: checkpoint(fn, torch.ones(7, 4), w, use_reentrant=True))
    thread.start()
    thread.join(60)
    fn(torch.ones(7, 4), w)
    assert fn.stats.attempts == 2
    mark_step_end()


def test_optimizers_are_watched_only_when_necessary() -> None:
    """The hook on all optimizers exists only while a retry waits for the end of a step."""
    hooks = optimizers._global_optimizer_post_hooks
    fn = compile_with_fallback(region, backend=AheadOfTime(first(1)), policy=EVERY_CALL)
    w = torch.nn.Parameter(torch.eye(4))
    checkpoint(fn, torch.ones(7, 4).requires_grad_(), w, use_reentrant=True).sum().backward()
    assert len(hooks) == 1
    torch.optim.SGD([w], lr=0.1).step()
    assert not hooks


def test_a_compile_that_fails_in_the_backward_pass() -> None:
    """A function that is called only in backward passes falls back, and is retried there."""
    fn = compile_with_fallback(torch.cos, backend=Compiler(first(1)), policy=EVERY_CALL)

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * fn(*ctx.saved_tensors)

    for _ in range(3):
        x = torch.ones(3, requires_grad=True)
        y: torch.Tensor = Sine.apply(x)  # type: ignore[no-untyped-call]  # torch has no annotations here
        y.sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(3).cos())
    assert fn.state is CompileState.COMPILED


@pytest.mark.parametrize("hook_kind", ["save_on_cpu", "methods", "objects"])
def test_other_saved_tensor_hooks(hook_kind: str) -> None:
    """Other hooks are treated like checkpointing's, and released with the graph."""

    class Hooks:
        __slots__ = ()  # so that it cannot be weakly referenced

        def keep(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

    hooks: Any = {
        "save_on_cpu": torch.autograd.graph.save_on_cpu,
        "methods": lambda: torch.autograd.graph.saved_tensors_hooks(Hooks().keep, Hooks().keep),
        "objects": lambda: torch.autograd.graph.saved_tensors_hooks(Hooks(), Hooks()),
    }[hook_kind]
    fn = compile_with_fallback(region, backend=AheadOfTime(first(1)), policy=EVERY_CALL)
    w, v = (torch.eye(4).requires_grad_() for _ in range(2))
    for _ in range(4):
        with hooks():
            loss = fn(torch.ones(7, 4), w).sum()
        loss.backward()
        region(torch.ones(7, 4), v).sum().backward()
        torch.testing.assert_close(w.grad, v.grad)
        mark_step_end()
    assert fn.state is CompileState.COMPILED


def test_checkpoint_on_top_of_save_on_cpu_while_held_off() -> None:
    """Both kinds of hooks work together."""
    fn = compile_with_fallback(region, backend=AheadOfTime(lambda inputs: full_disk()), policy=EVERY_CALL)
    training = Training(fn, (4, 4), reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        for _ in range(4):
            training.step()
    assert fn.stats.failures >= 3


def test_checkpoint_sequential() -> None:
    """A decorated module can be used as several segments."""
    compiler = AheadOfTime(first(2))
    layers = [compile_with_fallback(torch.nn.Linear(4, 4), backend=compiler, policy=EVERY_CALL) for _ in range(4)]
    net = torch.nn.Sequential(*layers)
    twin = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    twin.load_state_dict(net.state_dict())
    sgd, twin_sgd = (torch.optim.SGD(module.parameters(), lr=0.1) for module in (net, twin))
    for _ in range(4):
        x = torch.randn(5, 4, requires_grad=True)
        checkpoint_sequential(net, 2, x, use_reentrant=False).sum().backward()
        twin(x).sum().backward()
        torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])
        sgd.step(), twin_sgd.step()
    assert compiler.asked == 3  # two failures; then one compile for all layers


def test_double_backward_while_held_off() -> None:
    """Double backward works while held off, as in eager. On code compiled ahead of time, torch raises an error."""
    fn = compile_with_fallback(lambda x: x.sin() * x, backend=AheadOfTime(first(1)), policy=EVERY_CALL)
    x = torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, 2 * x.cos() - x * x.sin())
    (grad,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), x)
