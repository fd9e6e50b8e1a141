"""G7: code that was chosen while some autotuning candidates could not be timed is tuned again when due."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from tenacity import retry_never, stop_after_attempt
from torch._inductor import select_algorithm
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, set_strict
from compile_retry.events import PartlyTuned, Tuned
from compile_retry.testing import FakeClock, record_events
from support import dynamo_fails_in, full_disk

TWO_CALLS = RetryPolicy(wait=None, wait_calls=2)
EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
X = torch.ones(3)


class Candidate:
    """A candidate, as far as Inductor's autotuning looks at one whose time it knows."""

    failed = False


class Tuner:
    """A backend that has Inductor's autotuning choose from 21 candidates, some of which find no memory.

    The code of each attempt has a number, so that one can see which code runs.
    """

    def __init__(self, lacking: int = 1) -> None:
        self.lacking = lacking
        self.error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.fails: Exception | None = None
        self.meanwhile: Callable[[], None] = lambda: None
        self.asked = 0
        self.ran: list[int] = []

    def __call__(self, graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.asked += 1
        self.meanwhile()
        if self.fails is not None:
            raise self.fails
        candidates: Any = [Candidate() for _ in range(21)]
        select_algorithm._log_autotune_exceptions([(candidate, self.error) for candidate in candidates[: self.lacking]])
        selector = select_algorithm.get_algorithm_selector_cache()
        with mock.patch.object(type(selector), "lookup", lambda self, choices, *_, **__: dict.fromkeys(choices, 1.0)):
            selector.do_autotuning("mm", [], None, None, "inputs", candidates, dict)
        number = self.asked

        def run(*args: Any) -> Any:
            self.ran.append(number)
            return graph_module.forward(*args)

        return run


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def is_settled(fn: Any) -> bool:
    """Return True if it runs compiled code and nothing is to be tuned again."""
    return (fn.state, fn.next_retry) == (CompileState.COMPILED, None)


def call(fn: Any, *, times: int = 1, x: torch.Tensor = X) -> None:
    for _ in range(times):
        assert torch.equal(fn(x), x.sin())


def test_tuned_again_when_due(caplog: pytest.LogCaptureFixture) -> None:
    """The code is used at once, and replaced when an attempt is due and all candidates can be timed."""
    tuner, clock = Tuner(), FakeClock()
    fn = compile_with_fallback(sine, backend=tuner, policy=RetryPolicy(wait=30, clock=clock), name="fn")
    with record_events() as events, caplog.at_level(logging.WARNING, "compile_retry"):
        call(fn)
        assert (fn.state, fn.stats.failures, fn.stats.partly_tuned) == (CompileState.COMPILED, 0, 1)
        assert fn.next_retry is not None
        assert fn.next_retry.seconds == 30
        call(fn, times=5)
        tuner.lacking = 0
        clock.advance(29)
        call(fn)
        clock.advance(1)
        call(fn, times=3)
    assert tuner.ran == [1] * 7 + [2] * 3
    assert is_settled(fn)
    assert (fn.stats.attempts, fn.stats.partly_tuned, fn.stats.compiled_calls) == (2, 1, 10)
    assert [event.kind for event in events] == [
        *("attempt started", "compiled", "partly tuned"),
        *("attempt started", "compiled", "tuned"),
    ]
    partly, tuned = events[2], events[-1]
    assert isinstance(partly, PartlyTuned)
    assert (partly.timed, partly.candidates, partly.call, partly.state) == (20, 21, 1, CompileState.COMPILED)
    assert partly.error == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert partly.next_retry is not None
    assert partly.next_retry.seconds == 30
    assert isinstance(tuned, Tuned)
    first, second = (record.getMessage() for record in caplog.records if record.name == "compile_retry")
    assert "only 20 of 21 autotuning candidates could be timed: torch.OutOfMemoryError: CUDA out of memory" in first
    assert first.endswith("; tuning again in 30 s")
    assert "is tuned in call 8, and all autotuning candidates were timed" in second


def test_every_candidate_is_timed() -> None:
    """Nothing is tuned again if no candidate dropped out, or one that is wrong or too large for the device."""
    tuner = Tuner()
    tuner.error = type("OutOfResources", (Exception,), {})("out of resource: shared memory")
    fn = compile_with_fallback(sine, backend=tuner, policy=EVERY_CALL)
    call(fn, times=3)
    assert (fn.next_retry, fn.stats.partly_tuned, tuner.asked) == (None, 0, 1)


def test_still_no_memory() -> None:
    """If a candidate still cannot be timed, the policy decides about the next attempt. The newest code is used."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=TWO_CALLS)
    call(fn, times=6)
    tuner.lacking = 0
    call(fn, times=4)
    assert tuner.ran == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert (fn.next_retry, fn.stats.attempts, fn.stats.partly_tuned) == (None, 4, 3)


def test_less_memory_than_before() -> None:
    """If fewer candidates were timed than before, the code from before is used, and tuned again."""
    tuner = Tuner(lacking=5)
    fn = compile_with_fallback(sine, backend=tuner, policy=TWO_CALLS)
    call(fn, times=2)
    tuner.lacking = 6
    call(fn, times=2)
    tuner.lacking = 0
    call(fn, times=2)
    assert tuner.ran == [1, 1, 2, 1, 3, 3]
    assert fn.next_retry is None


def test_an_attempt_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """The call in which tuning again fails runs eagerly. From the next one on, the code is used as before."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=TWO_CALLS, name="fn")
    call(fn, times=2)
    tuner.fails = full_disk()
    caplog.clear()
    call(fn, times=2)
    (record,) = (record for record in caplog.records if record.name == "compile_retry")
    assert "OSError: [Errno 28] No space left on device" in record.getMessage()
    assert record.getMessage().endswith("its code stays in use, tuning again in 2 calls")
    assert (fn.state, fn.stats.failures, fn.stats.recoveries) == (CompileState.COMPILED, 1, 0)
    assert fn.last_failure is not None
    assert fn.last_failure.call == 3
    tuner.fails, tuner.lacking = None, 0
    call(fn, times=2)
    assert tuner.ran == [1, 1, 1, 3, 3]
    assert (fn.stats.compiled_calls, fn.stats.eager_calls, fn.next_retry) == (5, 1, None)


def test_a_failure_in_dynamo() -> None:
    """The same holds if Dynamo fails, before there is a graph."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=EVERY_CALL)
    call(fn)
    with dynamo_fails_in("sine", full_disk(), times=1):
        call(fn, times=2)
    assert tuner.ran == [1, 2]
    assert (fn.state, fn.stats.failures) == (CompileState.COMPILED, 1)


def test_a_failure_of_the_program() -> None:
    """If the program raises in the call in which tuning again fails, nothing is counted, and the attempt stays due."""
    tuner, raises = Tuner(), [False]

    def program(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        if raises[0]:
            raise ValueError("the program's own")
        return y

    fn = compile_with_fallback(program, backend=tuner, policy=EVERY_CALL)
    call(fn)
    tuner.fails, raises[0] = full_disk(), True
    with pytest.raises(ValueError, match="the program's own"):
        fn(X)
    assert fn.stats.failures == 0
    tuner.fails, tuner.lacking, raises[0] = None, 0, False
    call(fn)
    assert (fn.state, fn.next_retry, fn.stats.failures) == (CompileState.COMPILED, None, 0)


def test_strict_mode() -> None:
    """In strict mode, tuning again that fails raises. Candidates that cannot be timed do not."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=EVERY_CALL)
    with set_strict(True):
        call(fn)
        tuner.fails = full_disk()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="No space left"):
            fn(X)
    tuner.fails, tuner.lacking = None, 0
    call(fn, times=2)
    assert (tuner.ran[-1], fn.next_retry) == (3, None)


