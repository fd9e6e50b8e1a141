"""The part of G8 that is kept: nothing is attempted during a backward pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import FakeClock
from support import Compiler, first


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_retry_that_comes_due_before_the_recomputation(reentrant: bool) -> None:
    """Waits for the next forward pass; gradients equal eager's throughout."""
    clock = FakeClock()

    def region(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x @ w) * torch.sigmoid(x)
        return torch.tanh(h @ w) + h.sin() * h.cos()

    policy = RetryPolicy(wait=10, clock=clock)
    fn = compile_with_fallback(region, backend=Compiler(first(1)), policy=policy)
    w0 = torch.randn(4, 4)
    for step in range(4):
        x = torch.randn(8, 4)
        w, v = w0.clone().requires_grad_(), w0.clone().requires_grad_()
        loss = checkpoint(fn, x.requires_grad_(), w, use_reentrant=reentrant).sum()
        clock.advance(6)
        loss.backward()
        clock.advance(3)
        region(x, v).sum().backward()
        torch.testing.assert_close(w.grad, v.grad)
        assert (fn.state is CompileState.COMPILED) == (step >= 2)
