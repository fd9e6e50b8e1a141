"""Reprs in terms of constructors, also for tenacity's strategies, which have none of their own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from inspect import Parameter


def as_call(name: str, arguments: Mapping[str, object]) -> str:
    """Return the call of `name` with these keyword arguments."""
    return f"{name}({', '.join(f'{key}={as_expression(value)}' for key, value in arguments.items())})"


def as_expression(value: object) -> str:
    """Return an expression for a value: a function's name, or the constructor's call for an object without a repr."""
    if isinstance(value, float) and not math.isnan(value):
        text = f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else repr(value)
        return f"math.{text}" if value == math.inf else text
    if isinstance(value, tuple):
        return f"({', '.join(map(as_expression, value))}{',' * (len(value) == 1)})"
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__name__
    if isinstance(value, partial):
        arguments = [*map(as_expression, (value.func, *value.args))]
        return f"partial({', '.join([*arguments, *(f'{k}={as_expression(v)}' for k, v in value.keywords.items())])})"
    if type(value).__repr__ is not object.__repr__:
        return repr(value)
    return _as_constructor(value)


def _as_constructor(value: object) -> str:
    """Find the constructor's arguments among the attributes. Leave out those that have their default value."""
    name, attributes = type(value).__name__, dict(getattr(value, "__dict__", {}))
    if name.startswith("_"):  # the class of a single object, such as `stop_never`
        return name.removeprefix("_")
    try:
        parameters = inspect.signature(type(value)).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return f"{name}(...)"
    arguments: list[str] = []
    for parameter in parameters:
        if len(parameters) == len(attributes) == 1:
            found = next(iter(attributes.values()))  # as in `wait_fixed(wait)`, which stores `wait_fixed`
        elif parameter.name in attributes:
            found = attributes[parameter.name]
        else:  # as in `wait_random(min, max)`, which stores `wait_random_min` and `wait_random_max`
            found = attributes.get(f"{name}_{parameter.name}", parameter.default)
        if found is Parameter.empty or (parameter.kind is Parameter.VAR_POSITIONAL and not isinstance(found, tuple)):
            return f"{name}(...)"
        if parameter.kind is Parameter.VAR_POSITIONAL:
            arguments += map(as_expression, found)
        elif found != parameter.default:
            keyword = "" if len(parameters) == 1 or parameter.default is Parameter.empty else f"{parameter.name}="
            arguments.append(keyword + as_expression(found))
    return f"{name}({', '.join(arguments)})"
