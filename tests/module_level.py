"""A function decorated at import, to be pickled by reference."""

from __future__ import annotations

import torch

from compile_retry import compile_with_fallback


@compile_with_fallback(backend="eager")
def double(x: torch.Tensor) -> torch.Tensor:
    """Return twice x."""
    return 2 * x
