"""Repeated blocks: twelve equal blocks of a transformer are compiled one by one, while the C++ compiler is broken.

    .venv-recipes/bin/python examples/recipes/repeated_blocks.py

`make recipes` creates that environment, although this recipe needs only torch. One failed attempt holds off all twelve
blocks, and one attempt after the repair brings all of them back. The compiler runs as often as with stock PyTorch.

A model from diffusers is compiled in the same way: it names its blocks itself, in `_repeated_blocks`.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._dynamo import lookup_backend
from torch.nn import functional as F

import compile_retry
from compile_retry import RetryPolicy, compile_repeated_blocks, compiled_function
from compile_retry.testing import assert_compiled, broken_compiler

BLOCKS, STEPS, REPAIRED_AFTER = 12, 10, 4


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.to_qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.movedim(-3, 0).transpose(-2, -3)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.from_heads(attended.transpose(-2, -3).flatten(-2))
        y: torch.Tensor = x + self.mlp(self.before_mlp(x))
        return y


class Transformer(nn.Module):
    def __init__(self, tokens: int = 16, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(BLOCKS))
        self.head = nn.Linear(width, tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


class CountingInductor:
    """The default compiler, with a count of its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.runs += 1
        compiled: Callable[..., Any] = lookup_backend("inductor")(graph_module, inputs)
        return compiled


def train(model: Transformer, after_step: Callable[[int], None] = lambda step: None) -> list[float]:
    """Train the model to repeat its input, and return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(1, STEPS + 1):
        tokens = torch.randint(16, (4, 8), generator=generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_step(step)
    return losses


def train_with_fault(model: Transformer, compiler: CountingInductor, fault: ExitStack) -> list[float]:
    # In calls of all blocks together: the next attempt is due four steps after a failure.
    policy = RetryPolicy.every(calls=4 * BLOCKS)
    compile_repeated_blocks(model, backend=compiler, policy=policy)

    def after_step(step: int) -> None:
        print(f"step {step}: {compiled_function(model.layers[0]).state.value}")
        if step == REPAIRED_AFTER:
            print(">>> the compiler is repaired")
            fault.close()

    return train(model, after_step)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    eager = Transformer()
    ours, stock = copy.deepcopy(eager), copy.deepcopy(eager)
    compiler, stock_compiler = CountingInductor(), CountingInductor()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as fault:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"  # empty, because a cache hit needs no compiler
        fault.enter_context(broken_compiler())
        losses = train_with_fault(ours, compiler, fault)
        for layer in stock.layers:
            layer.compile(backend=stock_compiler)
        train(stock)

    print(compile_retry.report())
    statistics = [compiled_function(layer).stats for layer in ours.layers]
    failures = sum(stats.failures for stats in statistics)
    print(f"compiler runs: {compiler.runs} ({failures} failed); stock torch.compile: {stock_compiler.runs}")
    torch.testing.assert_close(losses, train(eager))
    assert failures == 1, "one attempt failed, for all blocks"
    assert compiler.runs == stock_compiler.runs + failures, "otherwise the compiler ran as often as with stock"
    for layer, stats in zip(ours.layers, statistics, strict=True):
        assert_compiled(layer)
        assert (stats.eager_calls, stats.compiled_calls) == (REPAIRED_AFTER, STEPS - REPAIRED_AFTER), "every block"


if __name__ == "__main__":
    main()
