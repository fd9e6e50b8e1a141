"""Private names of ``torch.distributed``: collectives in a captured graph, and facts about the default process group.

Nothing here communicates. The agreement between ranks is in `_compile/ranks.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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
    return World(dist.get_rank(), dist.get_world_size(), _get_default_store(), _timeout(), _issued)


def _timeout() -> float:
    from torch.distributed.distributed_c10d import _get_default_group

    group: Any = _get_default_group()
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
