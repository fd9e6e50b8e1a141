"""`CompiledFunction`, the result of decorating a function: the call path and the public interface."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import sys
from collections.abc import Callable
from operator import attrgetter
from types import FrameType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, NoReturn, ParamSpec, Protocol, TypeVar, cast, overload

import torch
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from ._compile.call import NOBODY, Tally, Turn
from ._compile.creation import stock_compile
from ._compile.sharing import Group, group_of
from ._failures import CompileFailure, Location, device_error, is_from_compiler
from ._record.history import CallPath
from ._record.live import WeakRegistry
from ._record.record import Record
from ._schedule.episode import NextRetry, Probe
from ._schedule.policy import RetryPolicy
from ._stats import CompileState, CompileStats
from ._switches import active
from ._torch.distributed import DeclaredGroup
from ._torch.eager import (
    call_of,
    compiled_call_of,
    has_forward_gradients,
    is_from_torch,
    mark_as_compiled,
    run_while_tracing,
    saved_tensors_hooks,
    set_compiled_call,
)
from .events import Hook, title

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")


class BoundCompiledFunction(Protocol[P, R_co]):
    """The type of a decorated method of an instance, for type checkers.

    At run time it is a ``types.MethodType``, which looks up attributes in its :class:`CompiledFunction`.
    """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @property
    def __self__(self) -> object: ...
    @property
    def __func__(self) -> CompiledFunction[..., Any]: ...
    @property
    def eager(self) -> Callable[..., R_co]: ...
    @property
    def policy(self) -> RetryPolicy: ...
    @property
    def name(self) -> str: ...
    @property
    def state(self) -> CompileState: ...
    @property
    def stats(self) -> CompileStats: ...
    @property
    def last_failure(self) -> CompileFailure | None: ...
    @property
    def next_retry(self) -> NextRetry | None: ...
    def register_hook(self, hook: Hook) -> RemovableHandle: ...
    def retry_now(self) -> None: ...
    def reset(self) -> None: ...


class CompiledFunction(Generic[P, R]):
    """A function that runs compiled code, continues eagerly while that fails, and retries when its policy allows it.

    :func:`compile_with_fallback` creates it. Call it like the original function. In a class body it binds like a
    method. It has the attributes of the original function, as they were at decoration. If it uses an attribute's name
    itself, only ``eager`` has the original's attribute.

    Attributes:
        eager: The original function.
    """

    # Slots, so that `__dict__` holds the same as a function's: the original's attributes, and those set later.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_admission",
        "_breaker",
        "_bypassed_because",
        "_calls",
        "_clock",
        "_compiled",
        "_compiled_calls",
        "_creation",
        "_declared",
        "_decorated_at",
        "_eager_calls",
        "_group",
        "_history",
        "_journal",
        "_ledger",
        "_name",
        "_numbers",
        "_options",
        "_outcomes",
        "_policy",
        "_record",
        "_retuning",
        "_skips_guards",
        "_stock",
        "_with_guards",
        "eager",
    )

    eager: Callable[P, R]

    def __init__(
        self,
        fn: Callable[P, R],
        *,
        policy: RetryPolicy,
        name: str | None,
        options: dict[str, Any],
        decorated_at: tuple[str, int],
        fqn: str = "",
        group: Group | None = None,
        declared: DeclaredGroup | None = None,
    ) -> None:
        self.eager = fn
        self._declared = declared
        self._decorated_at = decorated_at
        self._policy, self._clock = policy, policy.clock
        self._name = name if name is not None else _name_of(fn)
        self._options = options
        group = group or group_of(
            fn,
            name=self._name,
            location=_location(fn, decorated_at),
            policy=policy,
            options=options,
            entry_frames=ENTRY_FRAMES,
            declared=declared,
        )
        self._record = Record(policy.clock, fqn)
        group.add(self._record)
        self._creation = group.creation()
        # Short-cuts for the call path.
        self._numbers, self._calls = group.numbers, group.calls
        self._breaker, self._ledger = group.breaker, group.ledger
        self._admission, self._journal, self._outcomes = group.admission, group.journal, group.outcomes
        self._retuning = group.retuning
        self._history, calls = self._record.history, self._record.books.calls
        self._compiled_calls, self._eager_calls = calls["compiled"], calls["eager"]
        self._group = group
        self._compiled: Callable[..., R] = self._create_and_call
        # Needed under the stance that skips guards: otherwise a frame that should run eagerly would raise, or run code
        # compiled for other arguments.
        self._with_guards: Callable[..., R] = self._create_and_call
        self._skips_guards: Callable[[], bool] = bool
        self._bypassed_because: Callable[[], str] = str
        self._stock: Callable[..., R] | None = None
        functools.update_wrapper(self, fn, updated=())
        # Partials and callable objects lack these two. Decorators need a name, and the class has its own annotations.
        vars(self).setdefault("__name__", _name_of(fn).rpartition(".")[2])
        if "__annotate__" not in vars(self):  # pragma: no branch  # as of 3.14
            vars(self).setdefault("__annotations__", {})
        for attribute, value in getattr(fn, "__dict__", {}).items():
            # Dynamo's marks apply only to the function that has them.
            if not hasattr(type(self), attribute) and not attribute.startswith("_torchdynamo_"):
                vars(self).setdefault(attribute, value)
        live_functions.register(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:  # every line costs each call
        if is_dynamo_compiling():  # traced by an outer compile: act as the plain function
            self._traced()
            return self.eager(*args, **kwargs)
        if not active.on:
            return self._call_stock(*args, **kwargs)
        number, breaker = next(self._numbers), self._breaker
        if (
            number < breaker.held_off_before_call
            and self._clock() < breaker.held_off_before_time
            and saved_tensors_hooks(True) is None  # otherwise a backward pass may run it again
            and has_forward_gradients()
        ):
            next(self._eager_calls)
            return self.eager(*args, **kwargs) if kwargs else self.eager(*args)  # type: ignore[call-arg]  # P may have keywords
        tally = self._calls.tally
        if (
            tally.call
            or breaker.episode is not None
            or self._ledger.given_up
            or number >= self._history.next_call
            or self._retuning.breaker.episode is not None
        ):
            return self._watched(number, tally, args, kwargs)
        tally.compiled = tally.eager = 0
        tally.first_attempt = None
        try:
            tally.call, tally.record = number, self._record
            try:  # passing an empty dictionary would take 0.05 us
                result = self._compiled(*args, **kwargs) if kwargs else self._compiled(*args)
            except BaseException as exc:
                self._finish(tally, probing=False, raised=exc)
                raise
            if tally.compiled and not (tally.eager or tally.at_end) and tally.first_attempt is None:
                next(self._compiled_calls)
            else:
                self._finish(tally, probing=False)
        finally:
            tally.call, tally.record = 0, NOBODY
        return result

    def _watched(self, number: int, tally: Tally, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        """Make a call that may attempt, that is timed, or that runs within another call of the function."""
        probe: Probe | None = None
        turn: Turn | None = None
        began: float | None = None
        outer = tally.call, tally.compiled, tally.eager, tally.given_up
        outer_record, left_open, outer_attempt = tally.record, (tally.doubt, tally.at_end), tally.first_attempt
        try:
            tally.call, tally.compiled, tally.eager, tally.given_up = number, 0, 0, 0
            tally.doubt, tally.at_end, tally.models, tally.record = None, [], [], self._record
            tally.first_attempt = None
            if self._outcomes.has_request:
                self._outcomes.carry_out_request(number)
            episode = self._breaker.episode
            is_timed = number >= self._history.next_call
            straight = self._admission.eager_together
            if episode is not None:
                within = False
                if number >= episode.due_call or self._clock() >= episode.due_time:
                    within = self._is_within_probe(tally)
                    probe = None if within else self._admission.let_through(tally, number)
                straight = straight or (not (probe or within) and self._admission.bypasses_dynamo(episode, number))
            else:
                turn = self._retuning.begin(tally, number)
            if is_timed:
                began = self._clock()
            try:
                result = self._choose(tally, straight=straight)(*args, **kwargs)
            except BaseException as exc:
                self._finish(tally, probing=probe is not None, raised=exc)
                raise
            self._finish(tally, probing=probe is not None, began=began)
        finally:
            if turn is not None:
                self._retuning.end(tally, turn)
            tally.call, compiled, eager, given_up = outer
            tally.record = outer_record
            tally.doubt, tally.at_end = left_open
            if tally.call:  # the outer call has run these graphs too
                tally.compiled, tally.eager = tally.compiled + compiled, tally.eager + eager
                tally.given_up += given_up
                if outer_attempt is not None:
                    tally.first_attempt = outer_attempt
        if episode is not None:
            self._admission.hold_off(episode, number, self._history.next_call)
        return result

    def _choose(self, tally: Tally, *, straight: bool) -> Callable[..., R]:
        """Choose between the eager function and the one that ``torch.compile`` returned."""
        if straight:
            tally.eager = 1
            return self.eager
        return self._with_guards if self._skips_guards() else self._compiled

    def _finish(
        self,
        tally: Tally,
        *,
        probing: bool,
        raised: BaseException | None = None,
        began: float | None = None,
    ) -> None:
        """Count a call that is over, and settle its failure.

        Args:
            tally: This thread's tally.
            probing: Whether the call was the episode's probe.
            raised: The exception that the call raised, if any.
            began: For a timed call, the policy's clock when it began. Others are timed from their first attempt.

        Raises:
            BaseException: The device's own error, if the accelerator's context is gone and the call raised a wrapper.
        """
        clean, lost = False, device_error(raised) if isinstance(raised, RuntimeError) else None
        path: CallPath = "eager" if not tally.compiled else "mixed" if tally.eager else "compiled"
        try:
            if tally.doubt is not None or tally.at_end:
                self._outcomes.settle(tally, program_raised=raised is not None)
            clean = raised is None and tally.eager == tally.given_up and bool(tally.compiled or tally.given_up)
        finally:
            next(self._record.books.calls[path])
            if not (tally.compiled or tally.eager or raised) and (reason := self._bypassed_because()):
                self._journal.found_bypassed(tally.call, reason)
            if lost is not None:
                self._outcomes.lost_device(lost, tally)
            if probing:
                self._outcomes.probe_ended(tally, clean=clean)
            attempted = tally.first_attempt is not None
            began = tally.first_attempt if began is None else began
            if began is not None:
                self._journal.took(self._record, tally.call, path, began, attempted=attempted)
            self._journal.tell()
        if lost is not None and lost is not raised and is_from_compiler(raised):
            raise lost from None

    def _call_stock(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Make a call while the library is switched off."""
        if self._stock is None:
            self._stock = stock_compile(self.eager, self._options)
        self._bypassed("the library is switched off, so this is stock torch.compile")
        return self._stock(*args, **kwargs)

    @run_while_tracing
    def _traced(self) -> None:
        """Note that an outer ``torch.compile`` traces the function. Dynamo runs this method instead of tracing it."""
        self._bypassed("another torch.compile traces it, and compiles it as a part of its own function")

    def _bypassed(self, reason: str) -> None:
        if reason not in self._journal.bypassed:
            self._journal.found_bypassed(self._numbers.value, reason)
            self._journal.tell()

    def _is_within_probe(self, tally: Tally) -> bool:
        """Return True if this call runs within the probe."""
        frame, calls = cast("FrameType | None", sys._getframe(1)), 0  # not this frame, which would keep itself alive
        while frame is not None and calls < 2 and tally.probe is not None:
            calls += frame.f_code is CALL and self._shares_with(frame.f_locals.get("self"))
            frame = frame.f_back
        return calls == 2  # a probe without an outer call was left by an interrupt

    def _shares_with(self, other: object) -> bool:
        return isinstance(other, CompiledFunction) and other._group is self._group

    def _create_and_call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Create the compiled function and call it. If that fails, call the eager function."""
        created = self._creation.create(self.eager)
        if created is None:
            return self.eager(*args, **kwargs)
        self._with_guards, self._skips_guards = created.with_guards, created.skips_guards
        self._bypassed_because = created.bypassed_because
        self._compiled = created.compiled
        return self._compiled(*args, **kwargs)

    @property
    def policy(self) -> RetryPolicy:
        """The retry policy. It cannot be assigned; decorate the function again with another one."""
        return self._policy

    @policy.setter
    def policy(self, value: NoReturn) -> None:
        self._refuse("policy")

    @property
    def name(self) -> str:
        """The name in log lines. It cannot be assigned."""
        return self._name

    @name.setter
    def name(self, value: NoReturn) -> None:
        self._refuse("name")

    def _refuse(self, attribute: str) -> NoReturn:
        raise AttributeError(
            f"the {attribute} of {self._name} cannot be assigned; decorate the function again:"
            f" compile_with_fallback(fn, {attribute}=...)"
        )

    @property
    def state(self) -> CompileState:
        """The current state."""
        return self._admission.state

    @property
    def stats(self) -> CompileStats:
        """A snapshot of its counters."""
        return self._record.books.snapshot()

    @property
    def last_failure(self) -> CompileFailure | None:
        """The last failed attempt, or ``None`` if none has failed since the start or the last :meth:`reset`."""
        return self._outcomes.last_failure

    @property
    def next_retry(self) -> NextRetry | None:
        """The due moment of the next attempt, or ``None`` if nothing is held off or no retry will come.

        In the state ``COMPILED``, it is the moment when code that was only partly tuned is tuned again.
        """
        calls = self._numbers.value
        return self._breaker.next_retry(calls) or self._retuning.next_retry(calls)

    def register_hook(self, hook: Hook) -> RemovableHandle:
        """Register a hook for this function's events: see :mod:`compile_retry.events`. Copies do not inherit it.

        Args:
            hook: A callable that takes an :class:`~compile_retry.events.Event`.

        Returns:
            A handle. Its ``remove()`` removes the hook. As a context manager, it removes the hook at the end of the
            block.

        Raises:
            TypeError: `hook` is not callable.
        """
        return self._record.hooks.register(hook)

    def retry_now(self) -> None:
        """Make an attempt due at the next call for everything that runs eagerly, even after giving up.

        With a group of ranks, call it on all of them, before the same call. Otherwise it has no effect.
        """
        self._outcomes.retry_now()

    def reset(self) -> None:
        """Forget all failures, including permanent ones, so that the next call attempts again. Counters are kept.

        With a group of ranks, call it on all of them, before the same call. Otherwise it has no effect.
        """
        self._outcomes.reset()

    # As on functions. Not in `__dict__`, which `functools.wraps` copies.
    __code__ = property(attrgetter("eager.__code__"))
    __globals__ = property(attrgetter("eager.__globals__"))
    __closure__ = property(attrgetter("eager.__closure__"))
    __defaults__ = property(attrgetter("eager.__defaults__"))
    __kwdefaults__ = property(attrgetter("eager.__kwdefaults__"))

    # `self` is a Callable here because mypy solves Concatenate in no other generic type.
    @overload  # for a class method, which takes the class
    def __get__(self: Callable[Concatenate[T, Q], R], instance: object, owner: T) -> BoundCompiledFunction[Q, R]: ...
    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload  # nn.Module declares `forward` as an attribute of this type, which mypy lets no other override
    def __get__(self: Callable[Concatenate[T, Q], R], instance: T, owner: type[torch.nn.Module]) -> Callable[Q, R]: ...
    @overload
    def __get__(
        self: Callable[Concatenate[T, Q], R], instance: T, owner: type | None = None
    ) -> BoundCompiledFunction[Q, R]: ...
    @overload  # for a static method, which takes anything
    def __get__(self, instance: object, owner: type | None = None) -> BoundCompiledFunction[..., R]: ...
    def __get__(self, instance: object, owner: Any = None) -> Any:
        if instance is None:
            return self
        if is_dynamo_compiling():  # Dynamo cannot bind an object as a method
            self._traced()
            plain: Callable[..., R] = self.eager
            return functools.partial(plain, instance)
        return MethodType(self, instance)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        attributes = vars(self) if inspect.isroutine(self.eager) else copy.deepcopy(vars(self), memo)
        # A module that is being copied does not have its submodules yet, so its group could not be found.
        return self._renewed(copy.deepcopy(self.eager, memo), attributes, self._group.for_copy())

    def __copy__(self) -> Self:
        location = _location(self.eager, self._decorated_at)
        return self._renewed(
            self.eager,
            vars(self),
            Group(self._name, location, self._policy, self._options, ENTRY_FRAMES, self._declared),
        )

    def _renewed(self, fn: Callable[P, R], attributes: dict[str, Any], group: Group | None) -> Self:
        renewed = type(self)(
            fn,
            policy=self._policy,
            name=self._name,
            options=self._options,
            decorated_at=self._decorated_at,
            fqn=self._record.fqn,
            group=group,
            declared=self._declared,
        )
        vars(renewed).update(attributes, __wrapped__=fn)
        return renewed

    def __reduce__(self) -> str:
        name = getattr(self, "__qualname__", None)
        if not isinstance(name, str):
            raise pickle.PicklingError(f"{self!r} has no qualified name, so it cannot be pickled")
        return name  # by reference, as functions are pickled

    def __repr__(self) -> str:
        return f"<CompiledFunction {title_of(self)}: {self.state.value}>"


def title_of(function: CompiledFunction[..., Any]) -> str:
    """Name one function in words: ``train_step``, or ``Block (layers.3)``."""
    fqn = function._record.fqn
    return title(function.name, 1, (fqn,) if fqn else ())


live_functions: WeakRegistry[CompiledFunction[..., Any]] = WeakRegistry()


def _calling(function: CompiledFunction[P, R]) -> Callable[P, R]:
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    return call


def as_function(function: CompiledFunction[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """Return a plain function that calls `function`, with the attributes of one that ``torch.compile`` returned."""
    call = functools.update_wrapper(_calling(function), like)
    mark_as_compiled(call, like)
    return call


def behind(fn: object) -> object:
    """Return the `CompiledFunction` that a function from `as_function` calls; any other object as it is."""
    if isinstance(fn, FunctionType) and fn.__code__ is _CALLING and fn.__closure__:
        return fn.__closure__[0].cell_contents
    return fn


CALL = CompiledFunction.__call__.__code__
_CALLING = cast("FunctionType", _calling(cast("Any", None))).__code__
# Frames on the way into a decorated function. If Dynamo compiled them, the caller would call the plain function.
ENTRY_FRAMES = frozenset({CALL, CompiledFunction.__get__.__code__, _CALLING})


class ModuleHandle:
    """Attribute of a compiled module that preserves its compiled call in deep copies, but not in saved modules.

    ``nn.Module`` drops its compiled call from copies and pickles. With this handle among its attributes, a deep copy
    gets its own compiled call. In a pickled module the handle becomes ``None``.
    """

    def __init__(self, module: torch.nn.Module, function: CompiledFunction[..., Any]) -> None:
        set_compiled_call(module, function)
        module.__dict__["_compile_retry"] = self
        self._module = module
        self._function = function

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHandle | None:
        module = memo.get(id(self._module))
        if module is None or compiled_call_of(self._module) is not self._function:
            return None  # the handle came from a shallow copy, or the module has been compiled again since
        return ModuleHandle(module, copy.deepcopy(self._function, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _name_of(fn: object) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, torch.nn.Module):
        return type(owner).__qualname__
    return getattr(fn, "__qualname__", type(fn).__qualname__).rpartition("<locals>.")[2]


def _location(fn: Callable[..., Any], decorated_at: tuple[str, int]) -> Location:
    """Return the function's name and where its code is; where it was decorated if it has none or it is torch's own."""
    owner = getattr(fn, "__self__", None)
    source: Callable[..., Any] = fn
    if isinstance(owner, torch.nn.Module) and fn in (call_of(owner), owner.__call__):
        source = owner.forward
    code = getattr(inspect.unwrap(source), "__code__", None)
    if code is None or is_from_torch(code):
        return _name_of(fn), *decorated_at
    return _name_of(fn), code.co_filename, code.co_firstlineno