def test_one_frame_at_a_time() -> None:
    """Each due call tunes one frame again. A shape's code is replaced by code for the same shape, in their order."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=RetryPolicy(wait=None, wait_calls=3), dynamic=False)
    y = torch.ones(5)
    call(fn)
    call(fn, x=y)
    assert tuner.ran == [1, 2]
    tuner.ran, tuner.lacking = [], 0
    call(fn, x=y)
    call(fn)
    assert tuner.ran == [2, 1]
    call(fn, x=y)  # due, but it is the turn of the other shape
    call(fn, x=y)
    assert tuner.ran == [2, 1, 2, 3]
    call(fn)
    assert tuner.ran == [2, 1, 2, 3, 4]
    assert fn.next_retry is None
    call(fn)
    call(fn, x=y)
    assert (tuner.ran[-2:], tuner.asked) == ([4, 3], 4)


def test_a_new_shape_in_a_due_call() -> None:
    """A frame that is compiled for the first time in a due call does not cost the other shape its code."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=EVERY_CALL, dynamic=False)
    call(fn)
    tuner.lacking = 0
    call(fn, x=torch.ones(5))
    assert fn.next_retry is not None
    call(fn)
    assert tuner.ran == [1, 2, 3]
    assert is_settled(fn)


def test_dynamic_shapes() -> None:
    """Code for many sizes is replaced by code for many sizes, and stays in use for all of them until then."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=TWO_CALLS, dynamic=True)
    call(fn, x=torch.ones(4))
    call(fn, x=torch.ones(5))
    tuner.fails = full_disk()
    call(fn, x=torch.ones(6))
    call(fn, x=torch.ones(7))
    tuner.fails, tuner.lacking = None, 0
    call(fn, x=torch.ones(8))
    call(fn, x=torch.ones(9))
    assert (tuner.ran, tuner.asked) == ([1, 1, 1, 3, 3], 3)


def test_a_recompile_limit() -> None:
    """Tuning again does not count towards torch's recompile limits."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=EVERY_CALL)
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=2):
        call(fn, times=12)
    assert (fn.state, tuner.ran) == (CompileState.COMPILED, list(range(1, 13)))


