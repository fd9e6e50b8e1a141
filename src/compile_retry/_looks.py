"""What values look like to a compiler: enough to tell one shape or mode from another, without keeping them alive.

Coarser than Dynamo's guards. It decides what is worth waiting for, never which code may run.
"""

from __future__ import annotations

from itertools import islice
from types import CodeType
from typing import TypeAlias

import torch

Looks: TypeAlias = tuple[object, ...]


# Containers are looked into so deep and so far: they may be long, or contain themselves. Strings may be long, too.
_DEPTH, _LENGTH = 2, 32


def of_value(value: object, *, shapes: bool = True, gradients: bool = True, depth: int = _DEPTH) -> object:
    """A tensor's shape (or number of dimensions), type and device; a module's class and mode; otherwise the class.

    Flags and short strings, which often choose what a function does, are themselves.
    """
    try:
        if isinstance(value, torch.Tensor):
            shape = str(value.shape) if shapes else value.ndim
            return shape, value.dtype, value.device, gradients and value.requires_grad
        if isinstance(value, torch.nn.Module):
            return type(value), value.training
    except Exception:  # a tensor of a class with ideas of its own
        return type(value)
    if isinstance(value, (list, tuple)) and depth:
        items = (of_value(item, shapes=shapes, gradients=gradients, depth=depth - 1) for item in value[:_LENGTH])
        return type(value), len(value), *items
    if isinstance(value, dict) and depth:
        items = (
            of_value(item, shapes=shapes, gradients=gradients, depth=depth - 1)
            for item in islice(value.values(), _LENGTH)
        )
        return type(value), len(value), *items
    return value if isinstance(value, bool) or (isinstance(value, str) and len(value) <= _LENGTH) else type(value)


def of_values(values: dict[str, object], *, shapes: bool = True, gradients: bool = True) -> Looks:
    """The same for named values."""
    return tuple((name, of_value(value, shapes=shapes, gradients=gradients)) for name, value in values.items())


def of_frame(code: CodeType, values: dict[str, object], *, shapes: bool = True, gradients: bool = True) -> Looks:
    """The same for the variables of a frame that begins to run this code, and whether gradients are on.

    Without gradients, a frame looks the same when a backward pass runs it again that ran first with gradients off.
    """
    mode = gradients and torch.is_grad_enabled()
    return code, mode, *of_values(values, shapes=shapes, gradients=gradients)


def of_call(args: tuple[object, ...], kwargs: dict[str, object]) -> Looks:
    """The same for the arguments of a call, and whether gradients are on."""
    return torch.is_grad_enabled(), *map(of_value, args), *of_values(kwargs)
