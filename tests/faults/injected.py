"""Injected faults, which would need a GPU, a network file system or luck: the compiler raises their exceptions."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from compile_retry import CompiledFunction, CompileState, RetryPolicy, compile_with_fallback
from compile_retry.testing import fail_compiles

from .faults import POSITIONS


def named(name: str, *bases: type[Exception]) -> Exception:
    """Return an exception of a class of that name, for real classes that cannot be imported or created."""
    cls: type[Exception] = type(name, bases or (RuntimeError,), {})
    return cls("simulated")


def _os_error(code: int) -> OSError:
    return OSError(code, f"simulated {errno.errorcode[code]}")


TRANSIENT: dict[str, Callable[[], Exception]] = {
    "torch.OutOfMemoryError": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "OSError ENOSPC": lambda: _os_error(errno.ENOSPC),
    "OSError EDQUOT": lambda: _os_error(errno.EDQUOT),
    "OSError EIO": lambda: _os_error(errno.EIO),
    "OSError EMFILE": lambda: _os_error(errno.EMFILE),
    "OSError EBUSY": lambda: _os_error(errno.EBUSY),
    "OSError ESTALE": lambda: _os_error(errno.ESTALE),
    "FileNotFoundError": lambda: FileNotFoundError(errno.ENOENT, "No such file", "/tmp/torchinductor/x.py"),
    "MemoryError": MemoryError,
    "RuntimeError std::bad_alloc": lambda: RuntimeError("std::bad_alloc"),
    "BrokenProcessPool": lambda: concurrent.futures.process.BrokenProcessPool("a worker died"),
    "SubprocException": lambda: named("SubprocException"),
    "TimeoutError": TimeoutError,
    "CancelledError": concurrent.futures.CancelledError,
    "InvalidCxxCompiler": lambda: named("InvalidCxxCompiler"),
    "CppCompileError": lambda: named("CppCompileError"),
    "PTXASError": lambda: named("PTXASError"),
    "SyntaxError of a file in the cache": lambda: SyntaxError("invalid syntax"),
    "InternalTorchDynamoError": lambda: named("InternalTorchDynamoError"),
    "an unknown class": lambda: named("NeverSeenBefore", Exception),
}
PERMANENT: dict[str, Callable[[], Exception]] = {
    "TritonMissing": lambda: named("TritonMissing"),
    "GPUTooOldForTriton": lambda: named("GPUTooOldForTriton"),
    "OutOfResources": lambda: named("OutOfResources", Exception),
    "NoValidChoicesError": lambda: named("NoValidChoicesError"),
    "LoweringException": lambda: named("LoweringException"),
    "NotImplementedError": lambda: NotImplementedError("no lowering"),
}
FATAL: dict[str, Callable[[], Exception]] = {
    "AcceleratorError": lambda: named("AcceleratorError"),
    "CUDA error: an illegal memory access": lambda: RuntimeError(
        "CUDA error: an illegal memory access was encountered"
    ),
    "CUDA error: device-side assert": lambda: RuntimeError("CUDA error: device-side assert triggered"),
}
ALL = {**TRANSIENT, **PERMANENT, **FATAL}
POLICY = RetryPolicy(wait=None, wait_calls=1)
FAILURES = 2

Step = CompiledFunction[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


class Backend:
    """A backend that runs graphs as they are, and whose backward compiler fails on request."""

    def __init__(self) -> None:
        self.raises: Exception | None = None

    def _backward(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        if self.raises is not None:
            raise self.raises.with_traceback(None)
        return make_boxed_func(graph_module.forward)  # type: ignore[no-any-return]  # not annotated

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        compiler = aot_autograd(
            fw_compiler=lambda graph_module, _: make_boxed_func(graph_module.forward), bw_compiler=self._backward
        )
        return compiler(graph_module, inputs)

    @contextmanager
    def failing(self, exc: Exception) -> Iterator[None]:
        self.raises = exc
        try:
            yield
        finally:
            self.raises = None


def _faulty(position: str, exc: Exception, backend: Backend) -> AbstractContextManager[Any]:
    if position == "backward":
        return backend.failing(exc)
    return fail_compiles(exc, graph=2 if position == "second graph" else None)


def run(name: str, position: str) -> str:
    """Run a step whose compiler raises the exception at this position. Return the outcome, if it is the right one."""
    torch._dynamo.reset()
    exc, backend = ALL[name](), Backend()
    weight = torch.ones(3, requires_grad=True)
    mean = torch.zeros(3)

    def eager(x: torch.Tensor, mean: torch.Tensor, log: list[int]) -> torch.Tensor:
        log.append(1)
        mean.add_(x.mean(0))
        h = (x * weight).sin()
        if position == "second graph":
            torch._dynamo.graph_break()
            log.append(2)
        return h.exp().sum()

    step: Step = compile_with_fallback(
        eager, dynamic=False, policy=POLICY, backend=backend if position == "backward" else "eager"
    )
    calls = 0

    def call(rows: int) -> None:
        nonlocal calls
        x, twin_mean, seen, twin_seen = torch.randn(rows, 3), mean.clone(), [0], [0]
        weight.grad = None
        calls += 1
        loss = step(x, mean, seen)
        loss.backward()
        grad, weight.grad = weight.grad, None
        expected = eager(x, twin_mean, twin_seen)
        expected.backward()
        torch.testing.assert_close((loss, grad, mean), (expected, weight.grad, twin_mean))
        assert seen == twin_seen

    rows = 4
    if position == "recompile":
        call(rows)
        rows = 5
    with _faulty(position, exc, backend):
        if name in FATAL:
            with pytest.raises(Exception, match=str(exc)):
                call(rows)
            assert step.stats.failures == 0
            return "surfaces"
        for _ in range(FAILURES):
            call(rows)
    for _ in range(3):
        call(rows)
    assert step.stats.calls == calls
    if name in PERMANENT:
        assert (step.state, step.stats.failures) == (CompileState.GAVE_UP, 1), step.stats
        step.retry_now()
        call(rows)
        assert step.state is CompileState.COMPILED
        return "gives up, as documented"
    assert (step.state, step.stats.failures, step.stats.recoveries) == (CompileState.COMPILED, FAILURES, 1), step.stats
    return "recovers"


def table() -> list[list[str]]:
    return [[f"`{name}`", *(_outcome(name, position) for position in POSITIONS)] for name in ALL]


def _outcome(name: str, position: str) -> str:
    try:
        return run(name, position)
    except Exception as exc:
        return f"**FAILS**: {type(exc).__name__}: {' '.join(str(exc).split())[:80]}"
