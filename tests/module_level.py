"""Decorated at import, as users do it; for pickling by reference."""

from __future__ import annotations

import torch

from compile_retry import compile_with_fallback


@compile_with_fallback(backend="eager")
def double(x: torch.Tensor) -> torch.Tensor:
    """Twice x."""
    return 2 * x
