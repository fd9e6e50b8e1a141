"""Real faults on a GPU. Each test runs a day of training in a fresh process: broken, then repaired."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BROKEN = """#!/bin/sh
[ -e "{flag}" ] && {{ echo "told to fail" >&2; exit 1; }}
exec {real} "$@"
"""


def run(folder: Path, code: str, **environment: str) -> str:
    """Run code in a fresh process with an empty cache. Return what it prints."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "FLAG": str(folder / "broken"),
        **environment,
    }
    prelude = """
import os, pathlib, torch
from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import record_events
from gpu.day import DEVICE, EVERY_CALL, Day
flag = pathlib.Path(os.environ["FLAG"])
"""
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], env=variables, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BREAK_AND_REPAIR = """
day = Day()
day.train(2)
day.assert_fell_back()
flag.unlink()
day.train(2)
day.assert_recovered()
"""


def break_program(folder: Path, name: str, real: str) -> str:
    """Install a script that fails while the flag exists. Return its path."""
    (folder / "broken").touch()
    script = folder / name
    script.write_text(BROKEN.format(flag=folder / "broken", real=real))
    script.chmod(0o755)
    return str(script)


def ptxas() -> str:
    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas")


@pytest.mark.parametrize("threads", ["1", "4"], ids=["in the process", "in workers"])
def test_ptxas(tmp_path: Path, threads: str) -> None:
    """`ptxas` fails, in this process or in worker processes, and is repaired."""
    script = break_program(tmp_path, "ptxas", ptxas())
    run(tmp_path, BREAK_AND_REPAIR, TRITON_PTXAS_PATH=script, TORCHINDUCTOR_COMPILE_THREADS=threads)


