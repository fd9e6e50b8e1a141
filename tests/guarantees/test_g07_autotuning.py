"""G7: Inductor's autotuning on the CPU, with candidates that fail for lack of memory, of disk space, or of a process.

With stock torch, an operation whose candidates have all failed once can never be compiled again on the same cache.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import autotune_process, lowering  # noqa: F401  # lowering before the next import, or it fails
from torch._inductor.codegen.cpp_template_kernel import CppTemplateCaller
from torch._inductor.exc import CppCompileError
from torch._inductor.select_algorithm import ExternKernelCaller

from compile_retry import CompileState, RetryPolicy, compile_with_fallback

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")]

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
A, B = torch.randn(4, 32, 64), torch.randn(4, 64, 64)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a, b).relu()


def no_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory")


class Candidates:
    """Inductor's two candidates for a batched matrix product: a C++ template and ATen. Either may fail to be timed."""

    def __init__(self, cache: Path, patch: pytest.MonkeyPatch) -> None:
        self._cache = cache
        self.error: Callable[[], Exception] = no_memory
        self.failing: set[str] = set()
        self.timed: list[str] = []
        self.buffers: list[weakref.ref[torch.Tensor]] = []
        for name, caller in (("template", CppTemplateCaller), ("aten", ExternKernelCaller)):
            self._watch(name, caller, patch)

    def _watch(self, name: str, caller: Any, patch: pytest.MonkeyPatch) -> None:
        benchmark = caller.benchmark

        def watched(choice: Any, *inputs: torch.Tensor, out: torch.Tensor) -> float:
            self.timed.append(name)
            self.buffers.append(weakref.ref(out))
            if name in self.failing:
                raise self.error()
            time: float = benchmark(choice, *inputs, out=out)
            return time

        patch.setattr(caller, "benchmark", watched)

    def stored(self) -> dict[str, float]:
        """Return the times on disk, by candidate."""
        (file,) = self._cache.glob("cache/*")
        times: dict[str, float] = {}
        for inputs in json.loads(file.read_text())["cache"]["bmm"].values():
            for precision in inputs.values():
                times |= {key.partition("-")[0]: time for key, time in precision.items() if isinstance(time, float)}
        return times

    def graphs(self) -> int:
        """Return the number of compiled graphs on disk."""
        return len([*self._cache.glob("fxgraph/*/*/*")])


def as_in_a_new_process() -> None:
    torch._dynamo.reset()
    torch._inductor.utils.clear_caches()


@pytest.fixture
def candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Candidates]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    as_in_a_new_process()
    config = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN", "cpp_cache_precompile_headers": False}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # otherwise timing takes long where other tests run
    with torch._inductor.config.patch(config):
        yield Candidates(tmp_path, monkeypatch)
    torch.set_num_threads(threads)


def compiled(**options: Any) -> Any:
    return compile_with_fallback(product, policy=EVERY_CALL, **options)


def call(fn: Any) -> None:
    torch.testing.assert_close(fn(A, B), product(A, B))


def test_no_memory_for_any_candidate(candidates: Candidates) -> None:
    """The failure is transient, for lack of memory, and the retry succeeds. No infinite time is stored."""
    candidates.failing = {"template", "aten"}
    fn = compiled()
    call(fn)
    assert fn.last_failure is not None
    assert (fn.last_failure.kind, fn.last_failure.error_type) == ("transient", "torch.OutOfMemoryError")
    assert candidates.stored() == {}
    gc.collect()
    assert not any(buffer() is not None for buffer in candidates.buffers)
    candidates.failing = set()
    call(fn)
    assert (fn.state, fn.stats.failures, fn.stats.partly_tuned) == (CompileState.COMPILED, 1, 0)
    assert sorted(candidates.timed) == ["aten", "aten", "template", "template"]
    assert len(candidates.stored()) == 2
    assert max(candidates.stored().values()) < math.inf


