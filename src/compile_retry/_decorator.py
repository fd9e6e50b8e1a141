"""The decorator `compile_with_fallback`, and the checks of its arguments."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Coroutine
from datetime import timedelta
from types import FrameType, MethodType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeAlias, TypedDict, TypeVar, overload

import torch

from ._function import CompiledFunction, ModuleHandle, behind
from ._schedule.policy import RetryPolicy
from ._torch.distributed import DeclaredGroup, check_group
from ._torch.eager import call_of, compiled_call_of, is_from_torch, is_from_torch_compile, optimized_call_of

if TYPE_CHECKING:
    from tenacity import Retrying
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

    Ranks: TypeAlias = Literal["world"] | ProcessGroup | DeviceMesh
else:
    Ranks = object  # not imported before it is needed, but type hints can be evaluated

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=torch.nn.Module)
# A module, or a static or class method: what is returned is of the same type.
K = TypeVar("K", bound="torch.nn.Module | staticmethod[..., Any] | classmethod[Any, ..., Any]")


class CompileOptions(TypedDict, total=False):
    """Arguments for ``torch.compile``, for type checkers. At run time, the installed version decides."""

    backend: str | Callable[..., Any] | None
    mode: str | None
    options: dict[str, Any] | None
    dynamic: bool | None
    fullgraph: bool
    disable: bool
    recompile_limit: int | None  # not in 2.10
    isolate_recompiles: bool  # not in 2.10
    shapes_spec: Any  # in 2.13
    dynamic_shapes: Any  # in 2.14


class Decorator(Protocol):
    """The type that ``compile_with_fallback(...)`` returns without a function."""

    @overload
    def __call__(self, fn: K, /) -> K: ...  # type: ignore[overload-overlap]  # these are callable, too
    @overload
    def __call__(self, fn: type[Any], /) -> None: ...  # type: ignore[overload-overlap]  # so are classes
    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> CompiledFunction[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> CompiledFunction[P, R]: ...


@overload
def compile_with_fallback(
    fn: None = None,
    /,
    *,
    policy: RetryPolicy | Retrying | None = ...,
    name: str | None = ...,
    group: Ranks | None = ...,
    agree_timeout: float | timedelta | None = ...,
    **compile_options: Unpack[CompileOptions],
) -> Decorator: ...
@overload
def compile_with_fallback(  # type: ignore[overload-overlap]  # these are callable, too
    fn: K,
    /,
    *,
    policy: RetryPolicy | Retrying | None = ...,
    name: str | None = ...,
    group: Ranks | None = ...,
    agree_timeout: float | timedelta | None = ...,
    **compile_options: Unpack[CompileOptions],
) -> K: ...
@overload  # for a class, which raises: type checkers report that None is called
def compile_with_fallback(  # type: ignore[overload-overlap]  # classes are callable, too
    fn: type[Any],
    /,
    *,
    policy: RetryPolicy | Retrying | None = ...,
    name: str | None = ...,
    group: Ranks | None = ...,
    agree_timeout: float | timedelta | None = ...,
    **compile_options: Unpack[CompileOptions],
) -> None: ...
@overload  # for a coroutine function, which raises: they report `await`. If R is Any, it equals the next one
def compile_with_fallback(
    fn: Callable[P, Coroutine[Any, Any, R]],
    /,
    *,
    policy: RetryPolicy | Retrying | None = ...,
    name: str | None = ...,
    group: Ranks | None = ...,
    agree_timeout: float | timedelta | None = ...,
    **compile_options: Unpack[CompileOptions],
) -> CompiledFunction[P, R]: ...
@overload
def compile_with_fallback(
    fn: Callable[P, R],
    /,
    *,
    policy: RetryPolicy | Retrying | None = ...,
    name: str | None = ...,
    group: Ranks | None = ...,
    agree_timeout: float | timedelta | None = ...,
    **compile_options: Unpack[CompileOptions],
) -> CompiledFunction[P, R]: ...
def compile_with_fallback(
    fn: Any = None,
    /,
    *,
    policy: RetryPolicy | Retrying | None = None,
    name: str | None = None,
    group: Ranks | None = None,
    agree_timeout: float | timedelta | None = None,
    **compile_options: Any,
) -> Any:
    """Compile a function with ``torch.compile``, run it eagerly while that fails, and retry when an attempt is due.

    Use it bare (``@compile_with_fallback``), with arguments (``@compile_with_fallback(dynamic=True)``) or as a plain
    call. Nothing is compiled before the first call.

    Args:
        fn: A function, a method in a class body (including static and class methods), any other callable that
            ``torch.compile`` accepts, or an ``nn.Module``. A module is compiled in place, as by
            ``nn.Module.compile()``, and returned.
        policy: The retry policy: a :class:`RetryPolicy`, or a ``tenacity.Retrying``, whose wait, stop and retry are
            used. By default, the first retry is due after 15 s, and waits grow by a quarter up to an hour, forever.
            Failed attempts may take at most a fifth of the time since the first failure.
        name: The name in log lines; by default the function's own name.
        group: The ranks that run a frame either all compiled or all eagerly, and that attempt in the same calls:
            ``"world"`` for all ranks, a ``ProcessGroup``, or a ``DeviceMesh`` of one dimension. Give it if the function
            moves data between ranks. They must make the same calls, with arguments of the same shapes.
        agree_timeout: Seconds, or a ``timedelta``, for which a rank waits in an attempt for one that gives no sign of
            life; by default half the timeout of the process group. A rank that is still compiling gives signs of life.
        **compile_options: Arguments for ``torch.compile``: ``backend``, ``mode``, ``options``, ``dynamic``,
            ``fullgraph`` and any others that the installed version accepts. ``isolate_recompiles`` is on by default.

    Returns:
        A :class:`CompiledFunction`. For a module, the module itself. For a static or class method, a static or class
        method around a :class:`CompiledFunction`. Without `fn`, a decorator.

    Raises:
        TypeError: `fn` cannot be compiled (a class, a generator or coroutine function, or not callable), an argument
            has the wrong type, or ``torch.compile`` has no such argument.
        ValueError: An argument has a value that is not allowed.
    """
    if fn is None:
        check_options(policy, name, compile_options)
        check_group(group, agree_timeout)
        return functools.partial(
            compile_with_fallback,
            policy=policy,
            name=name,
            group=group,
            agree_timeout=agree_timeout,
            **compile_options,
        )
    declared = check_group(group, agree_timeout)
    decorate = functools.partial(_decorate, policy, name, declared, compile_options, decoration(sys._getframe(1)))
    if isinstance(fn, (staticmethod, classmethod)):
        method = type(fn)(decorate(fn.__func__))
        vars(method).update({name: value for name, value in vars(fn).items() if name not in vars(method)})
        return method
    return decorate(fn)


def _decorate(  # noqa: PLR0917  # only called through a partial
    policy: object,
    name: str | None,
    group: DeclaredGroup | None,
    options: dict[str, Any],
    decorated_at: tuple[str, int],
    fn: Any,
) -> Any:
    target = plain(fn)
    if isinstance(target, torch.nn.Module):
        check_module(target)
        check_options(policy, name, options)
        return compile_in_place(
            target, policy=policy, name=name, group=group, options=options, decorated_at=decorated_at
        )
    check_function(target)
    check_options(policy, name, options)
    return CompiledFunction(
        target, policy=RetryPolicy.of(policy), name=name, options=options, decorated_at=decorated_at, declared=group
    )


def compile_in_place(
    module: M,
    *,
    policy: object,
    name: str | None,
    group: DeclaredGroup | None,
    options: dict[str, Any],
    decorated_at: tuple[str, int],
    fqn: str = "",
) -> M:
    """Compile a module in place and return it. All arguments have been checked.

    Args:
        module: The module.
        policy: The retry policy.
        name: The name in log lines.
        group: The ranks that agree.
        options: Arguments for ``torch.compile``.
        decorated_at: File and line of the decoration.
        fqn: The module's fully qualified name in its model; empty if it is not known.
    """
    policy = RetryPolicy.of(policy)
    function = CompiledFunction(
        call_of(module),
        policy=policy,
        name=name,
        options=options,
        decorated_at=decorated_at,
        fqn=fqn,
        declared=group,
    )
    ModuleHandle(module, function)
    return module


def decoration(frame: FrameType) -> tuple[str, int]:
    """Return file and line of the decoration: of the innermost frame that is not torch's, as in ``module.apply()``."""
    while is_from_torch(frame.f_code) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


