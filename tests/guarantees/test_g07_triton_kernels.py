"""G7: a Triton kernel of which only some configurations could be built or loaded is built again when due."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.triton_compat import OutOfResources, PTXASError
from torch.fx import GraphModule

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.events import PartlyTuned
from compile_retry.testing import record_events

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
X = torch.ones(3)


class Device:
    """A device interface of Inductor's, without a device."""

    exchange_device = maybe_exchange_device = staticmethod(lambda index: index)


class Built(triton_heuristics.TritonCompileResult):
    """A configuration of a Triton kernel that was built."""

    def __init__(self, error: Exception | None = None) -> None:
        this: Any = self
        this.config, this.compile_meta, self.error = None, None, error
        this.kernel = SimpleNamespace(src=SimpleNamespace(fn=None), hash="ab" * 32, _init_handles=self._fail)

    def _fail(self) -> None:
        assert self.error is not None
        raise self.error

    def make_launcher(self) -> Any:
        return super().make_launcher() if self.error is not None else str


class Kernel(triton_heuristics.CachingAutotuner):
    """A Triton kernel of Inductor's, without Triton: some of its configurations cannot be built, or not be loaded.

    Args:
        built: What building each configuration results in. None for a kernel that a worker process has built.
        from_worker: How many configurations the worker had, and those that it has built.
    """

    def __init__(
        self, built: list[Built | Exception] | None, from_worker: tuple[int, list[Built]] | None = None
    ) -> None:
        configs, results = from_worker or (None, [])
        this: Any = self
        this.configs, this.compile_results, this.launchers = built, results, []
        this.autotune_cache_info = {"num_configs": configs} if configs else {}
        this.save_cache_hook = self.stores = mock.Mock()
        this.lock, this._plugins, this.deterministic_mode = threading.Lock(), [], True
        this.triton_meta, this.inductor_meta, this.device_props, this.fn = {"device": 0}, {}, None, None

    def _precompile_config(self, cfg: Any) -> Any:
        return super()._precompile_config(cfg) if isinstance(cfg, Exception) else cfg

    def _create_compile_meta(self, cfg: Any) -> Any:
        raise cfg

    def get_device_interface(self) -> Any:
        return Device


class KernelBuilder:
    """A backend that builds a Triton kernel in each attempt. The code of each attempt has a number."""

    def __init__(self, *kernels: Kernel) -> None:
        self.kernels = list(kernels)
        self.asked = 0
        self.ran: list[int] = []

    def __call__(self, graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.kernels.pop(0).precompile()
        self.asked += 1
        number = self.asked

        def run(*args: Any) -> Any:
            self.ran.append(number)
            return graph_module.forward(*args)

        return run


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def call(fn: Any, *, times: int = 1) -> None:
    for _ in range(times):
        assert torch.equal(fn(X), X.sin())


PTXAS = PTXASError("ptxas was killed")
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "built", [[Built(), PTXAS, Built()], [Built(), Built(NO_MEMORY), Built()]], ids=["not built", "not loaded"]
)
def test_a_kernel_that_lacks_configurations(built: list[Any]) -> None:
    """It is used as it is and built again when due. Neither its best configuration nor its module is remembered."""
    lacking, whole = Kernel(built), Kernel([Built(), Built(), Built()])
    fn = compile_with_fallback(sine, backend=KernelBuilder(lacking, whole), policy=EVERY_CALL)
    module = ModuleType("of the kernel")
    module.kernel = lacking  # type: ignore[attr-defined]
    with (
        record_events(kinds={"partly tuned", "tuned"}) as events,
        mock.patch.dict(PyCodeCache.modules_no_attr, {"lacking": module, "other": ModuleType("other")}),
    ):
        call(fn)
        assert "lacking" not in PyCodeCache.modules_no_attr
        assert "other" in PyCodeCache.modules_no_attr
        call(fn)
    partly, _ = events
    assert isinstance(partly, PartlyTuned)
    assert (partly.timed, partly.candidates) == (2, 3)
    assert (lacking.save_cache_hook, whole.save_cache_hook) == (None, whole.stores)
    assert (fn.state, fn.next_retry) == (CompileState.COMPILED, None)


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources("out of resource: shared memory, Required: 229,440, Hardware limit: 101,376"),
        PTXASError("Entry function 'triton_' uses too much shared data (0x1c000 bytes, 0xc000 max)"),
    ],
    ids=["OutOfResources", "PTXASError"],
)
def test_a_configuration_that_is_too_large(error: Exception) -> None:
    """A configuration that does not fit the device is not missed."""
    fn = compile_with_fallback(sine, backend=KernelBuilder(Kernel([Built(), error])), policy=EVERY_CALL)
    call(fn, times=2)
    assert (fn.state, fn.next_retry) == (CompileState.COMPILED, None)
    assert fn.stats.partly_tuned == 0


def test_no_configuration_at_all() -> None:
    """If no configuration can be built, the attempt fails, and is retried."""
    fn = compile_with_fallback(sine, backend=KernelBuilder(Kernel([PTXAS]), Kernel([Built()])), policy=EVERY_CALL)
    call(fn, times=2)
    assert (fn.stats.failures, fn.stats.recoveries, fn.stats.partly_tuned) == (1, 1, 0)


def test_a_kernel_from_a_worker_process() -> None:
    """The process does not say why a configuration is missing. So the kernel is built once more, and left as it is."""
    builder = KernelBuilder(*(Kernel(None, from_worker=(4, [Built()] * 3)) for _ in range(3)))
    fn = compile_with_fallback(sine, backend=builder, policy=EVERY_CALL)
    with record_events(kinds={"partly tuned"}) as events:
        call(fn, times=5)
    assert [event.message.rpartition("; ")[2] for event in events] == [
        "tuning again in 1 call",
        "it will not be tuned again",
    ]
    assert "3 of 4" in events[0].message
    assert (builder.ran, fn.state, fn.next_retry) == ([1, 2, 2, 2, 2], CompileState.COMPILED, None)


def test_a_whole_kernel_from_a_worker_process() -> None:
    """Nothing is missed if the worker process has built all configurations."""
    builder = KernelBuilder(Kernel(None, from_worker=(2, [Built(), Built()])))
    fn = compile_with_fallback(sine, backend=builder, policy=EVERY_CALL)
    call(fn, times=2)
    assert (fn.state, fn.next_retry) == (CompileState.COMPILED, None)
    assert fn.stats.partly_tuned == 0
