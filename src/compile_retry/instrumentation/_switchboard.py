"""Which integrations there are, which of them run, and what becomes of one that fails. Imports no package of theirs."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from compile_retry._locks import Lock

if TYPE_CHECKING:
    from compile_retry.events import Event

log = logging.getLogger("compile_retry")


class Integration(Protocol):
    """Between this library and one package."""

    def start(self) -> None:
        """Called before the first event, and again after each `stop`."""

    def stop(self) -> None:
        """Called when it is disabled: leave nothing behind."""

    def tell(self, event: Event, level: int | None) -> bool:
        """Called with each event and the level of its log line; returns whether that line is not needed any more."""


def _structlog() -> Integration:
    from ._structlog import Structlog

    return Structlog()


def _prometheus() -> Integration:
    from ._prometheus import Prometheus

    return Prometheus()


def _opentelemetry() -> Integration:
    from ._opentelemetry import OpenTelemetry

    return OpenTelemetry()


class Switch:
    """One integration, on or off."""

    def __init__(self, name: str, make: Callable[[], Integration], *modules: str) -> None:
        self.name = name
        self.wanted = True
        self.running = False
        self._make = make
        self._modules = modules  # if one of these is missing, the package is not installed
        self._integration: Integration | None = None
        self._has_failed = False

    def start(self) -> None:
        try:
            self._integration = self._integration or self._make()
            self._integration.start()
            self.running = True
        except Exception as exc:
            if not (isinstance(exc, ModuleNotFoundError) and exc.name in self._modules):
                log.exception("the integration with %s cannot be started and is left out", self.name)

    def stop(self) -> None:
        if self._integration is not None and self.running:
            self.running = False
            self._integration.stop()

    def tell(self, event: Event, level: int | None) -> bool:
        try:
            return self.running and self._integration is not None and self._integration.tell(event, level)
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                log.exception("the integration with %s failed on %r; further failures are not logged", self.name, event)
            return False


class Switchboard:
    """All integrations."""

    def __init__(self, *switches: Switch) -> None:
        self._switches = {switch.name: switch for switch in switches}
        self._lock = Lock()
        self._settled = False  # all that are wanted have been started, as far as they can be
        self._early: deque[Event] = deque()

    def tell(self, event: Event, level: int | None) -> bool:
        """Hand an event on. Whether it needs no line in the log any more."""
        if not self._settled:
            if event.kind == "attempt started":  # torch holds the lock under which it compiles: no time for imports
                self._early.append(event)
                return False
            self._settle()
        while True:
            try:
                early = self._early.popleft()
            except IndexError:  # none is left; not asked before, as another thread could take it meanwhile
                break
            self._hand_on(early, None)
        return self._hand_on(event, level)

    def _hand_on(self, event: Event, level: int | None) -> bool:
        return sum(switch.tell(event, level) for switch in self._switches.values()) > 0  # not any(): all are told

    def _settle(self) -> None:
        with self._lock:
            if self._settled:  # another thread was faster
                return
            before = random.getstate()  # rich, which structlog imports, draws from it when it is imported
            try:
                for switch in self._switches.values():
                    if switch.wanted and not switch.running:
                        switch.start()
            finally:
                random.setstate(before)
            self._settled = True

    def switch(self, names: tuple[str, ...], *, on: bool) -> None:
        if unknown := set(names) - set(self._switches):
            known = ", ".join(map(repr, self._switches))
            raise ValueError(f"names must be among {known}, not {', '.join(map(repr, sorted(unknown, key=repr)))}")
        with self._lock:
            for name in names or self._switches:
                switch = self._switches[name]
                switch.wanted = on
                if not on:
                    switch.stop()
            self._settled = self._settled and not on

    def active(self) -> tuple[str, ...]:
        return tuple(switch.name for switch in self._switches.values() if switch.running)


switchboard = Switchboard(
    Switch("structlog", _structlog, "structlog"),
    Switch("prometheus", _prometheus, "prometheus_client"),
    Switch("opentelemetry", _opentelemetry, "opentelemetry", "opentelemetry.metrics", "opentelemetry.trace"),
)


def disable(*names: str) -> None:
    """Turn integrations off, in this process, until they are enabled again.

    Before the first event it keeps their packages from being imported. After it, what they have registered with their
    package is taken back; OpenTelemetry's instruments stay, and are silent.

    Args:
        names: Which; all if none is named.

    Raises:
        ValueError: There is no integration of such a name.
    """
    switchboard.switch(names, on=False)


def enable(*names: str) -> None:
    """Turn integrations on again, with the next event. One whose package could not be imported is tried once more.

    Args:
        names: Which; all if none is named.

    Raises:
        ValueError: There is no integration of such a name.
    """
    switchboard.switch(names, on=True)


def active() -> tuple[str, ...]:
    """The names of the integrations that run: none before the first event."""
    return switchboard.active()
