"""Compare the usual workarounds for a failing torch.compile, side by side, on one training step.

    python examples/compare_alternatives.py

The step normalises a batch, breaks the graph, and continues. The compiler compiles the first graph. Then the disk is
full, and every compile fails until the repair after step 5 of 12. Each approach runs the same steps in its own
`World`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from compile_retry import RetryPolicy, compile_with_fallback

STEPS, REPAIRED_AFTER = 12, 5
Step = Callable[[Tensor], Tensor]


class World:
    """A training step, a compiler that is broken for a while, and counters."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.norm = torch.nn.BatchNorm1d(4)
        self.now = 0  # the current step
        self.asked_in_vain = 0
        self.graphs_run = 0
        self.messages = 0

    def step(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        torch._dynamo.graph_break()
        return y.sin().sum()

    def compiler(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        first = self.now == 1 and self.graphs_run == 0
        if self.now <= REPAIRED_AFTER and not first:
            self.asked_in_vain += 1
            raise OSError(28, "No space left on device")

        def run(*args: Any) -> Any:
            self.graphs_run += 1
            return graph.forward(*args)

        return run


def stock(world: World) -> Step:
    return torch.compile(world.step, backend=world.compiler)


def try_round_torch_compile(world: World) -> Step:
    try:
        return torch.compile(world.step, backend=world.compiler)
    except Exception:
        return world.step


def latch_to_eager(world: World) -> Step:
    compiled = torch.compile(world.step, backend=world.compiler)
    latched = False

    def step(x: Tensor) -> Tensor:
        nonlocal latched
        if not latched:
            try:
                return compiled(x)
            except Exception:
                latched = True
        return world.step(x)

    return step


def eager_on_every_error(world: World) -> Step:
    compiled = torch.compile(world.step, backend=world.compiler)

    def step(x: Tensor) -> Tensor:
        try:
            return compiled(x)
        except Exception:
            return world.step(x)

    return step


def ours(world: World) -> Step:
    return compile_with_fallback(world.step, backend=world.compiler, policy=RetryPolicy.every(calls=2))


def suppressed() -> AbstractContextManager[object]:
    patch: AbstractContextManager[object] = torch._dynamo.config.patch(suppress_errors=True)
    return patch


@dataclass(frozen=True)
class Approach:
    """One approach to failing compiles."""

    name: str
    make: Callable[[World], Step]
    setting: Callable[[], AbstractContextManager[object]] = nullcontext


APPROACHES = [
    Approach("stock torch.compile", stock),
    Approach("try around torch.compile()", try_round_torch_compile),
    Approach("latch to eager", latch_to_eager),
    Approach("eager on every error", eager_on_every_error),
    Approach("suppress_errors=True", stock, suppressed),
    Approach("@compile_with_fallback", ours),
]


class Listener(logging.Handler):
    """Counts the warnings and errors that torch and the library would print to the terminal."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.messages += 1


def compare(approach: Approach) -> tuple[str, ...]:
    """Run the steps with one approach, and return its row of the table."""
    world = World()
    for name in ("torch._dynamo", "compile_retry"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Listener(world)], False
    done = compiled_after_repair = 0
    died = ""
    with approach.setting():
        step = approach.make(world)
        for world.now in range(1, STEPS + 1):
            before = world.graphs_run
            try:
                step(torch.randn(3, 4))
            except Exception:
                died = f"died in step {world.now}"
                break
            done += 1
            compiled_after_repair += world.now > REPAIRED_AFTER and world.graphs_run - before == 2
    batches = int(world.norm.state_dict()["num_batches_tracked"])
    return (
        approach.name,
        died or f"all {done}",
        "" if died else f"{batches} for {done} steps",
        f"{compiled_after_repair} of {STEPS - REPAIRED_AFTER}",
        str(world.asked_in_vain),
        str(world.messages),
    )


def main() -> None:
    """Print the table."""
    head = ("approach", "steps completed", "batches normalised", "compiled after repair", "failed compiles", "warnings")
    rows = [head, *(compare(approach) for approach in APPROACHES)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