@overload
def compiled_function(fn: CompiledFunction[P, R], /) -> CompiledFunction[P, R]: ...  # type: ignore[overload-overlap]  # it is callable, too
@overload
def compiled_function(fn: torch.nn.Module | Callable[..., Any], /) -> CompiledFunction[..., Any]: ...
def compiled_function(fn: object, /) -> CompiledFunction[..., Any]:
    """Return the :class:`CompiledFunction` behind anything that has been compiled with a fallback.

    Args:
        fn: A module that was compiled in place, a decorated method of an instance, the :class:`CompiledFunction`
            itself, or anything that ``torch.compile`` has returned after :func:`install`.

    Raises:
        TypeError: `fn` has no fallback.
    """
    if isinstance(fn, torch.nn.Module):
        function = behind(optimized_call_of(fn) if is_from_torch_compile(fn) else compiled_call_of(fn))
        if not isinstance(function, CompiledFunction):
            raise TypeError(f"{type(fn).__qualname__} has not been compiled by compile_with_fallback()")
        return function
    function = behind(fn.__func__ if isinstance(fn, MethodType) else fn)
    if not isinstance(function, CompiledFunction):
        raise TypeError(f"fn must be a function or module from compile_with_fallback(), not {fn!r}")
    return function


def plain(fn: Any) -> Any:
    """Unwrap a function that has been decorated or compiled before, so that it is not compiled twice."""
    function = behind(fn.__func__ if isinstance(fn, MethodType) else fn)
    if isinstance(function, CompiledFunction):
        plain = function.eager
    elif inspect.isfunction(function) and hasattr(function, "get_compiler_config"):  # torch.compile's mark on functions
        from ._torch.compilers import innermost

        plain = innermost(function)
    else:
        return fn
    return MethodType(plain, fn.__self__) if isinstance(fn, MethodType) else plain


