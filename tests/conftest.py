from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import structlog
import torch

import compile_retry
from compile_retry import instrumentation

# By default each run draws the same examples, and shows a failure as it is: to find a shorter one takes longer than a
# test may. HYPOTHESIS_PROFILE=long draws others, many more, and shortens them.
UNSHORTENED = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, database=None, phases=UNSHORTENED)
hypothesis.settings.register_profile("long", derandomize=False, max_examples=5000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _fresh_torch() -> Iterator[None]:
    """Each test starts without compiled code, without log output from torch, and without strict mode."""
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    torch.manual_seed(0)
    with compile_retry.set_strict(False):
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Inductor caches in a directory of this run: what other runs compiled must not hide a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c() -> None:
    """A shell has what it starts in the background ignore it; tests are interrupted all the same."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# With these, coverage tells a process that starts to measure itself.
_MEASURED = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_PROCESS")}


@pytest.fixture(autouse=True, scope="session")
def _unmeasured() -> Iterator[None]:
    """Processes that tests start are not measured: that is slow, and coverage's tracer keeps objects."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _MEASURED:
            patch.delenv(name)
        yield


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure them all the same: for tests in whose processes code runs that runs nowhere else."""
    for name, value in _MEASURED.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def integrations() -> Iterator[None]:
    """Everything is on, and structlog as if nobody had configured it, which `capture_logs` does."""
    yield
    instrumentation.enable()
    structlog.reset_defaults()
