"""Makes ``torch.compile`` itself fall back and retry, for programs and frameworks that call it."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch

from ._compile.creation import is_creating
from ._decorator import check_function, decoration, plain
from ._function import CompiledFunction, as_function
from ._locks import Lock
from ._schedule.policy import RetryPolicy
from ._switches import is_set
from ._torch.eager import is_from_torch, is_from_torch_compile, original_of_inline_wrapper, replace_context
from .events import log

if TYPE_CHECKING:
    from tenacity import Retrying


class Installation(AbstractContextManager["Installation"]):
    """The handle that :func:`install` returns. As a context manager, it calls :meth:`remove` at the end of the block.

    Attributes:
        policy: The policy of what is compiled while this installation is the newest.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy

    def remove(self) -> None:
        """Undo the installation. What has been compiled meanwhile stays as it is. Further calls have no effect."""
        with _lock:
            if self in _installations:
                _installations.remove(self)
            current: Any = torch.compile
            if not _installations and getattr(current, "__code__", None) is _CODE:
                torch.compile = current.__wrapped__

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


_lock = Lock()
_installations: list[Installation] = []


def install(policy: RetryPolicy | Retrying | None = None) -> Installation:
    """Make ``torch.compile`` and ``nn.Module.compile`` fall back to eager, and retry, wherever the program calls them.

    They return what stock PyTorch returns: an ``OptimizedModule`` for a module, a function for a function. What was
    compiled before stays as it is. So does what PyTorch compiles for itself, and what
    :func:`compile_with_fallback` does not take: classes, and generator and coroutine functions.

    It can be called repeatedly, and from any thread. The policy of the newest installation that has not been removed
    is used.

    Args:
        policy: The retry policy, as for :func:`compile_with_fallback`.

    Returns:
        A handle. Its ``remove()`` undoes the installation. As a context manager, it does so at the end of the block.

    Raises:
        TypeError: `policy` is not a policy.

    Example:
        >>> with install(RetryPolicy.every(calls=100)):
        ...     model = torch.compile(torch.nn.Linear(2, 2))
        >>> compiled_function(model).state
        <CompileState.PENDING: 'pending'>
    """
    installation = Installation(RetryPolicy.of(policy))
    with _lock:
        if getattr(torch.compile, "__code__", None) is not _CODE:
            torch.compile = _surviving(torch.compile)
        _installations.append(installation)
    return installation


def install_at_start() -> None:
    """Install if ``COMPILE_RETRY`` says so, unless it also switches the library off."""
    if is_set("install") and is_set("off"):
        log.warning("COMPILE_RETRY switches the library off, so torch.compile stays as it is")
    elif is_set("install"):
        install()


def _surviving(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `stock`, and protects what it returns."""

    @functools.wraps(stock)
    def compile(model: Any = None, **options: Any) -> Any:  # noqa: A001  # torch calls it so, in its errors too
        if model is None:
            stock(None, **options)  # checks the arguments
            return functools.partial(compile, **options)
        given = dict(options)
        if isinstance(options.get("options"), dict):
            options["options"] = dict(options["options"])  # torch.compile removes entries from it
        result = stock(model, **options)
        frame = sys._getframe(1)
        with _lock:
            policy = _installations[-1].policy if _installations else None
        if policy is None or result is model or is_creating() or _is_for_torch(frame):
            return result
        protect = functools.partial(_protect, policy, given, decoration(frame))
        if is_from_torch_compile(result):
            replace_context(result, lambda stock: _Context(stock, protect))
            return result
        return protect(model, result)

    return compile


_CODE: CodeType = _surviving(torch.compile).__code__


def _is_for_torch(frame: FrameType | None) -> bool:
    """Return True if PyTorch compiles something of its own, as flex attention does."""
    while frame is not None and frame.f_code in _ON_BEHALF:
        frame = frame.f_back
    return frame is not None and is_from_torch(frame.f_code)


# Functions of PyTorch that call torch.compile for their caller.
_ON_BEHALF = {torch.nn.Module.compile.__code__, torch.compiler.compile.__code__}


def _protect(
    policy: RetryPolicy, options: dict[str, Any], decorated_at: tuple[str, int], fn: Any, stock_result: Any
) -> Any:
    """Return a function like the one that ``torch.compile`` has returned, with a fallback."""
    from ._torch.compilers import innermost  # Dynamo has been imported by torch.compile

    fn = original_of_inline_wrapper(innermost(plain(fn)))
    try:
        check_function(fn)
    except TypeError:
        return stock_result
    function: CompiledFunction[..., Any] = CompiledFunction(
        fn, policy=policy, name=None, options=options, decorated_at=decorated_at
    )
    return as_function(function, stock_result)


class _Context:
    """The ``dynamo_ctx`` of an ``OptimizedModule``: compiles its call, and whatever else a framework passes to it.

    An ``OptimizedModule`` compiles through this attribute, again in each copy. Lightning takes it to compile the
    steps of a LightningModule. A pickle holds PyTorch's own context.
    """

    def __init__(self, stock: Any, protect: Callable[[Any, Any], Any]) -> None:
        self._stock, self._protect = stock, protect

    def __call__(self, fn: Any) -> Any:
        return self._protect(fn, self._stock(fn))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Context:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self._stock,)
