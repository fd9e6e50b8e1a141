"""Programs about the flow of control: graph breaks, branches on data, generators, context managers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from programs.program import Call, Function, Made, called, differentiated, program

X = torch.arange(6.0)


@program()
def one_graph() -> Made:
    """A function that is one graph."""
    return Made(lambda x: x.sin().cos(), [called(X), called(X + 1)])


@program(options={"fullgraph": True})
def fullgraph() -> Made:
    """A function that is one graph, under fullgraph=True."""
    return Made(lambda x, y: x @ y, [called(X, X)])


@program()
def graph_break() -> Made:
    """A frame of three graphs."""

    def step(x: Tensor) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        z = y + x.cos()
        torch._dynamo.graph_break()
        return z.exp()

    return Made(step, [called(X), called(X + 1)])


@program()
def break_in_callee() -> Made:
    """A graph break in a function that is called twice, with a log entry at each break."""
    log: list[str] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no annotations here
    def note(text: str) -> None:
        log.append(text)

    def inner(x: Tensor) -> Tensor:
        y = x.sin()
        note("inner")
        return y.cos()

    def step(x: Tensor) -> Tensor:
        return inner(inner(x * 2) + 1) * 3

    return Made(step, [called(X), called(X + 1)], log=log)


@program()
def break_in_loop() -> Made:
    """A graph break in a loop, in which Dynamo cannot resume: it skips the frame and compiles what it calls."""
    log: list[float] = []

    def layer(x: Tensor) -> Tensor:
        return (x * 2).sin() + x

    def step(x: Tensor) -> Tensor:
        for _ in range(3):
            x = layer(x)
            torch._dynamo.graph_break()
            log.append(float(x[1]))
        return x

    return Made(step, [called(X), called(X + 1)], log=log)


@program()
def branch_on_data() -> Made:
    """An `if` on a tensor, with both outcomes."""

    def step(x: Tensor) -> Tensor:
        y = x.sin() + 1
        if x.sum() > 0:
            return y * 2
        return y - 3

    return Made(step, [called(X), called(-X), called(X)])


@program()
def while_on_data() -> Made:
    """A `while` on a tensor."""

    def step(x: Tensor) -> tuple[Tensor, int]:
        n = 0
        while x.norm() > 1:
            x = x / 2
            n += 1
        return x.cos(), n

    return Made(step, [called(X), called(X * 5)])


@program()
def item() -> Made:
    """A number read from a tensor and used in a computation."""

    def step(x: Tensor) -> tuple[Tensor, float]:
        scale = x.abs().max().item()
        return x / scale, scale * 2

    return Made(step, [called(X), called(X + 1)])


@program(backend="aot")
def shape_from_data() -> Made:
    """A selection by mask, whose size depends on the data."""

    def step(x: Tensor) -> Tensor:
        kept = x[x > 2]
        return kept.sin() * kept.numel()

    return Made(step, [called(X), called(X + 1), called(X - 10)])


@program(backend="aot")
def masked_write() -> Made:
    """A boolean `index_put_`, whose backward has a size that depends on the data: stock breaks the graph there."""
    w = torch.eye(6).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return (x @ w).sin()

    def step(x: Tensor, mask: Tensor) -> Tensor:
        h = layer(x)
        out = h.new_zeros(mask.shape[0], 6)
        out.index_put_([mask], h)
        return layer(out)

    mask = torch.tensor([True, False, True, True, False, True])
    return Made(step, [differentiated(torch.ones(4, 6), mask)] * 2, w)


@program(options={"dynamic": None})
def shapes() -> Made:
    """Three shapes: the first graph is static, the second dynamic."""
    return Made(lambda x: x.sum() * x.shape[0], [called(torch.ones(n, 3)) for n in (2, 3, 5, 2)])


@program(options={"dynamic": False})
def static_shapes() -> Made:
    """One graph for each shape."""
    return Made(lambda x: x.sum() * x.shape[0], [called(torch.ones(n, 3)) for n in (2, 3, 5, 2)])


@program(options={"dynamic": False})
def over_the_recompile_limit() -> Made:
    """More constants than the recompile limit allows: the last ones run eagerly under stock too."""
    return Made(lambda x, k: x.sin() * k, [called(X, k) for k in range(10)])


@program()
def generator_inside() -> Made:
    """A generator created inside, partly consumed, and closed."""
    log: list[object] = []

    def parts(x: Tensor) -> Generator[Tensor, None, None]:
        try:
            for k in range(5):
                log.append(k)
                yield x * k
        finally:
            log.append("closed")

    def step(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        made = parts(x)
        for part in made:
            total = total + part
            if len(log) == 3:
                break
        made.close()
        return total.sin()

    return Made(step, [called(X), called(X + 1)], log=log)


@program()
def iterator_argument() -> Made:
    """An iterator shared by all calls: each call takes two items."""
    batches = iter([X + k for k in range(100)])

    def step(it: Iterator[Tensor]) -> Tensor:
        a = next(it).sin()
        torch._dynamo.graph_break()
        return a + next(it).cos()

    return Made(step, [called(batches)] * 2)


@program()
def own_context_manager() -> Made:
    """The program's own context managers, nested, with a graph break in a callee."""
    log: list[str] = []

    @contextlib.contextmanager
    def noted(name: str) -> Iterator[None]:
        log.append(f"enter {name}")
        try:
            yield
        finally:
            log.append(f"exit {name}")

    def callee(x: Tensor) -> Tensor:
        y = x.cos()
        torch._dynamo.graph_break()
        return y * 2

    def step(x: Tensor) -> Tensor:
        with noted("outer"), torch.no_grad():
            y = x.sin()
            with noted("inner"):
                y = callee(y)
        return y * x

    return Made(step, [called(X.clone().requires_grad_()), called(X)], log=log)


@program()
def traced_context_manager() -> Made:
    """The program's own context manager, traced by Dynamo, nested in itself."""
    level = [0]

    @contextlib.contextmanager
    def deeper() -> Iterator[int]:
        level[0] += 1
        try:
            yield level[0]
        finally:
            level[0] -= 1

    def step(x: Tensor) -> Tensor:
        with deeper() as a, deeper() as b:
            y = x.sin() * a + b
        return y * level[0] + x

    return Made(step, [called(X), called(X + 1)], level)


@program(backend="aot")
def autocast() -> Made:
    """Autocast inside and around the function, with a region that disables it."""
    w = (torch.eye(6) * 2).requires_grad_()  # small integers, so nothing is rounded

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ w
            with torch.autocast("cpu", enabled=False):
                z = y.float() @ w
        return z + (x @ w).float()

    def within(fn: Function) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = fn(X)
        out.sum().backward()
        return out.detach()

    return Made(step, [differentiated(X), within], w)


@program()
def recursion() -> Made:
    """A function that calls itself, through a graph break."""

    def step(x: Tensor, k: int) -> Tensor:
        if k == 0:
            return x.cos()
        y = x.sin()
        torch._dynamo.graph_break()
        return step(y, k - 1) + x

    return Made(step, [called(X, 2), called(X, 2)])


@program()
def calls_itself_compiled() -> Made:
    """A caller that runs the compiled function under no_grad, then inference_mode, then neither."""

    def under(mode: type) -> Call:
        def call(fn: Function) -> tuple[Tensor, bool]:
            with mode():
                out: Tensor = fn(x)
            return out.detach(), out.is_inference()

        return call

    x = X.clone().requires_grad_()
    return Made(
        lambda x: x.sin() * 2,
        [under(torch.no_grad), under(torch.inference_mode), under(contextlib.nullcontext), called(x)],
    )
