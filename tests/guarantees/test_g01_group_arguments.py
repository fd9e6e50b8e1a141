"""G1 on many ranks: the arguments `group` and `agree_timeout`, in one process."""

from __future__ import annotations

import copy
import json
import math
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from compile_retry import CompileState, RetryPolicy, compile_repeated_blocks, compile_with_fallback, compiled_function
from compile_retry import report as make_report
from support import Compiler, first


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.parametrize("group", ["World", 3, object(), -100])
def test_wrong_groups(group: Any) -> None:
    """An argument that is no group is refused, and the message says what is allowed."""
    with pytest.raises(TypeError, match='group must be "world", a ProcessGroup, a DeviceMesh or None, not') as raised:
        compile_with_fallback(double, group=group)
    assert ("not a member" in str(raised.value)) is (group == -100)
    with pytest.raises(TypeError, match="group must be"):
        compile_with_fallback(group=group)
    with pytest.raises(TypeError, match="group must be"):
        compile_repeated_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear, group=group)


@pytest.mark.parametrize("value", ["5", True, [1]])
def test_timeouts_of_the_wrong_type(value: Any) -> None:
    """A timeout is a number of seconds or a timedelta."""
    with pytest.raises(TypeError, match="agree_timeout must be a number of seconds, a timedelta or None, not"):
        compile_with_fallback(double, group="world", agree_timeout=value)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, timedelta(0)])
def test_wrong_timeouts(value: Any) -> None:
    """A timeout is positive and finite."""
    with pytest.raises(ValueError, match="agree_timeout must be a positive number of seconds, not"):
        compile_with_fallback(double, group="world", agree_timeout=value)


def test_a_timeout_without_a_group() -> None:
    """A timeout alone is a mistake."""
    with pytest.raises(ValueError, match="agree_timeout=5 is for functions with a group"):
        compile_with_fallback(double, agree_timeout=5)


@pytest.mark.usefixtures("process_group")
def test_meshes() -> None:
    """A mesh has one dimension."""
    with pytest.raises(ValueError, match=r'such as mesh\["tp"\], not of 2'):
        compile_with_fallback(double, group=init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp")))
    compile_with_fallback(double, group=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize("is_initialized", [False, True])
def test_one_process(request: pytest.FixtureRequest, *, is_initialized: bool) -> None:
    """Without other ranks, a function with a group behaves like one without: here it falls back and recovers."""
    if is_initialized:
        request.getfixturevalue("process_group")
    group: Any = dist.group.WORLD if is_initialized else "world"
    fn = compile_with_fallback(double, backend=Compiler(first(1)), policy=RetryPolicy.every(calls=2), group=group)
    for _ in range(3):
        assert fn(torch.ones(2)).tolist() == [2, 2]
    assert (fn.stats.eager_calls, fn.stats.recoveries, fn.state) == (2, 1, CompileState.COMPILED)
    assert fn.last_failure is not None
    assert fn.last_failure.rank is None
    fn.retry_now()
    fn.reset()
    assert fn.last_failure is None
    assert next(each for each in make_report().functions if each.name == fn.name).ranks is None


def test_refusals_in_one_process() -> None:
    """Permanent failures of many frames are limited by the time that they take, as without a group."""
    fails = Compiler(lambda inputs: NotImplementedError())
    fn = compile_with_fallback(double, backend=fails, dynamic=False, group="world")
    for rows in range(2, 30):
        fn(torch.ones(rows))
    assert fails.asked >= 8
    assert fn.state is CompileState.GAVE_UP


def test_a_group_is_part_of_what_is_shared() -> None:
    """Functions with different groups, or different timeouts, do not share their compiled code."""
    compiler = Compiler()
    for group, timeout, compiles in (("world", None, 1), ("world", None, 1), ("world", 5, 2), (None, None, 3)):
        options: dict[str, Any] = {"group": group, "agree_timeout": timeout}
        compile_with_fallback(double, backend=compiler, **options)(torch.ones(2))
        assert compiler.asked == compiles


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies(copied: Any) -> None:
    """A copy has the same group."""
    fn = copied(compile_with_fallback(double, backend=Compiler(), group="world"))
    fn(torch.ones(2))
    assert fn.state is CompileState.COMPILED


def test_blocks_and_modules() -> None:
    """Modules take a group, too."""
    model = compile_repeated_blocks(
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
        torch.nn.Linear,
        backend=Compiler(),
        group="world",
        agree_timeout=timedelta(seconds=5),
    )
    model(torch.ones(2))
    part = model.get_submodule("0")
    assert compiled_function(part).state is CompileState.COMPILED
    assert json.dumps(make_report().as_dict())
