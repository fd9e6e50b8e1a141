"""Functions that share their compiled code: the same code, the same options, the same policy.

They fail and recover together. Each keeps its own counters.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch

from compile_retry._failures import Location
from compile_retry._locks import Lock
from compile_retry._ranks.breaker import GroupBreaker
from compile_retry._record import journal
from compile_retry._record.journal import Journal
from compile_retry._record.record import Record
from compile_retry._schedule import budget
from compile_retry._schedule.breaker import Breaker
from compile_retry._schedule.equality import meaning
from compile_retry._schedule.policy import RetryPolicy, policy_key
from compile_retry._stats import Counter
from compile_retry._torch.distributed import DeclaredGroup, Members
from compile_retry._torch.eager import has_hooks

from .admission import Admission
from .call import Calls
from .creation import Creation, Region
from .ledger import Ledger
from .outcomes import Outcomes
from .team import Team
from .tuning import Retuning
from .turns import Turns


class Key(NamedTuple):
    """Equal for functions that may share.

    Attributes:
        exact: The code's identity, the options, the policy, the name and the group of ranks.
        kind: The same, but all objects of one class are equal.
        code: The code.
    """

    exact: Hashable
    kind: Hashable
    code: weakref.ref[CodeType]


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
        retuning: Code that is to be tuned again.
        key: That of its functions; None if they share with no other one.
        team: The ranks that agree on their attempts; None without an argument `group`.
    """

    def __init__(  # noqa: PLR0917  # as everywhere, in this order
        self,
        name: str,
        location: Location,
        policy: RetryPolicy,
        options: dict[str, Any],
        entry_frames: Collection[CodeType],
        declared: DeclaredGroup | None = None,
    ) -> None:
        self.key: Key | None = None
        self.team = Team(declared, name, location) if declared is not None else None
        self.numbers, self.calls = Counter(), Calls()
        self.breaker, self.ledger, turns = _breaker(policy, self.team), Ledger(), Turns()
        self.admission = admission = Admission(self.breaker, self.ledger, turns)
        self.journal = Journal(name, self.breaker, lambda: admission.state)
        self.retuning = Retuning(policy, admission, self.journal)
        self.outcomes = Outcomes(
            location,
            breaker=self.breaker,
            ledger=self.ledger,
            turns=turns,
            admission=admission,
            journal=self.journal,
            retuning=self.retuning,
            team=self.team,
        )
        # Keeps the policy and the options alive: the key has the identities of their parts.
        self._make_another = partial(Group, name, location, policy, options, entry_frames, declared)
        self._region = Region(options, self.calls, admission, self.outcomes, entry_frames)

    def ranks(self) -> Members | None:
        """Return the members of the functions' process group; None if there is none, or if it is not known yet."""
        return self.team.members if self.team is not None else None

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
        """Add a function's record. The group rests when its last function is gone."""
        records, breakers = self.journal.records, (self.breaker, self.retuning.breaker)
        records.add(record)

        def left() -> None:
            if not records.alive():
                for breaker in breakers:
                    breaker.rest()

        weakref.finalize(record, left).atexit = False


class Resting:
    """Keeps groups alive after their last function is gone.

    A server may decorate a function anew for each request. The new function then uses the code that was compiled for
    the one before, as with stock ``torch.compile``; if that one was held off, so is the new one. A group is dropped
    when its code object is collected, when too many others have come since, or when a group takes its place that
    differs only in an object, such as the backend.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[Hashable, tuple[weakref.ref[CodeType], Group]] = OrderedDict()

    def add(self, key: Key, group: Group) -> None:
        """Keep a group."""
        code = key.code()
        if code is not None:  # pragma: no branch  # a function with this code is being decorated or copied
            self._groups[key.kind] = weakref.ref(code, self._forget_dead), group
            self._groups.move_to_end(key.kind)
        if len(self._groups) > _MAX_RESTING:
            self._groups.popitem(last=False)

    def _forget_dead(self, _: object) -> None:
        for key, (code, _) in self._groups.copy().items():
            if code() is None:
                self._groups.pop(key, None)

    def clear(self) -> None:
        """Forget all groups."""
        self._groups.clear()


# Enough for any program that decorates its functions again and again.
_MAX_RESTING = 64

_groups: weakref.WeakValueDictionary[Hashable, Group] = weakref.WeakValueDictionary()
_resting = Resting()
_lock = Lock()


def start_anew() -> None:
    """Let functions that are decorated from now on share with each other only. Tests need that."""
    _groups.clear()
    _resting.clear()
    budget.start_anew()
    journal.start_anew()


def group_of(
    fn: Callable[..., Any],
    *,
    name: str,
    location: Location,
    policy: RetryPolicy,
    options: dict[str, Any],
    entry_frames: Collection[CodeType],
    declared: DeclaredGroup | None,
) -> Group:
    """Return the group of a function: that of others with the same code, options and policy, or a new one."""
    make = partial(Group, name, location, policy, options, entry_frames, declared)
    code, of = _code_of(fn)
    if code is None:
        return make()
    # By identity: equal code objects, of the same line in two files, have their own cache entries.
    ranks = declared.key if declared is not None else None
    exact = (id(code), of, name, meaning(options), policy_key(policy), ranks)
    kind = (id(code), of, name, meaning(options, of_objects=type), policy_key(policy, of_objects=type), ranks)
    return _group_with(Key(exact, kind, weakref.ref(code)), make)


def _breaker(policy: RetryPolicy, team: Team | None) -> Breaker:
    return Breaker(policy) if team is None else GroupBreaker(policy, lambda: team.agreement)


def _group_with(key: Key, make: Callable[[], Group]) -> Group:
    with _lock:
        group = _groups.get(key.exact)
        if group is None or not group.takes_more():
            group = _groups[key.exact] = make()
            group.key = key
            _resting.add(key, group)
        return group


def _code_of(fn: Callable[..., Any]) -> tuple[CodeType | None, Hashable]:
    """Return the code that Dynamo would compile, and what else must be equal; None if it is this function's alone.

    By default Dynamo does not guard the hooks of submodules. It would run code without a hook for a module that has it.
    """
    if isinstance(fn, FunctionType):
        return fn.__code__, None
    if not isinstance(fn, MethodType) or not isinstance(fn.__func__, FunctionType):
        return None, None
    owner = fn.__self__
    if not isinstance(owner, torch.nn.Module):
        return fn.__func__.__code__, (type(owner),)
    if "forward" in vars(owner) or "_modules" not in vars(owner):  # replaced, or in the middle of being copied
        return None, None
    modules = tuple(torch.nn.Module.modules(owner))
    if any(has_hooks(module) for module in modules[1:]):
        return None, None
    return fn.__func__.__code__, tuple(map(type, modules))
