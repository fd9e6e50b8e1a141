"""Training steps for test_state_machine.py, faults in their compiles, and their eager twins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from reference_model import Books, Config, Model, Outcome
from torch._dynamo.exc import UncapturedHigherOrderOpError
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils.checkpoint import checkpoint

from compile_retry import CompiledFunction, compile_with_fallback, compiled_function
from compile_retry.testing import FakeClock

LEARNING_RATE = 0.1
RECOMPILE_LIMIT = 64  # for all kinds of calls of a step; thread-local, so set in each thread

# Raised by the step between two of its graphs, where Dynamo does not trace.
armed: list[BaseException] = []


class Trouble(Exception):
    pass


class Net(torch.nn.Module):
    """Weights, dropout and a buffer that every step writes to. Its `forward` is the step under test."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(2))


def _between(log: list[str]) -> None:
    log.append("between")
    if armed:
        raise armed[0]


between = torch.compiler.disable(_between)


def flat(net: Any, x: torch.Tensor, log: list[str], tag: str) -> torch.Tensor:
    """Run two graphs. The lines shared with `deep` are not a function, because it could become its own frame."""
    log.append("first")
    if tag == "raise first":
        raise Trouble(tag, 7)
    net.count.add_(1)
    h = net.dropout(net.linear(x)).sin()
    between(log)
    log.append("second")
    if tag == "raise second":
        raise Trouble(tag, 7)
    net.count.mul_(1.5)
    y: torch.Tensor = h.cos().sum() * (2 if net.training else 3) + net.count.sum()
    return y


def inner(h: torch.Tensor, log: list[str]) -> torch.Tensor:
    log.append("inner")
    h = h.tanh()
    between(log)
    log.append("rest of inner")
    return h.sigmoid()


def deep(net: Any, x: torch.Tensor, log: list[str], tag: str) -> torch.Tensor:
    """Run four graphs in two functions."""
    log.append("first")
    if tag == "raise first":
        raise Trouble(tag, 7)
    net.count.add_(1)
    h = inner(net.dropout(net.linear(x)).sin(), log)
    log.append("second")
    if tag == "raise second":
        raise Trouble(tag, 7)
    net.count.mul_(1.5)
    y: torch.Tensor = h.cos().sum() * (2 if net.training else 3) + net.count.sum()
    return y


class FlatNet(Net):
    forward = flat


class DeepNet(Net):
    forward = deep


# In order of execution, by the name of the function that contains them, or of its resume function.
GRAPHS = {
    flat: {"flat": "sin", "torch_dynamo_resume_in_flat": "cos"},
    deep: {
        "deep": "sin",
        "inner": "tanh",
        "torch_dynamo_resume_in_inner": "sigmoid",
        "torch_dynamo_resume_in_deep": "cos",
    },
}

PERMANENT = (NotImplementedError, UncapturedHigherOrderOpError)


@dataclass
class Fault:
    """A fault: the next `times` attempts of the graph, or of all, fail if the call's arguments match."""

    stage: str
    kind: type[Exception]
    graph: str | None = None
    rows: int | None = None
    tag: str | None = None
    times: int = 10**9

    def strikes(self, stage: str, graph: str, config: Config) -> bool:
        fits = all(
            wanted in (None, actual)
            for wanted, actual in ((self.graph, graph), (self.rows, config.rows), (self.tag, config.tag))
        )
        if self.stage != stage or not fits or not self.times:
            return False
        self.times -= 1
        return True

    @property
    def outcome(self) -> Outcome:
        return "permanent" if self.kind in PERMANENT else "transient"


