"""Functions that share their compiled code: the same code, the same options, the same policy.

They fail and recover together. Each keeps its own counters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable
from dataclasses import fields
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

from compile_retry._failures import Location
from compile_retry._locks import Lock
from compile_retry._record.journal import Journal
from compile_retry._record.record import Record
from compile_retry._schedule.breaker import Breaker
from compile_retry._schedule.policy import RetryPolicy
from compile_retry._stats import Counter
from compile_retry._torch.eager import has_hooks

from .admission import Admission
from .call import Calls
from .creation import Creation, Region
from .ledger import Ledger
from .outcomes import Outcomes
from .turns import Turns


class Group:
    """Everything that functions with shared code have in common. Most groups have one function.

    Attributes:
        numbers: Numbers their calls, from 1.
        calls: Their current calls.
        breaker: Decides when they may attempt.
        ledger: Frames that are waiting or given up.
        admission: Decides which frames may be compiled now.
        journal: Counts and publishes what happens to them.
        outcomes: Records how attempts end.
        key: Equal for functions that may share; None for a function that does not share.
    """

    def __init__(
        self,
        name: str,
        location: Location,
        policy: RetryPolicy,
        options: dict[str, Any],
        entry_frames: Collection[CodeType],
    ) -> None:
        self.key: Hashable = None
        self.numbers, self.calls = Counter(), Calls()
        self.breaker, self.ledger, turns = Breaker(policy), Ledger(), Turns()
        self.admission = admission = Admission(self.breaker, self.ledger, turns)
        self.journal = Journal(name, self.breaker, lambda: admission.state)
        self.outcomes = Outcomes(
            location,
            breaker=self.breaker,
            ledger=self.ledger,
            turns=turns,
            admission=admission,
            journal=self.journal,
        )
        # Keeps the policy and the options alive: the key has the identities of their parts.
        self._make_another = partial(Group, name, location, policy, options, entry_frames)
        self._region = Region(options, self.calls, admission, self.outcomes, entry_frames)

    def creation(self) -> Creation:
        """Return what calls ``torch.compile`` for one of the functions."""
        return Creation(self._region, self.calls, self.admission, self.outcomes)

    def takes_more(self) -> bool:
        """Return True if functions that are decorated now may join."""
        return not self._region.was_reset()

    def for_copy(self) -> Group | None:
        """Return the group for a copy of one of the functions; None if none of them shares."""
        return _group_with(self.key, self._make_another) if self.key is not None else None

    def add(self, record: Record) -> None:
        """Add a function's record. The group lives as long as one of its functions."""
        self.journal.records.register(record)


_groups: weakref.WeakValueDictionary[Hashable, Group] = weakref.WeakValueDictionary()
_lock = Lock()


def start_anew() -> None:
    """Let functions that are decorated from now on share with each other only. Tests need that."""
    _groups.clear()


def group_of(
    fn: Callable[..., Any],
    *,
    name: str,
    location: Location,
    policy: RetryPolicy,
    options: dict[str, Any],
    entry_frames: Collection[CodeType],
) -> Group:
    """Return the group of a function: that of others with the same code, options and policy, or a new one."""
    code, make = _code_key(fn), partial(Group, name, location, policy, options, entry_frames)
    if code is None:
        return make()
    return _group_with((code, name, _key(options), _policy_key(policy)), make)


def _group_with(key: Hashable, make: Callable[[], Group]) -> Group:
    with _lock:
        group = _groups.get(key)
        if group is None or not group.takes_more():
            group = _groups[key] = make()
            group.key = key
        return group


def _code_key(fn: Callable[..., Any]) -> Hashable:
    """Identify the code that Dynamo would compile; None if it is this function's alone.

    By default Dynamo does not guard the hooks of submodules. It would run code without a hook for a module that has it.
    """
    if isinstance(fn, FunctionType):
        return fn.__code__
    if not isinstance(fn, MethodType) or not isinstance(fn.__func__, FunctionType):
        return None
    owner = fn.__self__
    if not isinstance(owner, torch.nn.Module):
        return type(owner), fn.__func__.__code__
    if "forward" in vars(owner) or "_modules" not in vars(owner):  # replaced, or in the middle of being copied
        return None
    modules = tuple(torch.nn.Module.modules(owner))
    if any(has_hooks(module) for module in modules[1:]):
        return None
    return fn.__func__.__code__, tuple(map(type, modules))


def _policy_key(policy: RetryPolicy) -> Hashable:
    return tuple(_key(getattr(policy, field.name)) for field in fields(policy))


def _key(value: object) -> Hashable:
    """Return equal keys for values that mean the same, as far as that can be told.

    Objects are told apart by their identity, which holds as long as the group that has them.
    """
    kind = type(value)
    if isinstance(value, dict):
        return kind, frozenset((_key(name), _key(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return kind, tuple(map(_key, value))
    if kind in _PLAIN:
        return kind, value
    if kind.__module__.partition(".")[0] == "tenacity":
        return kind, _key(vars(value))
    return kind, id(value)


_PLAIN = (bool, int, float, str, type(None))
