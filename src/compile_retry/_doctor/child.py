"""The child process of `compile_retry doctor`, which runs everything that uses torch and so may hang or crash.

Each function imports torch itself, because the import may be what hangs or crashes.
It writes one line of JSON to standard output when a step begins, and one with the facts found. It ends when standard
input is closed, so that no compiler outlives a doctor that was killed, and removes its temporary directories.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile_retry._failures import qualified_name, root_cause
from compile_retry._version import installed_version

if TYPE_CHECKING:
    import torch

Facts = dict[str, Any]

# Includes the headers that Inductor's kernels include: slim images have a compiler, but no Python headers or libgomp.
_PROGRAM = """
#include <Python.h>
#include <omp.h>
#include <cmath>
#include <vector>
extern "C" int compile_retry_doctor(int n) { std::vector<double> v(n, 42.0); return (int)std::lround(v.back()); }
"""

_MEGABYTE = 2**20


def _import_torch() -> Facts:
    found = find_spec("torch")
    facts: Facts = {"path": found.origin} if found else {}
    begin = time.monotonic()
    try:
        getattr(import_module("torch"), "__version__")  # noqa: B009  # which a folder that is called torch lacks
    except Exception as exc:
        return {**facts, "error": _describe(exc)}
    return {**facts, "seconds": time.monotonic() - begin}


def _versions() -> Facts:
    import tenacity  # noqa: F401  # the package needs it
    import torch

    from compile_retry._torch import (
        first_import,  # noqa: F401  # works even if the cache directory cannot be created
        inductor,
    )

    inductor.check_supported()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "compile_retry": installed_version(),
    }


def _cache_directory() -> Facts:
    from compile_retry._torch.inductor import cache_directory

    directory = cache_directory()
    return {"path": directory, **_writable(directory)}


def _temporary_directory() -> Facts:
    directory = tempfile.gettempdir()
    return {"path": directory, **_writable(directory)}


def _writable(directory: str) -> Facts:
    """Write a megabyte there. Return the free space, or the error."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x" * _MEGABYTE)
    except OSError as exc:
        return {"error": _describe(exc)}
    return {"free": free}


def _compiler() -> Facts:
    """Compile, link, load and run a small program: a compiler that prints its version may lack everything else."""
    from compile_retry._torch.inductor import cxx_compiler

    command = cxx_compiler()
    said = _run(command, "--version")
    facts = {"path": shutil.which(command) or command, "version": (said.stdout or said.stderr).partition("\n")[0]}
    # These systems need other flags, and Inductor chooses where to find OpenMP. The later compile checks both.
    if sys.platform in ("win32", "darwin"):  # pragma: no cover  # other systems
        return facts
    with _workspace(tempfile.gettempdir()) as directory:
        source, library = Path(directory, "doctor.cpp"), Path(directory, "doctor.so")
        source.write_text(_PROGRAM)
        flags = ["-shared", "-fPIC", "-fopenmp", "-I", sysconfig.get_path("include"), "-o", str(library)]
        done = _run(command, *flags, str(source))
        if done.returncode:
            return {**facts, "error": _complaint(done.stderr) or f"exit status {done.returncode}"}
        if ctypes.CDLL(str(library)).compile_retry_doctor(3) != 42:
            return {**facts, "error": "compiled code gives wrong results"}
    return facts


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603  # Inductor's compiler


def _vector_instructions() -> Facts:
    """Probe for instruction sets. If Inductor misses some, probe again in an empty directory without damaged files."""
    from compile_retry._torch import inductor

    sets = inductor.instruction_sets()
    facts = {"processor": sets.flags, "found": sets.usable}
    if set(sets.flags) <= set(" ".join(sets.usable).split()):
        return facts
    with _workspace(tempfile.gettempdir()) as directory, inductor.caching_in(directory):
        inductor.forget_failures()
        facts["found elsewhere"] = inductor.instruction_sets().usable
    inductor.forget_failures()
    return facts


