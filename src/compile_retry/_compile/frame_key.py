"""Keys that tell one compile of a frame from another, made without running anybody's code or keeping anything alive.

A frame's variables are read below Python: exact classes only, containers by their contents in C, tensors with
``__torch_function__`` and modes switched off. Coarser than Dynamo's guards: a key decides what is worth waiting for and
what is given up, never which code may run.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import islice
from types import CodeType, FunctionType, GetSetDescriptorType
from typing import Any, NamedTuple, TypeAlias

import torch

from compile_retry._torch.eager import without_torch_function

# Of one value: one of the records below, or its class.
Look: TypeAlias = object
Looks: TypeAlias = tuple[Look, ...]

# Containers are looked into so deep and so far: they may be long, or contain themselves. Strings may be long, too.
_DEPTH, _LENGTH = 2, 32

_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_NUMBERS = frozenset({int, float})
_PLAIN = frozenset({bool, type(None), str, *_NUMBERS})
_TABLES = frozenset({dict, OrderedDict})  # of a module: parameters, hooks and the like


class _Plain(NamedTuple):
    kind: type  # True is not 1
    value: object


class _Tensor(NamedTuple):
    shape: str  # as text, because a size may be symbolic where another compile is under way
    dimensions: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class _Items(NamedTuple):
    kind: type
    length: int
    looks: Looks


class _Member(NamedTuple):
    kind: type
    identity: int  # the members of an enumeration are unique


class _Instance(NamedTuple):
    kind: type | int
    training: object  # of a module
    attributes: Looks  # flags, numbers, short strings, functions; of a module also the classes of what it is made of


class FrameKey(NamedTuple):
    """Identifies one compile of a frame.

    Attributes:
        code: The frame's code, or that of a graph without a frame; None where ``torch.compile`` itself is called.
        exact: The looks of its variables as far as they may decide what is compiled. By this it is given up.
    """

    code: CodeType | None
    exact: Looks = ()

    @property
    def steady(self) -> FrameKey:
        """Without numbers and attributes, which may differ in each call. By this a frame waits and takes its turn."""
        return self._replace(exact=tuple(_reduced(look, sizes=True) for look in self.exact))

    @property
    def without_sizes(self) -> FrameKey:
        """Without the sizes of tensors as well: code with dynamic shapes covers what differs in those."""
        return self._replace(exact=tuple(_reduced(look, sizes=False) for look in self.exact))


# The call of torch.compile() itself, where that fails.
CREATION = FrameKey(None)


def key_of(code: CodeType, variables: Mapping[str, object]) -> FrameKey:
    """The key of a frame that is about to run this code with these variables.

    Numbers in enclosing functions are left out: that is where calls are counted.
    """
    outer = code.co_freevars
    with without_torch_function():
        looks = (
            type(value) if name in outer and type(value) in _NUMBERS else _look(value, _DEPTH)
            for name, value in variables.items()
        )
        return FrameKey(code, (torch.is_grad_enabled(), *looks))


def may_hold_tensors(variables: Mapping[str, object]) -> bool:
    """Look for anything of torch's or NumPy's, without which Dynamo does not compile a frame."""
    return any(_may_hold_tensors(value, 2 * _DEPTH) for value in variables.values())


def _look(value: Any, depth: int) -> Look:
    kind = type(value)
    try:
        if kind in _TENSORS:
            return _Tensor(str(value.shape), value.ndim, value.dtype, value.device, value.requires_grad)
        if _is_plain(value):
            return _Plain(kind, value)
        if depth and (items := _items(value)) is not None:
            looks = tuple(_look(item, depth - 1) for item in islice(items, _LENGTH))
            return _Items(kind, kind.__len__(value), looks)
        if issubclass(kind, enum.Enum):
            return _Member(kind, id(value))
        return _class(kind) if issubclass(kind, torch.Tensor) else _look_of_instance(value)
    except Exception:  # an object with ideas of its own
        return _class(kind)


def _look_of_instance(value: object) -> Look:
    kind, attributes = type(value), _attributes(value)
    items = [(name, item) for name, item in islice(attributes.items(), _LENGTH) if type(item) not in _TABLES]
    looks = tuple([(name, _look_of_attribute(item)) for name, item in items])
    if not issubclass(kind, torch.nn.Module):
        return _Instance(_class(kind), None, looks)
    parts = attributes.get("_modules")
    classes = tuple(_class(type(part)) for part in islice(dict.values(parts), _LENGTH)) if type(parts) is dict else ()
    return _Instance(_class(kind), attributes.get("training"), (*looks, classes))


def _class(kind: type) -> type | int:
    """A class as part of a key. One whose own class compares or hashes it in another way is known by its identity."""
    return kind if type(kind).__hash__ is type.__hash__ else id(kind)


def _look_of_attribute(value: Any) -> Look:
    if _is_plain(value):
        return _Plain(type(value), value)
    return value.__code__ if type(value) is FunctionType else _class(type(value))


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN and (kind is not str or len(value) <= _LENGTH)


def _items(value: Any) -> Iterator[Any] | None:
    """Iterate over a container of an exact class; None for anything else."""
    kind = type(value)
    if kind is dict:
        return iter(dict.values(value))
    return iter(value) if kind is list or kind is tuple else None


def _attributes(value: object) -> Mapping[str, object]:
    """An object's own attributes, where they are kept in the usual place."""
    for cls in type(value).__mro__:
        descriptor = cls.__dict__.get("__dict__")
        if type(descriptor) is GetSetDescriptorType:
            attributes: dict[str, object] = descriptor.__get__(value)
            return attributes
    return {}


def _reduced(look: Look, *, sizes: bool) -> Look:
    if isinstance(look, _Plain):
        return look._replace(value=None) if look.kind in _NUMBERS else look
    if isinstance(look, _Tensor):
        return look if sizes else look._replace(shape="")
    if isinstance(look, _Items):
        return look._replace(looks=tuple(_reduced(item, sizes=sizes) for item in look.looks))
    if isinstance(look, _Instance):
        return look._replace(attributes=())
    return look


def _may_hold_tensors(value: Any, depth: int) -> bool:
    kind = type(value)
    try:
        if _is_plain(value) or kind is str:
            return False
        if (items := _items(value)) is not None:
            return depth > 0 and any(_may_hold_tensors(item, depth - 1) for item in islice(items, _LENGTH))
        if kind is type:
            return issubclass(value, torch.nn.Module)
        if issubclass(kind, tuple):  # a named tuple
            return any(_may_hold_tensors(item, depth - 1) for item in islice(tuple.__iter__(value), _LENGTH))
        return issubclass(kind, (torch.Tensor, torch.nn.Module)) or kind.__module__ == "numpy"
    except Exception:  # a class with ideas of its own
        return True
