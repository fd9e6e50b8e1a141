"""G7: whatever torch remembers of a failure, in the process and on disk, is cleared before the next attempt."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import codecache, cpu_vec_isa
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from compile_retry._failures import suggests_damaged_cache
from compile_retry.testing import fail_compiles, record_events
from support import Compiler, first

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)

needs_vectors = pytest.mark.skipif(
    not getattr(cpu_vec_isa, "x86_isa_checker", list)(), reason="asked of x86 processors with vector instructions only"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Set an empty cache directory, and disable precompiled headers, which take 150 MB each."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        yield tmp_path / "cache"


def waves(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * x.exp() + x


def empty(files: set[Path]) -> None:
    """Replace files by empty ones. Truncating files that this process has loaded would kill it."""
    assert files
    for file in files:
        file.unlink()
        file.touch()


def forget_compiled() -> None:
    """Drop all compiled code, so that it is read from disk again, as in a new process."""
    torch._dynamo.reset()
    torch._inductor.utils.clear_caches()


@pytest.mark.long
def test_a_damaged_cache(cache: Path) -> None:
    """The next attempt uses another directory, reports the damaged one, and leaves it and the environment unchanged."""
    code = """
import torch
from compile_retry import compile_with_fallback
compile_with_fallback(lambda x: x.sin() * x.exp() + x)(torch.ones(64))
"""
    environment = {**os.environ, "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
    empty({*cache.rglob("*.main.so")})
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    fn = compile_with_fallback(waves, policy=EVERY_CALL)
    with record_events(kinds={"failed", "compiled", "cache moved", "recovered"}) as events:
        torch.testing.assert_close(fn(torch.ones(64)), waves(torch.ones(64)))
        assert fn.stats.failures == 1
        environment = dict(os.environ)
        torch.testing.assert_close(fn(torch.ones(64)), waves(torch.ones(64)))
    assert fn.state is CompileState.COMPILED
    assert dict(os.environ) == environment
    assert [t.kind for t in events] == ["failed", "compiled", "cache moved", "recovered"]
    (moved,) = (t for t in events if t.kind == "cache moved")
    assert str(cache) in moved.message
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")}.items() >= files.items()
    # From now on, this process uses the other directory at once.
    other = compile_with_fallback(waves, policy=EVERY_CALL)
    forget_compiled()
    other(torch.ones(64))
    assert (other.stats.failures, other.state) == (0, CompileState.COMPILED)


@pytest.mark.long
def test_an_unusable_cache_directory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt fails, and the next one compiles in another directory."""
    cache.touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache / "below a file"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache / "triton"))
    fn = compile_with_fallback(waves, policy=EVERY_CALL)
    for _ in range(3):
        torch.testing.assert_close(fn(torch.ones(65)), waves(torch.ones(65)))
    assert fn.state is CompileState.COMPILED
    assert fn.last_failure is not None
    assert fn.last_failure.error_type in ("builtins.NotADirectoryError", "builtins.FileExistsError")
    assert os.environ["TRITON_CACHE_DIR"] == str(cache / "triton")


@pytest.mark.long
def test_an_unusable_default_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names no other directory afterwards. (Torch itself may set its default.)"""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    Path(default_cache_dir()).touch()
    fn = compile_with_fallback(waves, policy=EVERY_CALL)
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        for _ in range(3):
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
            torch.testing.assert_close(fn(torch.ones(66)), waves(torch.ones(66)))
            assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir())
    assert fn.state is CompileState.COMPILED


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("variable", ["a file", "unset"])
def test_importing_dynamo_without_a_cache_directory(tmp_path: Path, variable: str) -> None:
    """The import succeeds and changes nothing. With stock torch, this process could never import it again."""
    (tmp_path / "file").touch()
    code = """
import os, sys, torch
from compile_retry import CompileState, RetryPolicy, compile_with_fallback
before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
fn = compile_with_fallback(torch.sin, backend="aot_eager", policy=RetryPolicy(wait=None, wait_calls=1))
assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
for _ in range(4):
    assert torch.equal(fn(torch.ones(3)), torch.ones(3).sin())