def _compile() -> Facts:
    """Compile a graph with a random constant in an empty directory, so that no cache can replace the compiler."""
    return _compile_afresh("cpu")


def _cached_compile() -> Facts:
    """Compile a graph that is always the same, in the usual directory."""
    return _compile_and_compare(0.5, "cpu")


def _compile_afresh(device: str) -> Facts:
    from compile_retry._torch import inductor

    with _workspace(inductor.cache_directory()) as directory, inductor.caching_in(directory, headers=True):
        return _compile_and_compare(random.SystemRandom().uniform(0.1, 2.0), device)


def _compile_and_compare(scale: float, device: str) -> Facts:
    import torch

    from compile_retry._torch.inductor import count_compiles, forget_failures

    def step(x: torch.Tensor) -> torch.Tensor:
        return ((scale * x).sin() * x.exp() + x).sum()

    torch.compiler.reset()
    forget_failures()
    captured, hits = count_compiles()
    begin = time.monotonic()
    # With `fullgraph`, a failure raises even if `suppress_errors` is set.
    result = _loss_and_gradient(torch.compile(step, fullgraph=True), device)
    seconds = time.monotonic() - begin
    torch.testing.assert_close(result, _loss_and_gradient(step, device), rtol=1e-3, atol=1e-3)  # sums in other orders
    now_captured, now_hits = count_compiles()
    return {"seconds": seconds, "compiled": now_captured > captured, "from cache": now_hits > hits}


def _loss_and_gradient(step: Callable[[torch.Tensor], torch.Tensor], device: str) -> tuple[torch.Tensor, Any]:
    import torch

    x = torch.linspace(-1, 1, 1000, device=device, requires_grad=True)
    loss = step(x)
    loss.backward()
    return loss.detach(), x.grad


def _gpu() -> Facts:
    """Look for a GPU. Without one, the other steps of this mode are left out."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return {"device": None, "built for": torch.version.cuda or torch.version.hip}
    return _of_gpu(accelerator)  # pragma: no cover  # needs a GPU


def _of_gpu(accelerator: torch.device) -> Facts:  # pragma: no cover  # needs a GPU
    import torch

    module = torch.get_device_module(accelerator)
    facts: Facts = {"device": accelerator.type, "name": module.get_device_name(), "driver": ""}
    if program := shutil.which("nvidia-smi"):
        facts["driver"] = _run(program, "--query-gpu=driver_version", "--format=csv,noheader").stdout.partition("\n")[0]
    return facts


def _gpu_memory() -> Facts:  # pragma: no cover  # needs a GPU
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"free": free, "total": total}


def _ptxas() -> Facts:  # pragma: no cover  # needs a GPU
    """Run the assembler that comes with Triton, or the one that the environment names."""
    folder = Path(str(import_module("triton").__file__)).parent
    program = os.environ.get("TRITON_PTXAS_PATH") or str(folder / "backends" / "nvidia" / "bin" / "ptxas")
    said = _run(program, "--version")
    if said.returncode:
        return {"path": program, "error": _complaint(said.stderr or said.stdout) or f"exit status {said.returncode}"}
    return {"path": program, "version": next((line for line in said.stdout.splitlines() if "release" in line), "")}


_KERNEL = """
import triton
import triton.language as tl

