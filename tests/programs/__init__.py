"""Small programs of all the kinds that torch.compile is used on, one kind per file."""

from __future__ import annotations

from programs import autograd, control, errors, modules, operators, side_effects, tensors
from programs.program import Program

PROGRAMS = [
    value
    for module in (control, errors, side_effects, autograd, modules, tensors, operators)
    for value in vars(module).values()
    if isinstance(value, Program)
]
