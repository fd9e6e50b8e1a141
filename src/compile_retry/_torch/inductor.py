"""Private names of Inductor: its memory of failures, and the location of its files.

All of them are optional: if one is missing in another version of PyTorch, there is nothing to clear or repair.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import getclosurevars, isfunction
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from torch.fx import Graph, GraphModule

Probe: TypeAlias = Callable[[], bool]


@functools.cache
def isolate_first_trace() -> None:
    """Keep Inductor's first code generation from breaking ``nn.Module`` calls in other threads.

    Once per process, Inductor traces a function that returns its argument, with `torch.fx.symbolic_trace`. Meanwhile
    each module called in any thread is treated as part of the trace and raises a `NameError`
    (https://github.com/pytorch/pytorch/issues/112775). So this gives Inductor the resulting graph instead.
    """
    with suppress(ImportError):
        from torch._inductor import loop_body

        shim: Any = getattr(loop_body, "InterpreterShim", None)
        if isinstance(getattr(shim, "_dummy_gm", None), functools._lru_cache_wrapper):  # pragma: no branch  # 2.10
            graph = Graph()
            graph.output(graph.placeholder("x"))
            traced = GraphModule({}, graph)
            shim._dummy_gm = staticmethod(lambda: traced)


def forget_failures() -> None:
    """Make Inductor repeat the probes that it made while something was broken. It keeps its compiled code."""
    for clear in (*_probe_caches(), *_failed_kernels()):
        clear()
    _reset_instruction_sets()


def _probe_caches() -> Iterator[Callable[[], object]]:
    """Yield functions that clear what torch has cached about its environment.

    These are the C++ compiler and its features (since 2.1), the path of a precompiled header, whose file may be gone
    (2.8), the presence of Triton and a GPU for it (2.1), and the file with the timings of tuned kernels (2.1).
    """
    from torch._inductor import codecache, cpp_builder, cpu_vec_isa, utils
    from torch.utils import _triton

    header = getattr(codecache, "_precompile_header", None)
    timings = getattr(getattr(codecache, "CacheBase", None), "get_local_cache_path", None)
    gpus = [getattr(utils, name, None) for name in ("get_gpu_type", "is_big_gpu")]
    modules: list[ModuleType] = [cpp_builder, cpu_vec_isa, _triton]
    for thing in (header, timings, *gpus, *(thing for module in modules for thing in list(vars(module).values()))):
        for cached in (thing, *(vars(thing).values() if isinstance(thing, type) else ())):
            if isinstance(cached, functools._lru_cache_wrapper):
                yield cached.cache_clear


def _failed_kernels() -> Iterator[Callable[[], object]]:
    """Yield functions that drop the loaders of kernels that failed to compile.

    Inductor caches a kernel's loader before the kernel is compiled, and the loader repeats that compile's error
    forever. Since 2.3.
    """
    from torch._inductor import codecache

    caches: list[Any] = [codecache.CppCodeCache]
    for kernels in caches:
        caches += kernels.__subclasses__()
        for key in [key for key, loader in kernels.cache.items() if _has_loaded_nothing(loader)]:
            yield functools.partial(kernels.cache.pop, key, None)


def _has_loaded_nothing(loader: object) -> bool:
    return isfunction(loader) and getclosurevars(loader).nonlocals.get("lib", loader) is None


# Probes set these on instances (since 2.6). The class has the initial values.
_PROBE_RESULTS = ("_arch_flags", "_is_avx512_bf16_supported", "_is_amx_fp16_supported")


def _reset_instruction_sets() -> None:
    """Undo the changes that probes have made to the vector instruction sets themselves.

    A probe that raises leaves its compiler flag there forever. The result of a successful probe changes the probe's own
    command, so a repeated probe would not find its result on disk.
    """
    from torch._inductor import cpu_vec_isa

    for isa in getattr(cpu_vec_isa, "supported_vec_isa_list", ()):
        for name in _PROBE_RESULTS:
            if name in vars(isa) and hasattr(type(isa), name):
                delattr(isa, name)


class _Judging(threading.local):
    """This thread's judge of failed probes, if any."""

    judge: Callable[[Probe], bool] | None = None


_judging = _Judging()


@contextmanager
def judging_failed_probes(judge: Callable[[Probe], bool]) -> Iterator[None]:
    """Let `judge` decide about each compiler probe that fails in this thread while the block runs.

    A probe compiles and loads a small program. If that fails for any reason, Inductor takes the instructions to be
    unsupported, until the process exits. Other threads' probes are left alone.

    Args:
        judge: Takes the probe, to repeat it. Returns the answer that Inductor caches. If it raises, nothing is cached,
            and the compile that needs the answer fails.
    """
    _put_judge_behind_probes()
    outer, _judging.judge = _judging.judge, judge
    try:
        yield
    finally:
        _judging.judge = outer


@functools.cache
def _put_judge_behind_probes() -> None:
    """Wrap `VecISA.check_build`, which runs each probe; since 2.6. Without it, failed probes are not judged."""
    from torch._inductor import cpu_vec_isa

    check = getattr(getattr(cpu_vec_isa, "VecISA", None), "check_build", None)
    if check is None:  # pragma: no cover  # exists in the torch version that the tests use
        return

    @functools.wraps(check)
    def check_build(isa: Any, code: str) -> bool:
        try:
            return bool(check(isa, code) or (_judging.judge and _judging.judge(functools.partial(check, isa, code))))
        except Exception:
            _reset_instruction_sets()
            raise

    cpu_vec_isa.VecISA.check_build = check_build  # type: ignore[assignment, method-assign]  # on purpose


# As large as a probe, but for any processor.
_PLAIN_PROGRAM = """
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
float numbers[16] = {0.0};
extern "C" void compile_retry() { at::vec::Vectorized<float>(1).exp().store(numbers); }
"""


def compile_plain_program(directory: str) -> None:
    """Compile a program like that of a probe, but without vector instructions. Raise if the compiler does. Since 2.6.

    Args:
        directory: An empty directory.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    source = Path(directory, "plain.cpp")
    source.write_text(_PLAIN_PROGRAM)
    options = CppTorchOptions(include_pytorch=True, warning_all=False)
    CppBuilder("plain", [str(source)], options, directory).build()


@dataclass(frozen=True)
class InstructionSets:
    """Vector instructions of this processor.

    Attributes:
        flags: The processor's own names for its instruction sets.
        there: The sets that Inductor supports and this processor has, best first.
        usable: The sets that Inductor would use, best first.
    """

    flags: list[str]
    there: list[str]
    usable: list[str]


def instruction_sets() -> InstructionSets:
    """Return the vector instruction sets, probing the compiler unless results are cached.

    A probe that fails, or whose file on disk is damaged, reports a missing set, without an error. The sets of the
    processor itself are known on x86 only. Since 2.6.
    """
    from torch._inductor import cpu_vec_isa

    flags = cpu_vec_isa.x86_isa_checker()
    there = [str(isa) for isa in cpu_vec_isa.supported_vec_isa_list if all(flag in flags for flag in str(isa).split())]
    return InstructionSets(sorted(flags), there, [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()])


def remembers_failed_probes() -> bool:
    """Return True if Inductor has cached that it lacks instruction sets that the processor has. Runs no probe."""
    from torch._inductor import cpu_vec_isa

    cached = cpu_vec_isa.valid_vec_isa_list
    if not isinstance(cached, functools._lru_cache_wrapper) or not cached.cache_info().currsize:
        return False
    found = instruction_sets()
    return len(found.usable) < len(found.there)


def replace_dead_workers(*, all_graph_compilers: bool = False) -> None:
    """Recreate worker pools whose process has died. A compile submitted to such a pool would hang.

    Args:
        all_graph_compilers: Whether to recreate live pools that compile whole graphs (`fx_compile_mode`) too, because
            their memory of a failure cannot be cleared from here.
    """
    asynchronous, subprocess = map(
        sys.modules.get, ("torch._inductor.async_compile", "torch._inductor.compile_fx_subproc")
    )
    compiling: Any = getattr(asynchronous, "AsyncCompile", None)
    if (pool := _existing_pool(compiling)) is not None and _is_dead(pool):
        _abandon(pool)
        getattr(asynchronous, "_pool_set", set()).discard(pool)
        compiling.process_pool.cache_clear()  # since 2.0
        compiling._ready_future = None  # since 2.9; belongs to the old pool
    compiling = getattr(subprocess, "_SubprocessFxCompile", None)  # since 2.7
    if (pool := _existing_pool(compiling)) is not None and (all_graph_compilers or _is_dead(pool)):
        _abandon(pool)
        compiling.process_pool.cache_clear()


def _existing_pool(compiling: Any) -> Any:
    cached = getattr(compiling, "process_pool", None)
    return cached() if isinstance(cached, functools._lru_cache_wrapper) and cached.cache_info().currsize else None


def _is_dead(pool: Any) -> bool:
    if hasattr(pool, "process"):  # the workers' parent is a separate process
        return pool.process.poll() is not None or not getattr(pool, "running", True)
    return bool(getattr(pool, "_broken", False) or getattr(pool, "_shutdown_thread", False))


def _abandon(pool: Any) -> None:
    try:
        pool.shutdown()
    except Exception:  # the pool is dead, so errors do not matter
        return


def cache_directory() -> str:
    """Return Inductor's cache directory, without creating it. Since 2.5."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return str(Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()).absolute())


def header_directory() -> str | None:
    """Return the directory of precompiled headers, which is not in the cache directory; None if unused. Since 2.8."""
    from torch._inductor import codecache, config

    used = getattr(config, "cpp_cache_precompile_headers", False)
    return str(getattr(codecache, "_HEADER_DIR", "")) or None if used else None


@contextmanager
def caching_in(directory: str, *, headers: bool = False) -> Iterator[None]:
    """Make Inductor use another cache directory, without precompiled headers, which are stored elsewhere.

    Inductor reads the environment variable at each compile. Meanwhile other threads see the changed environment.

    Args:
        directory: An existing directory.
        headers: Whether to leave the setting for precompiled headers unchanged.
    """
    from torch._inductor import codecache, config

    moved = {"TORCHINDUCTOR_CACHE_DIR": directory}
    if "TRITON_CACHE_DIR" in os.environ:
        moved["TRITON_CACHE_DIR"] = str(Path(directory, "triton"))
    before = {name: os.environ.get(name) for name in moved}
    remembered = getattr(getattr(codecache, "CacheBase", None), "get_local_cache_path", None)
    forget = getattr(remembered, "cache_clear", lambda: None)
    changes = {} if headers or not header_directory() else {"cpp_cache_precompile_headers": False}
    os.environ.update(moved)
    forget()
    try:
        with config.patch(changes):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        forget()


@contextmanager
def cxx(command: str) -> Iterator[None]:
    """Make Inductor use another C++ compiler. Since 2.0; for `compile_retry.testing` only.

    Inductor reads ``CXX`` when it is imported, so after that only its config can be changed.
    """
    from torch._inductor import config

    with config.patch({"cpp.cxx": (command,)}):
        yield


def check_supported() -> None:
    """Raise if Dynamo does not support this Python version (since 2.1), or Inductor cannot be imported (2.0).

    This and all functions below are for `compile_retry doctor`.
    """
    from torch._dynamo import eval_frame
    from torch._inductor import compile_fx  # noqa: F401  # import it before the first compile, which is timed

    getattr(eval_frame, "check_if_dynamo_supported", lambda: None)()


def cxx_compiler() -> str:
    """Return the C++ compiler that Inductor would use; raise if it finds none that works. Since 2.3."""
    from torch._inductor import cpp_builder

    return str(cpp_builder.get_cpp_compiler())


def count_compiles() -> tuple[int, int]:
    """Return the number of graphs captured (since 2.0) and taken from the caches (2.3, 2.6) in this process.

    If torch no longer uses these counter names, the numbers are 0.
    """
    from torch._dynamo.utils import counters

    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return counters["stats"]["unique_graphs"], hits
