"""Private names of ``torch.distributed``: collectives in a captured graph, and facts about process groups.

Nothing here communicates. The agreement between ranks is in `_compile/ranks.py` and `_ranks`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.fx import GraphModule, Node

# Operator namespaces whose operators communicate. Dynamo rewrites `dist.all_reduce` and other in-place collectives to
# functional ones (`traceable_collective_remaps`, torch >= 2.1). It breaks the graph at those that it cannot rewrite:
# asynchronous ones, broadcast, barrier, send and receive. "c10d" only occurs in graphs made by hand.
_NAMESPACES = frozenset(
    {"_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "symm_mem", "_dtensor"}
)
_LOCAL_OPERATORS = frozenset({"wait_tensor", "_wrap_tensor_autograd", "check_for_nan", "mesh_get_process_group"})
# Used if a backend does not expose its timeout: the shortest default timeout in torch, which is NCCL's.
_SHORTEST_DEFAULT_TIMEOUT = 600.0


class World(NamedTuple):
    """The facts about the default process group that an agreement needs.

    Attributes:
        rank: This process's rank.
        size: The number of processes.
        store: The group's key-value store.
        timeout: Seconds after which a collective gives up.
        issued: Returns the number of collectives that this process has issued, by group name, or None if unknown.
    """

    rank: int
    size: int
    store: Store
    timeout: float
    issued: Callable[[], dict[str, int] | None]

    def substore(self, prefix: str) -> Store:
        """Return the part of the store whose keys have this prefix."""
        from torch._C._distributed_c10d import PrefixStore

        return PrefixStore(prefix, self.store)


def collectives_in(graph_module: GraphModule) -> tuple[str, ...]:
    """Return the names of the collectives in a captured graph, in order of appearance.

    It inspects nodes, including those of nested graphs, without running them, so it cannot detect collectives inside
    custom operators. The result is empty in a single process, and leaves out groups and meshes of one rank.
    """
    if world_size() == 1:
        return ()
    return tuple(dict.fromkeys(name for node in _nodes(graph_module) if (name := _collective(node)) is not None))


def world_size() -> int:
    """Return the number of processes in the default group; 1 if there is none."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return 1 if dist.get_backend() == "fake" else dist.get_world_size()  # torch's backend for dry runs in one process


def world() -> World:
    """Describe the default process group, which must have been initialized."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    # The store has no public name. `ProcessGroup.get_group_store()` is undocumented too, and more recent.
    return World(dist.get_rank(), dist.get_world_size(), _get_default_store(), _timeout(_default_group()), _issued)


class DeclaredGroup(NamedTuple):
    """A decorated function's arguments `group` and `agree_timeout`, after `check_group`."""

    group: object
    agree_timeout: float | None

    @property
    def key(self) -> Hashable:
        """Equal for functions that may share their compiled code."""
        return (self.group if isinstance(self.group, str) else id(self.group)), self.agree_timeout


class Members(NamedTuple):
    """The members of a process group.

    Attributes:
        rank: This process's place in the group, from 0.
        ranks: The rank of each member in the default group.
        name: The group's name.
        store: The group's key-value store.
        timeout: Seconds for which a member waits for others.
    """

    rank: int
    ranks: tuple[int, ...]
    name: str
    store: Store
    timeout: float

    def substore(self, prefix: str) -> Store:
        """Return the part of the store whose keys have this prefix."""
        from torch._C._distributed_c10d import PrefixStore

        return PrefixStore(prefix, self.store)


def check_group(group: object, agree_timeout: object) -> DeclaredGroup | None:
    """Check the arguments of a decorated function, as far as possible before there is a process group.

    Returns:
        The group; None if there is none.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a wrong value.
    """
    seconds = _checked_timeout(agree_timeout)
    if group is None:
        if seconds is not None:
            raise ValueError(f"agree_timeout={agree_timeout!r} is for functions with a group; give group, too")
        return None
    if group != "world" and not _is_mesh(group) and not _is_process_group(group):
        hint = "; this process is not a member of that group" if group == -100 else ""  # GroupMember.NON_GROUP_MEMBER
        raise TypeError(f'group must be "world", a ProcessGroup, a DeviceMesh or None, not {group!r}{hint}')
    if _is_mesh(group) and (axes := getattr(group, "ndim", 1)) != 1:
        raise ValueError(f'group must be a DeviceMesh of one dimension, such as mesh["tp"], not of {axes}: {group!r}')
    declared = DeclaredGroup(group, seconds)
    members(declared)
    return declared


