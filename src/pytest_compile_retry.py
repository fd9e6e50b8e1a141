"""The pytest plugin of compile-retry: fixtures round `compile_retry.testing`.

pytest imports the plugins of all installed packages at start-up, in every project. A module of the package
`compile_retry` would bring the package and torch with it, whether a test uses them or not, and before coverage is
measured. Therefore this is a module of its own next to the package, and imports the package within the fixtures.
`pytest -p no:compile_retry` goes without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from compile_retry.events import Event
    from compile_retry.testing import FakeClock, Faults

__all__ = ["compile_clock", "compile_events", "compile_faults", "compile_strict"]


@pytest.fixture
def compile_faults() -> Iterator[Callable[..., Faults]]:
    """Make compile attempts fail until the test ends: takes what `compile_retry.testing.fail_compiles` takes."""
    from compile_retry.testing import fail_compiles

    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(fail_compiles(*args, **kwargs))


@pytest.fixture
def compile_clock() -> FakeClock:
    """A clock that only moves when it is told to, for `RetryPolicy(clock=...)`."""
    from compile_retry.testing import FakeClock

    return FakeClock()


@pytest.fixture
def compile_events() -> Iterator[list[Event]]:
    """The events of all decorated functions since the test began, see `compile_retry.events`."""
    from compile_retry.testing import record_events

    with record_events() as events:
        yield events


@pytest.fixture
def compile_strict() -> Iterator[Callable[[bool], None]]:
    """Switch strict mode on or off until the test ends."""
    from compile_retry import set_strict

    with ExitStack() as stack:
        yield lambda enabled: stack.enter_context(set_strict(enabled))