assert fn.state is CompileState.COMPILED, fn.last_failure
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    del environment["TORCHINDUCTOR_CACHE_DIR"]
    if variable == "a file":
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "file" / "cache")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.usefixtures("measured")
def test_dynamo_cannot_be_imported_without_any_directory(tmp_path: Path) -> None:
    """If no directory can be created, nothing is imported, not even partly. It recovers once there is room.

    Options cannot be checked either. That is left to the first attempt.
    """
    code = """
import pathlib, sys, tempfile, torch
from compile_retry import CompileState, RetryPolicy, compile_with_fallback
tempfile.tempdir = sys.argv[1]
policy = RetryPolicy(wait=None, wait_calls=1)
fn = compile_with_fallback(torch.sin, backend=lambda graph, inputs: graph.forward, policy=policy)
with_options = compile_with_fallback(torch.sin, mode="default", policy=policy)
for function in fn, with_options:
    assert torch.equal(function(torch.ones(3)), torch.ones(3).sin())
    assert (function.state, function.last_failure.stage) == (CompileState.FALLBACK, "torch.compile")
assert "torch._dynamo" not in sys.modules
pathlib.Path(sys.argv[1]).mkdir()
fn(torch.ones(3))
assert fn.state is CompileState.COMPILED, fn.last_failure
"""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "room")], env=environment, check=True, timeout=300)


@pytest.mark.long
@needs_vectors
def test_a_damaged_probe(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A truncated probe says "no vector instructions" without an error. The library probes again elsewhere."""
    fn = compile_with_fallback(waves, policy=EVERY_CALL)
    with fail_compiles(times=1):
        fn(torch.ones(66)), fn(torch.ones(66))  # the retry probes again, in this cache
    expected = [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()]
    empty({*cache.rglob("*.so")} - {*cache.rglob("*.main.so")})
    for marker in cache.rglob("*.load_ok"):  # with this file, torch (since 2.14) does not load the library again
        marker.unlink()
    fn = compile_with_fallback(lambda x: x.cos() * x.exp(), policy=EVERY_CALL)
    with fail_compiles(times=1), caplog.at_level(logging.WARNING, "compile_retry"):
        fn(torch.ones(67)), fn(torch.ones(67))
    assert fn.state is CompileState.COMPILED
    assert [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()] == expected
    assert f"damaged files in {cache}" in caplog.text


COMPILER = """#!/bin/sh
case "$*" in
    *{lacks}*) echo >>{log}.lacks; echo "error: unrecognized command-line option '{lacks}'" >&2; exit 1 ;;
    *.cpp*)
        echo >>{log}
        if [ "$(wc -l <{log})" -le {fails} ]; then echo "virtual memory exhausted" >&2; exit 1; fi ;;
esac
exec g++ "$@"
"""
PRELUDE = """
import sys, torch
from torch._inductor import cpu_vec_isa
from compile_retry import CompileState, RetryPolicy, compile_with_fallback
def waves(x):
    return x.sin() * x.exp() + x
fn = compile_with_fallback(waves, policy=RetryPolicy(wait=None, wait_calls=1))
x = torch.ones(64)
def found():
    return [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()]
"""


def run_with_compiler(folder: Path, code: str, *, fails: int = 0, lacks: str = "-no-such-option") -> None:
    """Run code in a fresh process with an empty cache, and a compiler that fails its first runs or lacks an option."""
    compiler = folder / "g++"
    compiler.write_text(COMPILER.format(log=folder / "log", fails=fails, lacks=lacks))
    compiler.chmod(0o755)
    environment = {
        **os.environ,
        "CXX": str(compiler),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }
    subprocess.run([sys.executable, "-c", PRELUDE + code], env=environment, check=True, timeout=600)


def supported() -> set[str]:
    return {str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()}


def kernels(folder: Path) -> list[str]:
    """Return the sources of the kernels that Inductor has stored."""
    sources = [path.read_text() for path in (folder / "cache").rglob("*.cpp")]
    return [source for source in sources if "cpp_prefix" in source]


@pytest.mark.long
@pytest.mark.usefixtures("measured")
@needs_vectors
def test_a_probe_that_failed_once(tmp_path: Path) -> None:
    """If the compiler fails once, in the first probe, the probe is repeated, and the first attempt succeeds as usual.

    With stock torch, the code lacks the best vector instructions.
    """
    best = str(cpu_vec_isa.valid_vec_isa_list()[0])
    code = f"""
