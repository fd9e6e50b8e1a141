"""`compile_repeated_blocks`: find the repeated blocks of a model, and compile each of them in place."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from tenacity import Retrying
from torch import nn

from ._decorator import CompileOptions, Ranks, check_module, check_options, compile_in_place, decoration
from ._schedule.policy import RetryPolicy
from ._torch.distributed import check_group

if TYPE_CHECKING:
    from typing_extensions import Unpack

M = TypeVar("M", bound=nn.Module)
# A class of blocks, or its name.
Block: TypeAlias = type[nn.Module] | str

# They hold the blocks of a model, and are none themselves.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def compile_repeated_blocks(
    model: M,
    block: type[nn.Module] | str | Iterable[type[nn.Module] | str] | None = None,
    *,
    policy: RetryPolicy | Retrying | None = None,
    name: str | None = None,
    group: Ranks | None = None,
    agree_timeout: float | timedelta | None = None,
    **compile_options: Unpack[CompileOptions],
) -> M:
    """Compile each repeated block of a model in place, as :func:`compile_with_fallback` compiles a module.

    Equal blocks share their compiled code, fail together and recover together. One log line speaks for all, such as
    ``Block x20 (layers.0 ... layers.19): recovered in call 41``. The rest of the model is left alone.

    Args:
        model: The model.
        block: The blocks' class, its name, or several of either. Subclasses match too. If a block contains another,
            only the outer one is compiled. The default is the list ``_repeated_blocks`` of the model, which diffusers
            models have. For other models it is every class that fills a ``ModuleList``, ``ModuleDict`` or
            ``Sequential`` of at least two modules; PyTorch's own modules without submodules, such as ``Linear``, do
            not count.
        policy: The retry policy: see :func:`compile_with_fallback`.
        name: The name in log lines; by default the class's name. Equal blocks with different names do not share.
        group: The ranks that agree: see :func:`compile_with_fallback`.
        agree_timeout: How long they wait for each other: see :func:`compile_with_fallback`.
        **compile_options: Arguments for ``torch.compile``: see :func:`compile_with_fallback`.

    Returns:
        The model. It stays the same object, with the same ``state_dict`` keys, and so do its blocks.

    Raises:
        TypeError: `model` is not an ``nn.Module``, `block` is neither a module class nor a name, or a block or another
            argument is wrong in the same way as for :func:`compile_with_fallback`.
        ValueError: The model has no such block, or another argument has a value that is not allowed. In the first case
            the message lists the classes that occur more than once in the model.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = compile_repeated_blocks(torch.nn.TransformerEncoder(layer, 12), dynamic=True)
        >>> compiled_function(model.layers[3])
        <CompiledFunction TransformerEncoderLayer (layers.3): pending>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {model!r}")
    check_module(model)
    options = dict(compile_options)
    check_options(policy, name, options)
    declared = check_group(group, agree_timeout)
    classes = _classes(block) if block is not None else _default_classes(model)
    blocks = dict(_outermost(model, classes, seen=set()))
    if not blocks:
        raise ValueError(_nothing_found(model, classes))
    for part in blocks.values():
        check_module(part)
    decorated_at = decoration(sys._getframe(1))
    for fqn, part in blocks.items():
        compile_in_place(
            part,
            policy=policy,
            name=name,
            group=declared,
            options=options,
            decorated_at=decorated_at,
            fqn=fqn,
        )
    return model


def _classes(block: object) -> tuple[Block, ...]:
    """Check the argument `block`."""
    classes = block if isinstance(block, Iterable) and not isinstance(block, str | type) else (block,)
    checked: list[Block] = []
    for each in classes:
        if not isinstance(each, str) and not (isinstance(each, type) and issubclass(each, nn.Module)):
            given = f"an instance of {type(each).__qualname__}" if isinstance(each, nn.Module) else repr(each)
            raise TypeError(f"block must be a module class, its name, or several of either, not {given}")
        checked.append(each)
    return tuple(checked)


def _default_classes(model: nn.Module) -> tuple[Block, ...]:
    declared = getattr(model, "_repeated_blocks", None)
    return _classes(declared) if declared else tuple(dict.fromkeys(_classes_in_lists(model)))


def _classes_in_lists(model: nn.Module) -> Iterator[type[nn.Module]]:
    for each in nn.Module.modules(model):
        if isinstance(each, _LISTS):
            parts = tuple(nn.Module.children(each))
            classes = set(map(type, parts))
            if len(parts) > 1 and len(classes) == 1 and _may_be_block(parts[0]):
                yield classes.pop()


def _may_be_block(part: nn.Module) -> bool:
    if type(part) in _LISTS:
        return False
    return type(part).__module__.partition(".")[0] != "torch" or bool(tuple(nn.Module.children(part)))


def _outermost(
    parent: nn.Module, classes: tuple[Block, ...], seen: set[nn.Module], prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the submodules of these classes that are in no other one, with their fully qualified names."""
    for name, part in nn.Module.named_children(parent):
        if part not in seen:
            seen.add(part)
            if _is_one_of(part, classes):
                yield prefix + name, part
            else:
                yield from _outermost(part, classes, seen, f"{prefix}{name}.")


def _is_one_of(part: nn.Module, classes: tuple[Block, ...]) -> bool:
    # With the names of base classes: FSDP2 replaces the class of a module by a subclass.
    names = [cls.__name__ for cls in type(part).__mro__]
    return any(cls in names if isinstance(cls, str) else isinstance(part, cls) for cls in classes)


def _nothing_found(model: nn.Module, classes: tuple[Block, ...]) -> str:
    owner = type(model).__qualname__
    wanted = ", ".join(cls if isinstance(cls, str) else cls.__name__ for cls in classes)
    what = f"{owner} has no module of class {wanted}" if classes else f"found no repeated blocks in {owner}"
    parts = Counter(type(part).__name__ for part in nn.Module.modules(model) if _may_be_block(part))
    found = ", ".join(f"{cls} ({count})" for cls, count in parts.items() if count > 1)
    return f"{what}; candidates for block: {found or 'none'}"