def test_activation_checkpointing() -> None:
    """Where a backward pass may repeat the call, it is not tuned again: the frame might run eagerly, this once."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=EVERY_CALL)
    x = torch.ones(3, requires_grad=True)
    fn(x)
    tuner.fails = full_disk()
    for _ in range(3):
        checkpoint(fn, x, use_reentrant=False).sum().backward()
    assert (tuner.asked, set(tuner.ran)) == (1, {1})
    tuner.fails = None
    fn(x)
    assert tuner.asked == 2


@pytest.mark.parametrize("stance", ["fail_on_recompile", "eager_on_recompile"])
def test_stances(stance: str) -> None:
    """Under a stance that forbids recompiles, the code is used as it is."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=EVERY_CALL)
    call(fn)
    with torch.compiler.set_stance(stance):
        call(fn, times=3)
    assert tuner.ran == [1] * 4
    call(fn)
    assert tuner.ran[-1] == 2


def test_without_a_frame() -> None:
    """Code that Dynamo asked for without a frame cannot be tuned again. The log says so."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=EVERY_CALL)
    with torch.compiler.set_stance("eager_then_compile"), record_events(kinds={"partly tuned"}) as events:
        call(fn)
        call(fn, times=3, x=torch.ones(4))
    (event,) = events
    assert event.message.endswith("it will not be tuned again")
    assert (fn.state, fn.next_retry, tuner.asked) == (CompileState.COMPILED, None, 1)


def raising(state: object) -> bool:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "policy",
    [
        RetryPolicy(wait=None, wait_calls=1, retry=retry_never),
        RetryPolicy(wait=None, wait_calls=1, stop=stop_after_attempt(1)),
        RetryPolicy(wait=None, wait_calls=1, retry=raising),
    ],
    ids=["retry", "stop", "raises"],
)
def test_a_policy_without_retries(policy: RetryPolicy) -> None:
    """The policy may decide against another attempt. The code stays."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=policy)
    with record_events(kinds={"partly tuned"}) as events:
        call(fn, times=4)
    (event,) = events
    assert event.message.endswith("it will not be tuned again")
    assert (fn.state, fn.next_retry, tuner.ran) == (CompileState.COMPILED, None, [1] * 4)