torch.testing.assert_close(fn(x), waves(x))
assert (fn.state, fn.stats.failures) == (CompileState.COMPILED, 0), fn.last_failure
assert found()[0] == {best!r}, found()
"""
    run_with_compiler(tmp_path, code, fails=1)


@pytest.mark.long
@pytest.mark.usefixtures("measured")
@needs_vectors
def test_a_compiler_that_works_again_after_the_probes(tmp_path: Path) -> None:
    """An attempt fails if a probe fails because the compiler does, even if it could compile slower code by then.

    So no slower code is stored, where later processes would find it.
    """
    best = str(cpu_vec_isa.valid_vec_isa_list()[0])
    code = f"""
fn(x)
assert (fn.state, fn.last_failure.kind) == (CompileState.FALLBACK, "transient")
assert "virtual memory exhausted" in str(fn.last_failure), fn.last_failure
fn(x)
assert (fn.state, fn.stats.failures) == (CompileState.COMPILED, 1)
assert found()[0] == {best!r}, found()
"""
    run_with_compiler(tmp_path, code, fails=2)
    assert kernels(tmp_path)
    assert all("at::vec::" in source for source in kernels(tmp_path))


@pytest.mark.long
@pytest.mark.usefixtures("measured")
@needs_vectors
def test_failed_probes_of_others(tmp_path: Path) -> None:
    """If a stock compile has left the result of failed probes in the process, the first attempt does not use it."""
    best = str(cpu_vec_isa.valid_vec_isa_list()[0])
    code = f"""
assert not found()
fn(x)
assert (fn.state, fn.stats.failures) == (CompileState.COMPILED, 0)
assert found()[0] == {best!r}, found()
"""
    run_with_compiler(tmp_path, code, fails=4)


@pytest.mark.long
@pytest.mark.usefixtures("measured")
@needs_vectors
def test_a_compiler_without_the_best_instructions(tmp_path: Path) -> None:
    """What such a compiler lacks is not a failure. It is asked twice in the process's life and no more."""
    code = """
for x in torch.ones(64), torch.ones(2, 64):
    fn(x)
    assert (fn.state, fn.stats.failures) == (CompileState.COMPILED, 0), fn.last_failure
    assert found() == ["avx2"], found()
"""
    run_with_compiler(tmp_path, code, lacks="-mavx512f")
    assert (tmp_path / "log.lacks").read_text() == "\n" * 2 * len({"avx512", "avx512 avx512_vnni"} & supported())


@pytest.mark.long
@needs_vectors
def test_probes_that_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiler flags of such probes are removed, and the next attempt may fail with the same error."""
    isa = next(isa for isa in cpu_vec_isa.supported_vec_isa_list if hasattr(type(isa), "_arch_flags"))
    monkeypatch.setitem(vars(isa), "_arch_flags", "-left-behind")

    def broken() -> list[Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", broken)
    fn = compile_with_fallback(waves, policy=EVERY_CALL)
    with fail_compiles(times=1):
        fn(torch.ones(70)), fn(torch.ones(70))
    assert "_arch_flags" not in vars(isa)
    assert fn.stats.failures == 2
    isa.__dict__.setdefault("_arch_flags", "")


def test_the_file_of_tuned_timings_is_looked_up_again() -> None:
    """After a failure, the path of their file is looked up again, because it may lead to a damaged place."""
    codecache.CacheBase.get_local_cache_path()
    fn = compile_with_fallback(waves, backend=Compiler(first(1)), policy=EVERY_CALL)
    fn(torch.ones(3)), fn(torch.ones(3))
    assert codecache.CacheBase.get_local_cache_path.cache_info().currsize == 0


@pytest.mark.parametrize(
    ("exc", "attempt", "damaged"),
    [
        (ImportError("/cache/x.so: file too short"), 1, True),
        (SyntaxError("invalid syntax"), 1, True),
        (OSError(30, "Read-only file system"), 1, True),
        (OSError(28, "No space left on device"), 1, False),
        (RuntimeError("Failed to import /cache/x.py"), 1, True),
        (MemoryError(), 2, False),
        (type("Timeout", (TimeoutError,), {"lock_file": "/cache/x.lock"})(), 1, True),
        (TimeoutError("a compile worker"), 1, False),
        (type("CppCompileError", (RuntimeError,), {})("expected unqualified-id"), 1, False),
        (type("CppCompileError", (RuntimeError,), {})("expected unqualified-id"), 2, True),
        (type("CppCompileError", (RuntimeError,), {})("cannot read PCH file"), 1, True),
        (type("CppCompileError", (RuntimeError,), {})("Killed signal terminated program cc1plus"), 2, False),
    ],
)
def test_signs_of_a_damaged_cache(exc: Exception, attempt: int, damaged: bool) -> None:
    """Errors of truncated files and unusable directories count as damage; a compiler error does every second time."""
    assert suggests_damaged_cache(exc, attempt) is damaged


class Pool:
    """A fake pool of compile workers. A dead real one would never answer."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)
        self.was_shut_down = False

    def shutdown(self) -> None:
        self.was_shut_down = True
        raise BrokenPipeError


