"""Non-public inductor: what it remembers of a failure, and where it keeps its files. See also `dynamo`.

All of it is optional: where one of these is missing, in another version of PyTorch, there is nothing to clear or mend.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import getclosurevars, isfunction
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.fx import Graph, GraphModule


@functools.cache
def spare_other_threads() -> None:
    """Keep the first code that inductor generates from failing calls of an ``nn.Module`` in other threads.

    For that code it traces a function that returns its argument, once in a process, with `torch.fx.symbolic_trace`.
    While that goes on every module in every thread is taken for a part of what is traced, and raises a `NameError`
    (https://github.com/pytorch/pytorch/issues/112775). The graph that comes of it is given to inductor here instead.
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
    """Make inductor ask again what it asked while something was broken. What it has compiled it keeps."""
    for clear in (*_probe_caches(), *_failed_kernels()):
        clear()
    _reset_instruction_sets()


def _probe_caches() -> Iterator[Callable[[], object]]:
    """How to clear what torch has found out about its surroundings, once and for all.

    What the C++ compiler is and can do (since 2.1), where a precompiled header is, though the file may be gone (2.8),
    whether Triton and a GPU for it are there (2.1), and the file that keeps the timings of tuned kernels (2.1).
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
    """How to drop the loaders of kernels that failed to compile.

    Inductor keeps a kernel's loader before the kernel is compiled, and it repeats that compile's error for ever. Since
    2.3.
    """
    from torch._inductor import codecache

    caches: list[Any] = [codecache.CppCodeCache]
    for kernels in caches:
        caches += kernels.__subclasses__()
        for key in [key for key, loader in kernels.cache.items() if _has_loaded_nothing(loader)]:
            yield functools.partial(kernels.cache.pop, key, None)


def _has_loaded_nothing(loader: object) -> bool:
    return isfunction(loader) and getclosurevars(loader).nonlocals.get("lib", loader) is None


# Set on the instances by probes (since 2.6): the class has what holds before.
_FOUND_OUT = ("_arch_flags", "_is_avx512_bf16_supported", "_is_amx_fp16_supported")


def _reset_instruction_sets() -> None:
    """Undo what probes have noted in the vector instruction sets themselves.

    A probe that raises leaves its compiler flag there for ever; and what another has found changes its own command, so
    that repeating it would not find its result on disk.
    """
    from torch._inductor import cpu_vec_isa

    for isa in getattr(cpu_vec_isa, "supported_vec_isa_list", ()):
        for name in _FOUND_OUT:
            if name in vars(isa) and hasattr(type(isa), name):
                delattr(isa, name)


@dataclass(frozen=True)
class InstructionSets:
    """Vector instructions.

    Attributes:
        flags: By what the processor names those it has.
        there: The sets of them that inductor knows and this processor has, best first.
        usable: Those that inductor would use, best first.
    """

    flags: list[str]
    there: list[str]
    usable: list[str]


def instruction_sets() -> InstructionSets:
    """Ask the compiler for vector instructions, or what it has answered before.

    A probe that fails, or whose file is damaged on disk, says that there are none without an error. What the processor
    has is known of x86 only; since 2.6.
    """
    from torch._inductor import cpu_vec_isa

    flags = cpu_vec_isa.x86_isa_checker()
    there = [str(isa) for isa in cpu_vec_isa.supported_vec_isa_list if all(flag in flags for flag in str(isa).split())]
    return InstructionSets(sorted(flags), there, [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()])


def replace_dead_workers(*, all_graph_compilers: bool = False) -> None:
    """Have pools of compile workers made anew whose process is gone. Asked for a compile, they would never answer.

    Args:
        all_graph_compilers: Also those that compile whole graphs (`fx_compile_mode`) and are alive: what they remember
            of a failure cannot be reached from here.
    """
    asynchronous, subprocess = map(
        sys.modules.get, ("torch._inductor.async_compile", "torch._inductor.compile_fx_subproc")
    )
    compiling: Any = getattr(asynchronous, "AsyncCompile", None)
    if (pool := _existing_pool(compiling)) is not None and _is_dead(pool):
        _abandon(pool)
        getattr(asynchronous, "_pool_set", set()).discard(pool)
        compiling.process_pool.cache_clear()  # since 2.0
        compiling._ready_future = None  # since 2.9; answers for the old pool
    compiling = getattr(subprocess, "_SubprocessFxCompile", None)  # since 2.7
    if (pool := _existing_pool(compiling)) is not None and (all_graph_compilers or _is_dead(pool)):
        _abandon(pool)
        compiling.process_pool.cache_clear()


def _existing_pool(compiling: Any) -> Any:
    cached = getattr(compiling, "process_pool", None)
    return cached() if isinstance(cached, functools._lru_cache_wrapper) and cached.cache_info().currsize else None


def _is_dead(pool: Any) -> bool:
    if hasattr(pool, "process"):  # a process of its own that has the workers
        return pool.process.poll() is not None or not getattr(pool, "running", True)
    return bool(getattr(pool, "_broken", False) or getattr(pool, "_shutdown_thread", False))


def _abandon(pool: Any) -> None:
    try:
        pool.shutdown()
    except Exception:  # it is dead: what it says of that is of no interest
        return


def cache_directory() -> str:
    """Where inductor keeps its files; not made by asking. Since 2.5."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return str(Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()).absolute())


def header_directory() -> str | None:
    """Where precompiled headers are kept, whatever the cache directory; None where none are used. Since 2.8."""
    from torch._inductor import codecache, config

    used = getattr(config, "cpp_cache_precompile_headers", False)
    return str(getattr(codecache, "_HEADER_DIR", "")) or None if used else None


@contextmanager
def caching_in(directory: str, *, headers: bool = False) -> Iterator[None]:
    """Have inductor keep its files there, and use no precompiled headers: those are in yet another place.

    Where the files go is asked of the environment at each compile. In the meantime other threads see it changed.

    Args:
        directory: An existing directory.
        headers: Leave it as it is whether precompiled headers are used.
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
    """Have inductor use another C++ compiler. Since 2.0; for `compile_retry.testing` only.

    Inductor reads the environment's ``CXX`` when it is imported, so later only its configuration is left to change.
    """
    from torch._inductor import config

    with config.patch({"cpp.cxx": (command,)}):
        yield


def check_supported() -> None:
    """Raise where this Python cannot run Dynamo at all, or inductor cannot be imported.

    Since 2.1, and 2.0; for `compile_retry doctor`, as is all below.
    """
    from torch._dynamo import eval_frame
    from torch._inductor import compile_fx  # noqa: F401  # not by the first compile, whose time is taken

    getattr(eval_frame, "check_if_dynamo_supported", lambda: None)()


def cxx_compiler() -> str:
    """The C++ compiler that inductor would use; raises if it finds none that answers. Since 2.3."""
    from torch._inductor import cpp_builder

    return str(cpp_builder.get_cpp_compiler())


def count_compiles() -> tuple[int, int]:
    """How many graphs this process has captured, and how many it took from the cache. Since 2.0, and 2.3; 2.6.

    Where torch no longer counts under these names there seem to be none.
    """
    from torch._dynamo.utils import counters

    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return counters["stats"]["unique_graphs"], hits


def triton_works() -> bool:  # pragma: no cover  # not run on a GPU yet
    """Whether inductor finds Triton and a device that it can compile for. Since 2.1."""
    from torch.utils._triton import has_triton

    return bool(has_triton())
