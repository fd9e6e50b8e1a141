"""The pytest plugin of compile-retry: fixtures for `compile_retry.testing`.

pytest imports the plugins of all installed packages at start-up, in every project. A module inside the package
`compile_retry` would import the package and torch, even if no test uses them, and before coverage is measured. So this
is a separate module next to the package, and only the fixtures import the package. Disable the plugin with
`pytest -p no:compile_retry`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from compile_retry.events import Event
    from compile_retry.testing import FakeClock, Faults

__all__ = ["compile_clock", "compile_events", "compile_faults", "compile_strict"]


def pytest_runtest_teardown() -> None:
    """Keep functions of later tests from sharing compiled code, or a hold-off, with those of this test."""
    sharing = sys.modules.get("compile_retry._compile.sharing")
    if sharing is not None:
        sharing.start_anew()


@pytest.fixture
def compile_faults() -> Iterator[Callable[..., Faults]]:
    """Make compile attempts fail until the test ends. Takes the arguments of `compile_retry.testing.fail_compiles`."""
    from compile_retry.testing import fail_compiles

    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(fail_compiles(*args, **kwargs))


@pytest.fixture
def compile_clock() -> FakeClock:
    """A clock for `RetryPolicy(clock=...)` that stands still until you advance it."""
    from compile_retry.testing import FakeClock

    return FakeClock()


@pytest.fixture
def compile_events() -> Iterator[list[Event]]:
    """The events of all decorated functions since the test began: see `compile_retry.events`."""
    from compile_retry.testing import record_events

    with record_events() as events:
        yield events


@pytest.fixture
def compile_strict() -> Iterator[Callable[[bool], None]]:
    """Turn strict mode on or off until the test ends."""
    from compile_retry import set_strict

    with ExitStack() as stack:
        yield lambda enabled: stack.enter_context(set_strict(enabled))