def check_module(module: torch.nn.Module) -> None:
    """Raise TypeError if the module cannot be compiled in place."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("a TorchScript module cannot be compiled; pass the module that it was made from")
    if is_from_torch_compile(module):
        raise TypeError("this module was returned by torch.compile(); pass the original module")


def check_function(fn: Any) -> None:
    allowed = "compile_with_fallback() takes functions, methods, callables and nn.Module instances"
    if isinstance(fn, type):
        raise TypeError(f"{allowed}, not the class {fn.__qualname__}; decorate its forward or an instance of it")
    if not callable(fn):
        raise TypeError(f"{allowed}, not {fn!r}")
    code = fn
    while isinstance(code, functools.partial):
        code = code.func
    if not inspect.isroutine(code):
        code = type(code).__call__
    for kind, is_kind in (
        ("an async generator", inspect.isasyncgenfunction),
        ("a coroutine", inspect.iscoroutinefunction),
        ("a generator", inspect.isgeneratorfunction),
    ):
        if is_kind(code):
            raise TypeError(f"{allowed}, not {kind} function such as {fn!r}; decorate the step inside it")


def check_options(policy: object, name: object, options: dict[str, Any]) -> None:
    """Raise TypeError or ValueError if an argument is wrong, whatever is compiled."""
    RetryPolicy.of(policy)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a string or None, not {name!r}")
    _check_names(options)
    for option in ("fullgraph", "disable"):
        if not isinstance(options.get(option, False), bool):
            raise TypeError(f"{option} must be True or False, not {options[option]!r}")
    if options.get("dynamic") not in (None, True, False):
        raise TypeError(f"dynamic must be True, False or None, not {options['dynamic']!r}")
    backend, mode, inductor = options.get("backend", "inductor"), options.get("mode"), options.get("options")
    if backend is not None and not isinstance(backend, str) and not callable(backend):
        raise TypeError(f"backend must be the name of a backend or a callable, not {backend!r}")
    if mode is not None and not isinstance(mode, str):
        raise TypeError(f"mode must be a string or None, not {mode!r}")
    if inductor is not None and not isinstance(inductor, dict):
        raise TypeError(f"options must be a dict or None, not {inductor!r}")
    if mode is not None and inductor is not None:
        raise ValueError(f"mode={mode!r} and options={inductor!r} are both given; torch.compile takes only one of them")
    if mode is not None or inductor or (isinstance(backend, str) and backend != "inductor"):
        _check_with_torch(backend, mode, inductor, options.get("dynamic"))


# Arguments of the policy, and what users of other libraries may call them.
_POLICY_ARGUMENTS = {field.name: f"{field.name}={{}}" for field in dataclasses.fields(RetryPolicy)}
_POLICY_ARGUMENTS |= dict.fromkeys(("backoff", "delay", "interval"), "wait={}")
_POLICY_ARGUMENTS |= dict.fromkeys(
    ("attempts", "max_attempts", "max_retries", "max_tries", "retries", "tries"), "stop=stop_after_attempt({})"
)
_POLICY_ARGUMENTS |= dict.fromkeys(("timeout", "max_delay", "max_time"), "stop=stop_after_delay({})")


def _check_names(options: dict[str, Any]) -> None:
    parameters = inspect.signature(torch.compile).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # patched: unknown which arguments it takes
    allowed = [
        "policy",
        "name",
        "group",
        "agree_timeout",
        *(name for name in parameters if name not in ("model", "name")),
    ]
    for option, value in options.items():
        if option in allowed or (takes_any and option not in _POLICY_ARGUMENTS):
            continue
        if option in _POLICY_ARGUMENTS:
            raise TypeError(f"{option} is not an argument of compile_with_fallback(); {_in_policy(option, value)}")
        close = difflib.get_close_matches(option, [*allowed, *_POLICY_ARGUMENTS], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        if close and close[0] in _POLICY_ARGUMENTS:
            hint = f"did you mean {close[0]!r}? If so, {_in_policy(close[0], value)}. "
        raise TypeError(f"unknown torch.compile argument {option!r}; {hint}known arguments: {', '.join(allowed)}")


def _in_policy(argument: str, value: object) -> str:
    """Tell where an argument of the policy belongs, with its value if that is a number."""
    argument = _POLICY_ARGUMENTS[argument].format(repr(value) if isinstance(value, (int, float)) else "...")
    strategy = re.search(r"stop_after_\w+", argument)
    origin = f", with {strategy[0]} from tenacity" if strategy else ""
    return f"use policy=RetryPolicy({argument}){origin}"


def _check_with_torch(backend: Any, mode: str | None, options: dict[str, Any] | None, dynamic: bool | None) -> None:
    """Check the arguments that only torch can check. Takes a second if this has to import Dynamo."""
    try:
        from ._torch import compilers
    except OSError:  # no cache directory for now; the first attempt will fail in the same way and be retried
        return
    if isinstance(backend, str) and backend not in (known := compilers.backends()):
        raise ValueError(_unknown("backend", backend, known))
    if backend not in (None, "inductor"):
        return
    if mode is not None and mode not in (known := compilers.inductor_modes()):
        raise ValueError(_unknown("mode", mode, known))
    for option in options or ():
        if option.replace("-", "_") not in (known := compilers.inductor_options()):
            see = "torch._inductor.list_options() returns all options"
            raise ValueError(_unknown("option", option, known, see=see))
    try:
        compilers.make_compiler(backend, mode, options, dynamic)
    except RuntimeError as exc:
        raise ValueError(f"torch.compile rejects options={options!r}: {exc}") from exc


def _unknown(what: str, value: str, known: list[str], *, see: str = "") -> str:
    """Describe an unknown value, with those that are close to it, and all known ones unless `see` tells about them."""
    close = difflib.get_close_matches(value, known, n=3 if see else 1)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"unknown torch.compile {what} {value!r}; {hint}{see or f'known {what}s: ' + ', '.join(sorted(known))}"
