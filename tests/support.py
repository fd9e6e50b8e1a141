"""Shared test helpers: a compiler that fails on request, and a training step with its eager twin."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule

import compile_retry


class Compiler:
    """A backend that runs graphs as they are, counts its attempts and runs, and fails on request.

    `fails` takes the example inputs and returns the exception to raise, or None. Torch calls a backend's `reset`, if it
    has one; tests may set it.
    """

    reset: Callable[[], None]

    def __init__(self, fails: Callable[[list[Any]], Exception | None] = lambda inputs: None) -> None:
        self.fails = fails
        self.asked = 0
        self.ran = 0

    def __call__(self, graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.asked += 1
        if (exc := self.fails(inputs)) is not None:
            raise exc

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph_module.forward(*args)

        return run


def full_disk(inputs: object = None) -> OSError:
    return OSError(28, "No space left on device")


def first(n: int, exc: Callable[[], Exception] = full_disk) -> Callable[[list[Any]], Exception | None]:
    """Fail the first n attempts."""
    left = [n]

    def fails(inputs: list[Any]) -> Exception | None:
        left[0] -= 1
        return exc() if left[0] >= 0 else None

    return fails


def rows(n: int, exc: Callable[[], Exception] = full_disk) -> Callable[[list[Any]], Exception | None]:
    """Fail every graph that has an input of n rows."""

    def fails(inputs: list[Any]) -> Exception | None:
        hit = any(isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == n for x in inputs)
        return exc() if hit else None

    return fails


@contextmanager
def dynamo_fails_in(name: str, exc: Exception, times: int = 10**9) -> Iterator[list[str]]:
    """Make Dynamo raise when it translates a frame whose function's name contains `name`."""
    run, failed = InstructionTranslator.run, list[str]()

    def failing_run(self: InstructionTranslator) -> None:
        if name in self.f_code.co_name and len(failed) < times:
            failed.append(self.f_code.co_name)
            raise exc
        run(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InstructionTranslator, "run", failing_run)
        yield failed


class Trainer:
    """A small network with BatchNorm, dropout and momentum, its optimizer, and a count of its steps."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.Dropout(0.3),
            torch.nn.ReLU(),
            torch.nn.Linear(8, 1),
        )
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.steps = 0

    def twin(self) -> Trainer:
        return copy.deepcopy(self)

    def state(self) -> dict[str, torch.Tensor]:
        momentum = {
            f"momentum{i}": state["momentum_buffer"]
            for i, state in self.optimizer.state_dict()["state"].items()
            if state.get("momentum_buffer") is not None
        }
        return {**self.net.state_dict(), **momentum}


def assert_twins(a: Trainer, b: Trainer) -> None:
    assert a.steps == b.steps
    torch.testing.assert_close(a.state(), b.state())


def wait_until_in(thread: threading.Thread, function: str) -> None:
    """Spin until the thread runs a function of this name, directly or further up its stack."""
    for _ in range(10**7):
        frame = sys._current_frames().get(thread.ident or 0)
        while frame is not None:
            if frame.f_code.co_name == function:
                return
            frame = frame.f_back
    raise AssertionError(f"{thread.name} never came to {function}()")


def wait_until_waiting(thread: threading.Thread) -> None:
    """Return when the thread has stayed at one instruction for a while, so it is waiting."""
    before, looks = None, 0
    while looks < 100:
        assert thread.is_alive(), f"{thread.name} is over"
        frame = sys._current_frames().get(thread.ident or 0)
        now = frame and (frame.f_code, frame.f_lasti)
        before, looks = now, looks + 1 if now == before else 0
        time.sleep(0.001)  # lets the other thread run; there is no event to wait for


LIBRARY = str(Path(compile_retry.__file__).parent)


class Moment:
    """The moment of a thread's `at`-th entry into any of the library's functions."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.came = False

    @contextmanager
    def doing(self, action: Callable[[], object]) -> Iterator[None]:
        """Run `action` at this moment of the block. The block raises what it raises."""
        sys.setprofile(partial(self._enter, action))
        try:
            yield
        finally:
            sys.setprofile(None)

    def _enter(self, action: Callable[[], object], frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(LIBRARY):
            self._left -= 1
            if self._left == 0:
                self.came = True
                action()


def moments() -> Iterator[Moment]:
    """Yield every moment of a call, one after the other, until the call ends before the moment comes."""
    for at in itertools.count(1):
        moment = Moment(at)
        yield moment
        if not moment.came:
            assert at > 4, "such a call goes through no more functions than a fast one"
            return


def process_state() -> list[Any]:
    """Return process-wide state that a call must not change, except torch's generator: a training step may draw."""
    return [
        dict(torch._dynamo.config.get_config_copy()),
        dict(torch._functorch.config.get_config_copy()),
        dict(torch._inductor.config.get_config_copy()),
        dict(os.environ),
        random.getstate(),
        torch._dynamo.eval_frame._stance,
        torch.is_grad_enabled(),
    ]


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Let `gc.collect()` see only objects made in the block. Otherwise it takes half a second, for all of torch's."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def no_log_records() -> Iterator[None]:
    """Disable logging, because pytest would keep all records, and torch's trace logger writes a hundred per attempt."""
    logging.disable()
    logging.getLogger("torch.__trace").disabled = True
    yield
    logging.getLogger("torch.__trace").disabled = False
    logging.disable(logging.NOTSET)


def train(model: torch.nn.Module, steps: int = 6) -> list[torch.Tensor]:
    """Return the losses of a few steps with plain gradient descent, and the final parameters. Batches are 4 x 8."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(4, 8, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach() for parameter in model.parameters())]