@pytest.mark.parametrize("fails", [True, False], ids=["it fails", "no memory"])
def test_a_policy_with_one_retry(fails: bool) -> None:
    """The policy may decide against a third attempt, however the second one has ended."""
    tuner = Tuner()
    decisions = iter([True, False])
    policy = RetryPolicy(wait=None, wait_calls=1, retry=lambda state: next(decisions))
    fn = compile_with_fallback(sine, backend=tuner, policy=policy)
    call(fn)
    tuner.fails = full_disk() if fails else None
    call(fn, times=4)
    assert tuner.asked == 2
    assert tuner.ran == ([1] * 4 if fails else [1, 2, 2, 2, 2])
    assert is_settled(fn)


@pytest.mark.parametrize("method", ["retry_now", "reset"])
def test_requests(method: str) -> None:
    """Both `retry_now` and `reset` make the attempt due at the next call."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=RetryPolicy(wait=3600))
    call(fn, times=2)
    tuner.lacking = 0
    getattr(fn, method)()
    call(fn)
    assert (tuner.ran, fn.next_retry) == ([1, 1, 2], None)


def test_code_that_is_gone() -> None:
    """After `torch._dynamo.reset()` there is nothing to tune again."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=EVERY_CALL)
    call(fn)
    torch._dynamo.reset()
    tuner.lacking = 0
    call(fn, times=3)
    assert (tuner.ran, fn.next_retry) == ([1, 2, 2, 2], None)


def test_a_failure_of_another_shape() -> None:
    """While another shape is held off, nothing is tuned again; its own retry comes first."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=RetryPolicy(wait=None, wait_calls=3), dynamic=False)
    call(fn)
    tuner.fails = full_disk()
    y = torch.ones(5)
    call(fn, x=y)
    assert fn.state is CompileState.FALLBACK
    tuner.fails, tuner.lacking = None, 0
    call(fn, times=2)
    assert tuner.asked == 2
    call(fn, x=y)
    assert (fn.state, tuner.asked) == (CompileState.COMPILED, 3)
    call(fn)
    assert (tuner.asked, fn.next_retry) == (4, None)


def test_a_nested_call() -> None:
    """A call within the one whose turn it is does not take a turn of its own."""
    tuner = Tuner()

    def again(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = fn(x, depth=0)
        return result

    def program(x: torch.Tensor, depth: int = 1) -> torch.Tensor:
        y = x.sin()
        return torch.compiler.disable(again)(x) if depth else y

    fn = compile_with_fallback(program, backend=tuner, policy=EVERY_CALL, dynamic=False)
    call(fn)
    tuner.lacking = 0
    call(fn, times=4)
    assert is_settled(fn)
    asked = tuner.asked
    call(fn, times=2)
    assert tuner.asked == asked


def test_other_threads() -> None:
    """Meanwhile, other threads run the code as it is."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=TWO_CALLS)
    call(fn)

    def call_in_another_thread() -> None:
        thread = threading.Thread(target=call, args=(fn,))
        thread.start()
        thread.join()

    call(fn)
    tuner.lacking, tuner.meanwhile = 0, call_in_another_thread
    call(fn)
    assert (tuner.ran, tuner.asked) == ([1, 1, 1, 2], 2)


def test_a_lost_device() -> None:
    """After the accelerator's context is lost, nothing is tuned again."""
    tuner = Tuner()
    fn = compile_with_fallback(sine, backend=tuner, policy=TWO_CALLS)
    call(fn, times=2)
    tuner.fails = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with pytest.raises(torch.AcceleratorError):
        fn(X)
    assert (fn.state, fn.next_retry) == (CompileState.GAVE_UP, None)
    call(fn, times=4)
    assert tuner.asked == 2
