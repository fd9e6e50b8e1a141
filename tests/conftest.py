from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import structlog
import torch

import compile_retry
from compile_retry import instrumentation

# By default, each run draws the same examples and does not shrink failing ones, which takes longer than a test may.
# HYPOTHESIS_PROFILE=long draws many more, random examples, and shrinks them.
NOT_SHRUNK = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, database=None, phases=NOT_SHRUNK)
hypothesis.settings.register_profile("long", derandomize=False, max_examples=5000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _fresh_torch() -> Iterator[None]:
    """Start each test without compiled code, without log output from torch, and without strict mode."""
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    torch.manual_seed(0)
    with compile_retry.set_strict(False):
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a separate Inductor cache for this run, so that code compiled by other runs cannot hide a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c() -> None:
    """Let tests be interrupted by SIGINT, even if a shell started them in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# These variables make coverage measure child processes.
_MEASURED = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_PROCESS")}


@pytest.fixture(autouse=True, scope="session")
def _unmeasured() -> Iterator[None]:
    """Do not measure child processes: it is slow, and coverage's tracer keeps objects alive."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _MEASURED:
            patch.delenv(name)
        yield


@pytest.fixture(autouse=True, scope="session")
def _measured_threads() -> Iterator[None]:
    """Measure threads that the library starts without `threading.Thread`, too."""
    start = _thread.start_new_thread

    def start_traced(function: Callable[..., object], args: tuple[Any, ...]) -> int:
        def traced() -> None:
            sys.settrace(threading.gettrace())
            function(*args)

        return start(traced, ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", start_traced)
        yield


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure child processes, for tests that run code in them that runs nowhere else."""
    for name, value in _MEASURED.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def integrations() -> Iterator[None]:
    """Afterwards, enable all integrations and undo the configuration of structlog, which `capture_logs` changes."""
    yield
    instrumentation.enable()
    structlog.reset_defaults()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Make this process the only rank of a group."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