def _checked_timeout(value: object) -> float | None:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"agree_timeout must be a number of seconds, a timedelta or None, not {value!r}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"agree_timeout must be a positive number of seconds, not {value!r}")
    return float(seconds)


def _is_mesh(group: object) -> bool:
    module: Any = sys.modules.get("torch.distributed.device_mesh")
    return module is not None and isinstance(group, getattr(module, "DeviceMesh", ()))


def _is_process_group(group: object) -> bool:
    import torch.distributed as dist

    return dist.is_available() and isinstance(group, dist.ProcessGroup)


def members(declared: DeclaredGroup) -> Members | None:
    """Return the members of a group; None if it has only this process, or if there is no process group yet.

    Raises:
        ValueError: `agree_timeout` is not below the group's own timeout.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    if world_size() == 1:
        return None
    group: Any = declared.group
    group = _default_group() if group == "world" else group.get_group() if _is_mesh(group) else group
    if group.size() == 1:
        return None
    limit = _timeout(group)
    seconds = declared.agree_timeout
    if seconds is not None and seconds >= limit:
        raise ValueError(f"agree_timeout must be below the process group's own timeout, {limit:.4g} s, not {seconds!r}")
    # The store has no public name: see `world`. The map from groups to their stores is older than 2.0.
    _, store = _world.pg_map[group]
    name = "world" if declared.group == "world" else group.group_desc
    return Members(group.rank(), tuple(dist.get_process_group_ranks(group)), name, store, seconds or limit / 2)


def _default_group() -> Any:
    from torch.distributed.distributed_c10d import _get_default_group

    return _get_default_group()


def _timeout(group: Any) -> float:
    # A group has one backend per device type, each with its own options. Not all backends expose them.
    backends = [group._get_backend(device) for device in group._device_types]
    timeouts = [options._timeout for backend in backends if (options := getattr(backend, "options", None)) is not None]
    return min((timeout.total_seconds() for timeout in timeouts), default=_SHORTEST_DEFAULT_TIMEOUT)


def _issued() -> dict[str, int] | None:
    # Sequence numbers, which torch itself compares to detect desynchronized ranks: a public method in C++, private in
    # Python since 1.9. Gloo, NCCL, XCCL and UCC implement it; other backends raise.
    from torch.distributed.distributed_c10d import _world

    groups: list[Any] = list(_world.pg_map)
    try:
        return {group.group_name: group._get_sequence_number_for_group() for group in groups}
    except RuntimeError:
        return None


def _nodes(graph_module: GraphModule) -> Iterator[Node]:
    from torch.fx import GraphModule

    for module in graph_module.modules():  # the bodies of higher-order operators are submodules
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def _collective(node: Node) -> str | None:
    value = node.meta.get("example_value")  # set by Dynamo on what it captures
    if any(_is_distributed(part) for part in (value if isinstance(value, (tuple, list)) else (value,))):
        return "DTensor"
    return _operator(node) if node.op == "call_function" else None


def _is_distributed(value: object) -> bool:
    # If the module is not imported, no DTensor exists.
    tensor: Any = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(value, tensor.DTensor) and value.device_mesh.size() > 1


def _operator(node: Node) -> str | None:
    from torch._ops import OpOverload, OpOverloadPacket

    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        namespace, name = str(node.target).split(".")[:2]
        communicates = namespace in _NAMESPACES and name not in _LOCAL_OPERATORS
    else:  # a function that Dynamo does not trace into
        name = getattr(node.target, "__name__", "")
        communicates = str(getattr(node.target, "__module__", "")).startswith("torch.distributed.")
    return name if communicates and not _is_alone(node) else None


def _is_alone(node: Node) -> bool:
    """Return True if the operator's group has only one rank."""
    from torch._C._distributed_c10d import _resolve_process_group

    names = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, str)]
    try:
        return bool(names) and _resolve_process_group(names[-1]).size() == 1  # type: ignore[arg-type, unused-ignore]  # other types in other versions
    except (RuntimeError, ValueError):  # not the name of a group
        return False