class Bench:
    """Makes compiles fail, and records the graphs that are compiled and run.

    Args:
        clock: The clock to advance when something is compiled.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.seconds = 0.0  # duration of an attempt
        self.fault: Fault | None = None
        self.model: Model | None = None  # the model of the function being called
        self.runs: list[str] = []

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        (graph,) = (name for name in ("sin", "tanh", "sigmoid", "cos") if f".{name}()" in graph_module.code)
        self.attempt("backend", graph)

        def run(*args: Any) -> Any:
            self.runs.append(graph)
            return graph_module.forward(*args)

        return run

    def attempt(self, stage: Any, graph: str) -> None:
        model, fault = self.model, self.fault
        assert model is not None
        if fault is not None and fault.strikes(stage, graph, model.call.config):
            self.clock.advance(self.seconds)
            model.attempt(graph, fault.outcome, stage, self.seconds)
            raise fault.kind("simulated")
        if stage == "backend":
            self.clock.advance(self.seconds)
            model.attempt(graph, "code", stage, self.seconds)

    def translate(self, run: Callable[[Any], None], translator: InstructionTranslator) -> None:
        name = translator.f_code.co_name.partition("_at_")[0]
        for graphs in GRAPHS.values():
            if self.model is not None and name in graphs:
                self.attempt("trace", graphs[name])
        run(translator)

    def create(self, torch_compile: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.model is None:
            return torch_compile(*args, **kwargs)
        self.attempt("torch.compile", "")
        self.model.was_created()
        return torch_compile(*args, **kwargs)

    @contextmanager
    def installed(self) -> Iterator[None]:
        run, torch_compile = InstructionTranslator.run, torch.compile
        with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            patch.setattr(InstructionTranslator, "run", lambda translator: self.translate(run, translator))
            patch.setattr(torch, "compile", lambda *args, **kwargs: self.create(torch_compile, *args, **kwargs))
            yield


@dataclass
class Result:
    """The effects of a call that are visible to a program."""

    value: torch.Tensor | None = None
    error: BaseException | None = None
    log: list[str] = field(default_factory=list)
    rng: torch.Tensor = field(default_factory=torch.get_rng_state)


@dataclass
class Subject:
    """A decorated function or module, its twin, and the model that it shares with others."""

    body: Callable[..., torch.Tensor]
    fn: CompiledFunction[..., torch.Tensor]
    call: Callable[..., torch.Tensor]
    net: Net
    twin: Net
    model: Model
    books: Books = field(default_factory=Books)

    def __post_init__(self) -> None:
        nets = self.net, self.twin
        self.model.functions.append(self.books)
        self.optimizers = [torch.optim.SGD(net.parameters(), lr=LEARNING_RATE) for net in nets]

    @property
    def is_module(self) -> bool:
        return self.call is self.net

    def update(self) -> None:
        """Step the optimizers, which also ends the step for checkpointing."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def tell(self, what: str) -> None:
        """Call this method of the function and of its model."""
        getattr(self.fn, what)()
        getattr(self.model, what)()

    def copied(self, model: Model) -> Subject:
        """Return a deep copy of the function, or of its module."""
        net, twin = copy.deepcopy(self.net), copy.deepcopy(self.twin)
        if self.is_module:
            return Subject(self.body, compiled_function(net), net, net, twin, model)
        fn = copy.deepcopy(self.fn)
        return Subject(self.body, fn, partial(fn, net), net, twin, model)


def decorated(body: Callable[..., torch.Tensor], model: Model, *, as_module: bool, **options: Any) -> Subject:
    """Decorate the function, or a new module with it as its `forward`."""
    net = FlatNet() if body is flat else DeepNet()
    twin = copy.deepcopy(net)
    if as_module:
        return Subject(body, compiled_function(compile_with_fallback(net, **options)), net, net, twin, model)
    fn = compile_with_fallback(body, **options)
    return Subject(body, fn, partial(fn, net), net, twin, model)


def perform(
    call: Callable[..., torch.Tensor], net: Net, config: Config, seed: int, meanwhile: Callable[[], None] | None = None
) -> Result:
    """Run one training step. With `meanwhile`, it is checkpointed, and `meanwhile` runs before the backward pass."""
    result, log = Result(), list[str]()
    torch.manual_seed(seed)
    x = torch.randn(config.rows, 4)
    net.train(config.training)
    with torch.set_grad_enabled(config.grad):
        try:
            if meanwhile is None:
                y = call(x, log, config.tag)
            else:
                y = checkpoint(call, x, log, config.tag, use_reentrant=False)
            result.value = y.detach().clone()
            result.log = log[:]
            log.clear()  # as at the start, for the recomputation
            if meanwhile is not None:
                meanwhile()
            if config.grad:
                y.backward()
        except (Trouble, OSError, NotImplementedError) as exc:
            result.error, result.log = exc, log
    result.rng = torch.get_rng_state()
    return result


def expected_graphs(body: Callable[..., torch.Tensor], config: Config) -> list[str]:
    """Return the graphs that eager would run, up to the program's error."""
    graphs = list(GRAPHS[body].values())
    if config.tag == "raise first":
        return []
    if armed:
        return graphs[: len(graphs) // 2]
    return graphs[:-1] if config.tag == "raise second" else graphs


def in_thread_or_not(work: Callable[[], Result], *, in_thread: bool) -> Result:
    def work_with_limit() -> Result:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return work()

    if not in_thread:
        return work()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work_with_limit).result(timeout=60)


def assert_same(ours: Result, eager: Result, subject: Subject) -> None:
    net, twin = subject.net, subject.twin
    if ours.error is not None and eager.error is None:
        raise ours.error
    assert type(ours.error) is type(eager.error)
    assert ours.error is None or (eager.error is not None and ours.error.args == eager.error.args)
    assert ours.log == eager.log, (ours.log, eager.log)
    assert torch.equal(ours.rng, eager.rng)
    grads = [[p.grad for p in which.parameters() if p.grad is not None] for which in (net, twin)]
    buffers = [dict(which.named_buffers()) for which in (net, twin)]
    for a, b in ((ours.value, eager.value), grads, buffers):
        torch.testing.assert_close(a, b, rtol=0, atol=0) if a is not None else None