def test_what_stock_torch_has_stored(candidates: Candidates) -> None:
    """Infinite times that another process has stored are measured again, once."""
    candidates.failing = {"template", "aten"}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="NoValidChoicesError"):
        torch.compile(product)(A, B)
    assert set(candidates.stored().values()) == {math.inf}
    as_in_a_new_process()
    candidates.failing, candidates.timed = set(), []
    fn = compiled()
    call(fn)
    assert (fn.state, fn.stats.failures) == (CompileState.COMPILED, 0)
    assert sorted(candidates.timed) == ["aten", "template"]
    assert max(candidates.stored().values()) < math.inf


def test_a_candidate_that_is_wrong(candidates: Candidates) -> None:
    """Its time is infinite for good, and neither this process nor the next one measures again what was stored."""
    candidates.failing, candidates.error = {"template"}, lambda: RuntimeError("invalid argument")
    fn = compiled()
    call(fn)
    assert (fn.state, fn.next_retry, fn.stats.partly_tuned) == (CompileState.COMPILED, None, 0)
    assert sorted(candidates.stored().values())[1] == math.inf
    for graph in [*candidates._cache.glob("fxgraph/*/*/*")]:
        graph.unlink()
    as_in_a_new_process()
    candidates.timed = []
    call(compiled())
    assert candidates.timed == []


def test_only_wrong_candidates(candidates: Candidates) -> None:
    """If all candidates fail because of themselves, the failure is permanent."""
    candidates.failing, candidates.error = {"template", "aten"}, lambda: RuntimeError("invalid argument")
    fn = compiled()
    call(fn)
    assert fn.last_failure is not None
    assert (fn.state, fn.last_failure.kind) == (CompileState.GAVE_UP, "permanent")
    assert fn.last_failure.error_type.endswith("NoValidChoicesError")


def test_memory_for_some_candidates(candidates: Candidates) -> None:
    """The graph is compiled with what is left, and tuned again. Only then is it stored, for other processes."""
    candidates.failing = {"template"}
    fn = compiled()
    call(fn)
    assert (fn.state, fn.stats.failures, fn.stats.partly_tuned) == (CompileState.COMPILED, 0, 1)
    assert fn.next_retry is not None
    assert len(candidates.stored()) == 1
    assert candidates.graphs() == 0
    candidates.failing, candidates.timed = set(), []
    call(fn)
    assert (fn.next_retry, fn.stats.attempts, fn.stats.compiled_calls) == (None, 2, 2)
    assert sorted(candidates.timed) == ["aten", "template"]
    assert len(candidates.stored()) == 2
    assert candidates.graphs() == 1


def test_a_candidate_that_cannot_be_built(candidates: Candidates) -> None:
    """The same holds if the disk is full while a candidate is compiled."""
    candidates.failing = {"template"}
    candidates.error = lambda: CppCompileError(["g++"], "No space left on device")
    fn = compiled()
    call(fn)
    assert (fn.state, fn.stats.partly_tuned) == (CompileState.COMPILED, 1)
    assert len(candidates.stored()) == 1


def test_a_killed_process(candidates: Candidates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same holds if the process that times a candidate is killed."""
    put, killed = autotune_process.TuningProcess.put, [False]

    def put_and_kill(self: Any, *args: Any, **kwargs: Any) -> None:
        put(self, *args, **kwargs)
        if not killed[0]:
            killed[0] = True
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()

    monkeypatch.setattr(autotune_process.TuningProcess, "put", put_and_kill)
    fn = compiled()
    with torch._inductor.config.patch(autotune_in_subproc=True), pytest.warns(UserWarning, match="Failed to benchmark"):
        call(fn)
    assert (fn.state, fn.stats.partly_tuned) == (CompileState.COMPILED, 1)
    assert len(candidates.stored()) == 1
    with torch._inductor.config.patch(autotune_in_subproc=True):
        call(fn)
    assert (fn.next_retry, fn.stats.attempts) == (None, 2)
    autotune_process.get_tuning_process_pool().shutdown()
    autotune_process.get_tuning_process_pool.cache_clear()