def test_the_compiler_for_launchers(tmp_path: Path) -> None:
    """The C compiler that Triton builds its driver and launchers with fails, and is repaired."""
    real = shutil.which("gcc") or shutil.which("cc")
    assert real is not None
    run(tmp_path, BREAK_AND_REPAIR, CC=break_program(tmp_path, "gcc", real))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_full_disk(tmp_path: Path) -> None:
    """The disk under the cache is full, and then has room."""
    disk = tmp_path / "cache"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=True)
    try:
        code = BREAK_AND_REPAIR.replace("flag.unlink()", f"os.system('mount -o remount,size=900m {disk}')")
        run(tmp_path, code, TRITON_CACHE_DIR=str(disk / "triton"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_no_memory_while_tuning(tmp_path: Path) -> None:
    """No candidate finds device memory. The retry succeeds, and the tuner's buffers are not kept."""
    run(
        tmp_path,
        """
n = 4096
a, b = torch.randn(n, n, device="cuda"), torch.randn(n, n, device="cuda")
fn = compile_with_fallback(lambda a, b: (a @ b).relu(), mode="max-autotune-no-cudagraphs", policy=EVERY_CALL)
expected = (a @ b).relu()
torch.cuda.empty_cache()
free, _ = torch.cuda.mem_get_info()
hog = torch.empty(free - 5 * a.nbytes // 2, dtype=torch.uint8, device="cuda")  # room for eager only
before = torch.cuda.memory_allocated()
torch.testing.assert_close(fn(a, b), expected, rtol=2e-2, atol=2e-1)
assert (fn.state, fn.last_failure.kind) == (CompileState.FALLBACK, "transient"), (fn.state, fn.last_failure)
assert torch.cuda.memory_allocated() == before, (torch.cuda.memory_allocated(), before)
del hog
torch.cuda.empty_cache()
for _ in range(3):
    torch.testing.assert_close(fn(a, b), expected, rtol=2e-2, atol=2e-1)
assert (fn.state, fn.next_retry) == (CompileState.COMPILED, None), (fn.state, fn.last_failure)
""",
    )


def test_memory_for_some_candidates(tmp_path: Path) -> None:
    """Some candidates fail for lack of memory. The code is used, and tuned again; nothing infinite is stored."""
    run(
        tmp_path,
        """
import json, math
from torch._inductor import select_algorithm
from torch._inductor.select_algorithm import TritonTemplateCaller
benchmark, lacking = TritonTemplateCaller.benchmark, [3]
def fail_thrice(self, *args, out):
    lacking[0] -= 1
    if lacking[0] >= 0:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")  # a real OutOfMemoryError
    return benchmark(self, *args, out=out)
TritonTemplateCaller.benchmark = fail_thrice
a, b = torch.randn(1024, 1024, device="cuda"), torch.randn(1024, 1024, device="cuda")
fn = compile_with_fallback(lambda a, b: (a @ b).relu(), mode="max-autotune-no-cudagraphs", policy=EVERY_CALL)
with record_events(kinds={"partly tuned", "tuned"}) as events:
    fn(a, b)
    assert (fn.state, fn.stats.partly_tuned) == (CompileState.COMPILED, 1), (fn.state, fn.last_failure)
    assert fn.next_retry is not None
    fn(a, b)
partly, tuned = events
assert partly.timed == partly.candidates - 3, partly
assert fn.next_retry is None
stored = "".join(path.read_text() for path in pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).glob("cache/*"))
print("infinite times stored:", stored.count("Infinity"))
""",
    )


def test_a_killed_worker_pool(tmp_path: Path) -> None:
    """The process with Triton's workers is killed between two compiles."""
    run(
        tmp_path,
        """
import signal
from torch._inductor.async_compile import AsyncCompile
day = Day()
day.train()
AsyncCompile.wait_pool_ready() if hasattr(AsyncCompile, "wait_pool_ready") else None
pool = AsyncCompile.process_pool()
if hasattr(pool, "process"):
    os.kill(pool.process.pid, signal.SIGKILL)
    pool.process.wait()
torch._dynamo.reset()
other = compile_with_fallback(lambda x: (x.cos() * x.sigmoid()).sum(-1), policy=EVERY_CALL)
x = torch.randn(64, 333, device=DEVICE)
for _ in range(3):
    torch.testing.assert_close(other(x), (x.cos() * x.sigmoid()).sum(-1))
assert other.state is CompileState.COMPILED, other.last_failure
""",
        TORCHINDUCTOR_COMPILE_THREADS="4",
    )


def test_files_of_another_process(tmp_path: Path) -> None:
    """Another process's generated `.py` files were cut short."""
    run(tmp_path, "day = Day()\nday.train()\n")
    for file in (tmp_path / "cache").rglob("*.py"):
        file.write_bytes(file.read_bytes()[:100])
    run(
        tmp_path,
        """
day = Day()
day.train(4)
assert day.step.state is CompileState.COMPILED, day.step.last_failure
""",
    )


@pytest.mark.parametrize("when", ["while tracing", "in compiled code"])
def test_a_lost_context(tmp_path: Path, when: str) -> None:
    """A device-side assert surfaces as AcceleratorError, once, and nothing is attempted after it."""
    lose = {
        "while tracing": "torch.zeros(3, device='cuda')[torch.tensor([7], device='cuda')]",
        "in compiled code": "fn(x, torch.tensor([7], device='cuda'))",
    }[when]
    run(
        tmp_path,
        f"""
fn = compile_with_fallback(lambda x, i: x.sin()[i].cos(), policy=EVERY_CALL, dynamic=False)
x = torch.randn(3, device="cuda")
fn(x, torch.tensor([1], device="cuda"))
attempts = fn.stats.attempts
try:
    {lose}
    fn(torch.randn(5, device="cuda"), torch.tensor([1], device="cuda"))
    torch.cuda.synchronize()
except RuntimeError as exc:
    assert type(exc).__name__ == "AcceleratorError", type(exc)
    print("surfaced:", str(exc).splitlines()[0])
else:
    raise AssertionError("nothing was raised")
try:
    fn(x, x.new_ones(1, dtype=torch.long))
except RuntimeError as exc:
    assert type(exc).__name__ == "AcceleratorError", type(exc)
assert fn.stats.failures == 0, fn.last_failure
assert fn.stats.attempts == attempts, fn.stats
print(fn.state)
""",
    )


def test_nothing_is_asked_of_the_cpu(tmp_path: Path) -> None:
    """A graph whose kernels are all the GPU's starts no C++ compiler, even with a CPU scalar among its inputs."""
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/runs\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    code = """
fn = compile(lambda x, scale: (x * scale).sin().sum(), dynamic=True)
fn(torch.randn(64, 64, device="cuda"), torch.tensor(2.0))
"""
    runs = {}
    for name, compile_with in (("stock", "torch.compile"), ("ours", "compile_with_fallback")):
        (tmp_path / "runs").write_text("")
        (tmp_path / name).mkdir()
        run(tmp_path / name, f"compile = {compile_with}\n{code}", CXX=str(compiler))
        runs[name] = len((tmp_path / "runs").read_text().splitlines())
    assert runs["ours"] == runs["stock"]