def dead_process() -> subprocess.Popen[bytes]:
    """Return a real process that was killed: torch's pool holds such an object, which knows how it ended."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    return process


@pytest.mark.parametrize(
    ("make", "dead"),
    [
        (lambda: Pool(process=dead_process(), running=True), True),
        (lambda: Pool(_broken="a worker was killed"), True),
        (lambda: Pool(_broken=False, _shutdown_thread=False), False),
    ],
    ids=["its process is gone", "a worker is gone", "alive"],
)
def test_dead_compile_workers(make: Callable[[], Pool], dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead pools are replaced before an attempt, for both kinds of workers."""
    from torch._inductor import async_compile, compile_fx_subproc

    for owner in (async_compile.AsyncCompile, compile_fx_subproc._SubprocessFxCompile):
        made: list[Pool] = []

        @functools.cache
        def process_pool(made: list[Pool] = made) -> Pool:
            made.append(make())
            return made[-1]

        monkeypatch.setattr(owner, "process_pool", staticmethod(process_pool))
        owner.process_pool()
        compile_with_fallback(lambda x: x + 1, backend=Compiler())(torch.ones(3))
        assert made[0].was_shut_down is dead
        owner.process_pool()
        assert len(made) == 1 + dead
        monkeypatch.undo()


def test_a_graph_compiler_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is replaced after a failure, dead or not, because its caches cannot be reached."""
    from torch._inductor import compile_fx_subproc

    pool = Pool(_broken=False)
    process_pool = functools.cache(lambda: pool)
    monkeypatch.setattr(compile_fx_subproc._SubprocessFxCompile, "process_pool", staticmethod(process_pool))
    process_pool()
    fn = compile_with_fallback(lambda x: x + 1, backend=Compiler(first(1)), policy=EVERY_CALL)
    fn(torch.ones(3))
    assert not pool.was_shut_down
    fn(torch.ones(3))
    assert pool.was_shut_down
    assert process_pool.cache_info().currsize == 0


def test_the_other_directory(tmp_path: Path) -> None:
    """It is made once, and reported. It is removed at exit, but not by a forked child that exits first."""
    code = """
import os, sys, tempfile, torch
from compile_retry import RetryPolicy, compile_with_fallback
from compile_retry.testing import fail_compiles, record_events
fn = compile_with_fallback(torch.sin, backend="aot_eager", policy=RetryPolicy(wait=None, wait_calls=1))
with fail_compiles(ImportError("file too short"), times=1), record_events(kinds={"cache moved"}) as moved:
    fn(torch.ones(3)), fn(torch.ones(3)), fn(torch.ones(3, 3))
assert len(moved) == 1
ours = [f for f in os.listdir(tempfile.gettempdir()) if f.startswith("compile_retry_")]
assert len(ours) == 1, ours
if os.fork() == 0:
    sys.exit()
os.wait()
assert os.path.isdir(os.path.join(tempfile.gettempdir(), ours[0]))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True, timeout=300)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("compile_retry_")]
    shutil.rmtree(tmp_path)
