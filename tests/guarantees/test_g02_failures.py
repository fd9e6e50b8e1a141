"""G2: the kinds of failures. A table of real failures, class by class, transient or permanent."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import errno
import subprocess
from typing import Any

import pytest
import torch
import torch._dynamo.exc as dynamo
import torch._inductor.exc as inductor
from torch._inductor.compile_worker.subproc_pool import SubprocException
from torch._inductor.select_algorithm import NoValidChoicesError

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, is_transient
from compile_retry._failures import is_fatal, root_cause
from compile_retry.testing import FakeClock, broken_compiler
from support import Compiler


def named(name: str, *bases: type[Exception]) -> Exception:
    """Return an exception of a class that exists only on machines with a GPU."""
    cls: type[Exception] = type(name, bases or (RuntimeError,), {})
    return cls("simulated")


TRANSIENT = [
    *(
        OSError(code, "simulated")
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.EBUSY, errno.ESTALE)
    ),
    FileNotFoundError(2, "No such file", "/tmp/torchinductor/x.py"),
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("std::bad_alloc"),
    concurrent.futures.process.BrokenProcessPool("a worker died"),
    SubprocException("traceback"),
    TimeoutError(),
    concurrent.futures.CancelledError(),
    inductor.InvalidCxxCompiler(),
    inductor.CppCompileError(["g++"], "killed"),
    named("PTXASError"),
    RuntimeError("Failed to import /tmp/x.py\nSyntaxError: invalid syntax"),
    RuntimeError("anything"),
    AssertionError(),
    KeyError("k"),
    dynamo.InternalTorchDynamoError("a data race"),
]
PERMANENT = [
    NotImplementedError("no lowering"),
    dynamo.Unsupported("graph break"),
    dynamo.UserError(dynamo.UserErrorType.INVALID_INPUT, "user"),
    dynamo.UncapturedHigherOrderOpError("hop"),
    dynamo.FailOnRecompileLimitHit("limit"),
    dynamo.InvalidBackend("nope"),
    inductor.TritonMissing(None),
    inductor.GPUTooOldForTriton(type("P", (), {"name": "K80", "major": 3, "minor": 7})(), None),
    NoValidChoicesError("none"),
    inductor.LoweringException(RuntimeError("bug"), "op", [], {}),
    named("OutOfResources", Exception),
]
FATAL = [
    RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors"),
    RuntimeError("CUDA error: misaligned address"),
    RuntimeError("CUDA error: device-side assert triggered"),
    named("AcceleratorError"),
]


def wrapped(exc: Exception) -> list[BaseException]:
    """Return the exception in each of torch's wrappers."""
    by_cause = RuntimeError("wrapper")
    by_cause.__cause__ = exc
    internal = dynamo.InternalTorchDynamoError("wrapper")
    internal.__context__ = exc
    return [
        exc,
        inductor.InductorError(exc, None),
        dynamo.BackendCompilerFailed(len, exc, None),
        dynamo.BackendCompilerFailed(len, inductor.InductorError(exc, None), None),
        by_cause,
        internal,
    ]


def ids(value: Any) -> str:
    return f"{type(value).__name__}-{getattr(value, 'errno', None) or str(value)[:20]}"


@pytest.mark.parametrize("exc", TRANSIENT, ids=ids)
def test_transient(exc: Exception) -> None:
    """These failures are transient, whatever wraps them."""
    for way in wrapped(exc):
        assert root_cause(way) is exc
        assert is_transient(way)


@pytest.mark.parametrize("exc", PERMANENT, ids=ids)
def test_permanent(exc: Exception) -> None:
    """These failures are permanent, whatever wraps them."""
    for way in wrapped(exc):
        assert not is_transient(way)
        assert not is_fatal(way)


@pytest.mark.parametrize("exc", FATAL, ids=ids)
def test_fatal(exc: Exception) -> None:
    """After these failures, eager execution cannot continue either."""
    for way in wrapped(exc):
        assert is_fatal(way)
        assert not is_transient(way)
    fn = compile_with_fallback(lambda x: x.sin(), backend=Compiler(lambda inputs: exc))
    with pytest.raises(Exception, match=str(exc)[:20]):
        fn(torch.ones(2))
    assert fn.stats.failures == 0


