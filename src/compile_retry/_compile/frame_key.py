"""Keys that distinguish compiles of a frame, made without running user code or keeping objects alive.

Variables are inspected without calling overridable methods: exact classes only, containers through the methods of the
built-in classes, tensors with ``__torch_function__`` and modes disabled. Keys are coarser than Dynamo's guards: a key
decides which frames wait and which are given up, never which code may run.
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

# The summary of one value: one of the records below, or the value's class.
Summary: TypeAlias = object
Summaries: TypeAlias = tuple[Summary, ...]

# Limits on the depth and length of inspected containers, which may be long or contain themselves. _LENGTH limits
# strings too.
_DEPTH, _LENGTH = 2, 32

_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_NUMBERS = frozenset({int, float})
_PLAIN = frozenset({bool, type(None), str, *_NUMBERS})
_TABLES = frozenset({dict, OrderedDict})  # a module's parameters, hooks and the like


class _Plain(NamedTuple):
    kind: type  # True is not 1
    value: object


class _Tensor(NamedTuple):
    shape: str  # as text, because a size may be symbolic while another compile is in progress
    dimensions: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class _Items(NamedTuple):
    kind: type
    length: int
    summaries: Summaries


class _Member(NamedTuple):
    kind: type
    identity: int  # the members of an enumeration are unique


class _Instance(NamedTuple):
    kind: type | int
    training: object  # for modules
    # Flags, numbers, short strings, functions; for modules also the classes of the submodules. A deep copy may have its
    # attributes in another order.
    attributes: frozenset[tuple[str, Summary]]


class FrameKey(NamedTuple):
    """Identifies one compile of a frame.

    Attributes:
        code: The code of the frame, or of a graph without a frame; None for the call to ``torch.compile`` itself.
        exact: Summaries of the variables, as far as they may affect the compile. Frames are given up by this.
    """

    code: CodeType | None
    exact: Summaries = ()

    @property
    def steady(self) -> FrameKey:
        """The key without numbers and attributes, which may differ in each call. Frames wait and take turns by this."""
        return self._replace(exact=tuple(_reduced(summary, sizes=True) for summary in self.exact))

    @property
    def without_sizes(self) -> FrameKey:
        """The steady key without tensor sizes as well: code with dynamic shapes covers other sizes."""
        return self._replace(exact=tuple(_reduced(summary, sizes=False) for summary in self.exact))


# The key of the call to torch.compile() itself.
CREATION = FrameKey(None)


def key_of(code: CodeType, variables: Mapping[str, object]) -> FrameKey:
    """Return the key of a frame that is about to run this code with these variables.

    Numbers in closure variables are left out, because they are often call counters.
    """
    outer = code.co_freevars
    with without_torch_function():
        summaries = (
            type(value) if name in outer and type(value) in _NUMBERS else _summary(value, _DEPTH)
            for name, value in variables.items()
        )
        return FrameKey(code, (torch.is_grad_enabled(), *summaries))


def may_hold_tensors(variables: Mapping[str, object]) -> bool:
    """Return True if any variable may hold a torch or NumPy object. Without one, Dynamo does not compile a frame."""
    return any(_may_hold_tensors(value, 2 * _DEPTH) for value in variables.values())


def _summary(value: Any, depth: int) -> Summary:
    kind = type(value)
    try:
        if kind in _TENSORS:
            return _Tensor(str(value.shape), value.ndim, value.dtype, value.device, value.requires_grad)
        if _is_plain(value):
            return _Plain(kind, value)
        if depth and (items := _items(value)) is not None:
            summaries = tuple(_summary(item, depth - 1) for item in islice(items, _LENGTH))
            return _Items(kind, kind.__len__(value), summaries)
        if issubclass(kind, enum.Enum):
            return _Member(kind, id(value))
        return _class(kind) if issubclass(kind, torch.Tensor) else _summary_of_instance(value)
    except Exception:  # the object overrides something that this relies on
        return _class(kind)


def _summary_of_instance(value: object) -> Summary:
    kind, attributes = type(value), _attributes(value)
    items = [(name, item) for name, item in islice(attributes.items(), _LENGTH) if type(item) not in _TABLES]
    summaries = frozenset([(name, _summary_of_attribute(item)) for name, item in items])
    if not issubclass(kind, torch.nn.Module):
        return _Instance(_class(kind), None, summaries)
    parts = attributes.get("_modules")
    classes = tuple(_class(type(part)) for part in islice(dict.values(parts), _LENGTH)) if type(parts) is dict else ()
    return _Instance(_class(kind), attributes.get("training"), summaries | {("_modules", classes)})


def _class(kind: type) -> type | int:
    """Return the class itself, or its ID if its metaclass overrides comparison or hashing."""
    return kind if type(kind).__hash__ is type.__hash__ else id(kind)


def _summary_of_attribute(value: Any) -> Summary:
    if _is_plain(value):
        return _Plain(type(value), value)
    return value.__code__ if type(value) is FunctionType else _class(type(value))


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN and (kind is not str or len(value) <= _LENGTH)


def _items(value: Any) -> Iterator[Any] | None:
    """Return an iterator over an exact dict, list or tuple; None for anything else."""
    kind = type(value)
    if kind is dict:
        return iter(dict.values(value))
    return iter(value) if kind is list or kind is tuple else None


def _attributes(value: object) -> Mapping[str, object]:
    """Return the object's ``__dict__`` if it is an ordinary one; otherwise an empty dict."""
    for cls in type(value).__mro__:
        descriptor = cls.__dict__.get("__dict__")
        if type(descriptor) is GetSetDescriptorType:
            attributes: dict[str, object] = descriptor.__get__(value)
            return attributes
    return {}


def _reduced(summary: Summary, *, sizes: bool) -> Summary:
    if isinstance(summary, _Plain):
        return summary._replace(value=None) if summary.kind in _NUMBERS else summary
    if isinstance(summary, _Tensor):
        return summary if sizes else summary._replace(shape="")
    if isinstance(summary, _Items):
        return summary._replace(summaries=tuple(_reduced(item, sizes=sizes) for item in summary.summaries))
    if isinstance(summary, _Instance):
        return summary._replace(attributes=frozenset())
    return summary


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
    except Exception:  # the class overrides something that this relies on
        return True
