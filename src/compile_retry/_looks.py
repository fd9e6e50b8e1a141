"""What values look like to a compiler: enough to tell one shape or mode from another, without keeping them alive.

Coarser than Dynamo's guards. It decides what is worth waiting for, never which code may run.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

Looks: TypeAlias = tuple[object, ...]


def of_value(value: object, *, shapes: bool = True) -> object:
    """A tensor's shape (or number of dimensions), type and device; a module's class and mode; otherwise the class."""
    if isinstance(value, torch.Tensor):
        shape = str(value.shape) if shapes else value.ndim
        return shape, value.dtype, value.device, value.requires_grad
    if isinstance(value, torch.nn.Module):
        return type(value), value.training
    if isinstance(value, (list, tuple)):
        return type(value), *(of_value(item, shapes=shapes) for item in value)
    if isinstance(value, dict):
        return type(value), *((str(key), of_value(item, shapes=shapes)) for key, item in value.items())
    return value if isinstance(value, bool) else type(value)


def of_values(values: dict[str, object], *, shapes: bool = True) -> Looks:
    """The same for named values."""
    return tuple((name, of_value(value, shapes=shapes)) for name, value in values.items())


def of_call(args: tuple[object, ...], kwargs: dict[str, object]) -> Looks:
    """The same for the arguments of a call, and whether gradients are on."""
    return torch.is_grad_enabled(), *map(of_value, args), *of_values(kwargs)