def test_fatal_in_torch_compile_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fatal error in torch.compile() reaches the caller, too."""

    def broken(*args: object, **kwargs: object) -> None:
        raise FATAL[0]

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        compile_with_fallback(lambda x: x.sin(), backend="eager")(torch.ones(2))


def test_a_lowering_that_failed_for_a_transient_reason() -> None:
    """If Inductor wraps an error that occurred during autotuning, the cause decides."""

    def lower() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as exc:
            raise inductor.LoweringException(exc, "op", [], {}) from None

    with pytest.raises(inductor.LoweringException) as caught:
        lower()
    assert is_transient(caught.value)


def test_cyclic_causes() -> None:
    """A cycle of causes does not hang the classification."""
    a, b = RuntimeError("a"), RuntimeError("b")
    a.__cause__, b.__cause__ = b, a
    assert root_cause(a) is b


@pytest.mark.parametrize("exc", [*TRANSIENT, *PERMANENT], ids=ids)
def test_every_failure_is_survived(exc: Exception) -> None:
    """Every failure is survived: a transient one is retried, and a permanent one is given up."""
    left = 2

    def fails(inputs: list[Any]) -> Exception | None:
        nonlocal left
        left -= 1
        return exc if left >= 0 else None

    fn = compile_with_fallback(lambda x: x.sin(), backend=Compiler(fails), policy=RetryPolicy(wait=None, wait_calls=1))
    x = torch.ones(3)
    for _ in range(4):
        torch.testing.assert_close(fn(x), x.sin())
    if exc in TRANSIENT:
        assert (fn.state, fn.stats.failures) == (CompileState.COMPILED, 2)
    else:
        assert (fn.state, fn.stats.failures) == (CompileState.GAVE_UP, 1)


@pytest.mark.long
def test_a_really_broken_compiler(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a working C++ compiler, Inductor fails. After the repair, the code uses vector instructions."""
    from torch._inductor import cpu_vec_isa

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    healthy = [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()]
    clock = FakeClock()
    fn = compile_with_fallback(lambda x: (x.sin() * x.exp()).sum(), policy=RetryPolicy(wait=10, clock=clock))
    x = torch.randn(1000, requires_grad=True)
    with broken_compiler():
        for _ in range(3):
            torch.testing.assert_close(fn(x), (x.sin() * x.exp()).sum())
            clock.advance(10)
    assert fn.state is CompileState.FALLBACK
    assert fn.last_failure is not None
    assert fn.last_failure.kind == "transient"
    assert "CompileError" in fn.last_failure.error_type or "InvalidCxx" in fn.last_failure.error_type
    fn(x).backward()
    assert (fn.state, fn.stats.failures, fn.stats.recoveries) == (CompileState.COMPILED, 3, 1)
    assert [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()] == healthy


@pytest.mark.long
def test_a_compiler_that_breaks_later(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor caches the failure of a kernel. After the repair, the next attempt compiles it anyway."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiler, broken = tmp_path / "c++", tmp_path / "broken"
    compiler.write_text(
        f'#!/bin/sh\n[ -e {broken} ] && {{ echo "virtual memory exhausted" >&2; exit 1; }}\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    fn = compile_with_fallback(lambda x: x.cos() * x.tanh(), dynamic=False, policy=RetryPolicy(wait=None, wait_calls=1))
    with torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}):
        fn(torch.randn(64))
        assert fn.state is CompileState.COMPILED
        broken.touch()
        x = torch.randn(128)
        torch.testing.assert_close(fn(x), x.cos() * x.tanh())
        assert str(fn.last_failure) == "torch._inductor.exc.CppCompileError: virtual memory exhausted"
        torch.testing.assert_close(fn(x), x.cos() * x.tanh())
        assert fn.stats.failures == 2
        broken.unlink()
        fn(x)
    assert (fn.state, fn.stats.recoveries) == (CompileState.COMPILED, 1)


def test_the_broken_compiler() -> None:
    """While the block runs, Inductor uses a compiler that always fails."""
    before = torch._inductor.config.cpp.cxx
    with broken_compiler():
        compiler = str(torch._inductor.config.cpp.cxx[-1])
        done = subprocess.run([compiler], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "compile_retry: this compiler is broken\n")
    assert torch._inductor.config.cpp.cxx == before


def test_fake_clock() -> None:
    """The clock moves only when advanced, and only forward."""
    clock = FakeClock(5)
    clock.advance(2.5)
    assert clock() == 7.5
    with pytest.raises(ValueError, match="seconds must not be negative, not -1"):
        clock.advance(-1)