@triton.jit
def add(x, number: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(x + i, tl.load(x + i) + number)
"""


def _triton() -> Facts:  # pragma: no cover  # needs a GPU
    """Compile a tiny kernel with Triton alone, without Inductor, and run it."""
    import torch

    version = import_module("triton").__version__
    with _workspace(tempfile.gettempdir()) as directory:
        os.environ["TRITON_CACHE_DIR"] = str(Path(directory, "triton"))
        Path(directory, "compile_retry_doctor_kernel.py").write_text(_KERNEL)
        sys.path.insert(0, directory)
        begin = time.monotonic()
        x = torch.zeros(32, device="cuda")
        import_module("compile_retry_doctor_kernel").add[1,](x, 42, 32)
        if x.tolist() != [42.0] * 32:
            return {"version": version, "error": "a kernel gives wrong results"}
        return {"version": version, "seconds": time.monotonic() - begin}


def _gpu_compile() -> Facts:  # pragma: no cover  # needs a GPU
    return _compile_afresh("cuda")


def _elsewhere() -> Facts:
    """Compile the graph that is always the same, in a new directory; if that fails, without precompiled headers."""
    with _workspace(tempfile.gettempdir()) as directory:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
        if "TRITON_CACHE_DIR" in os.environ:
            os.environ["TRITON_CACHE_DIR"] = str(Path(directory, "triton"))
        from compile_retry._torch import inductor

        try:
            return _compile_and_compare(0.5, "cpu")
        except Exception:
            headers = inductor.header_directory()
            if headers is None:
                raise
            with inductor.caching_in(directory):
                return {**_compile_and_compare(0.5, "cpu"), "without headers": headers}


# By the name of the check.
_LOOK = {
    "import torch": _import_torch,
    "versions": _versions,
    "cache directory": _cache_directory,
    "temporary directory": _temporary_directory,
    "C++ compiler": _compiler,
    "vector instructions": _vector_instructions,
}
_STEPS: dict[str, dict[str, Callable[[], Facts]]] = {
    "look": _LOOK,
    "compile": {**_LOOK, "compile": _compile, "cached compile": _cached_compile},
    "gpu": {
        "GPU": _gpu,
        "GPU memory": _gpu_memory,
        "ptxas": _ptxas,
        "Triton": _triton,
        "GPU compile": _gpu_compile,
    },
    "elsewhere": {"elsewhere": _elsewhere},
}


def _describe(exc: BaseException) -> str:
    root = root_cause(exc)
    text = str(root)
    return f"{qualified_name(root).removeprefix('builtins.')}: {_complaint(text)}".removesuffix(": ")


def _complaint(text: str) -> str:
    """Return the most useful line: a compiler's first error, or else the first line."""
    lines = [line.strip() for line in text.rpartition("Output:\n")[2].splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else "")[:300]


@contextmanager
def _workspace(parent: str) -> Iterator[str]:
    """Create a directory and remove it in the end, even after SIGTERM, which this process turns into an exception."""
    with tempfile.TemporaryDirectory(prefix="compile_retry_doctor_", dir=parent, ignore_cleanup_errors=True) as name:
        yield name


def _leave_with_the_parent(parent: int) -> None:
    """Wait until the parent's end of the pipe is closed, however the parent ends. Then end the process group."""
    os.read(parent, 1)
    if sys.platform == "win32":
        os._exit(1)
    os.killpg(0, signal.SIGTERM)  # compilers remove their temporary files, and the main thread its directories
    time.sleep(2)  # time to do so
    os.killpg(0, signal.SIGKILL)  # pragma: no cover  # kills the process that measures coverage


def _own_streams() -> tuple[int, int]:
    """Reserve standard input and output for the protocol. Redirect printed output to standard error."""
    own = os.dup(0), os.dup(1)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return own


def main(mode: str) -> None:
    """Run the steps of this mode, and report their facts."""
    parent, output = _own_streams()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_leave_with_the_parent, args=[parent], daemon=True).start()

    def report(**line: object) -> None:
        os.write(output, json.dumps(line).encode() + b"\n")

    for name, take in _STEPS[mode].items():
        report(step=name)
        try:
            facts = take()
        except Exception as exc:
            facts = {"error": _describe(exc)}
        report(step=name, facts=facts)
        if name in ("import torch", "versions") and "error" in facts:  # torch was not imported, or only in part
            return
        if name == "GPU" and facts.get("device") != "cuda":
            return


if __name__ == "__main__":  # pragma: no branch  # it is not imported
    main(sys.argv[1])
