"""Starts integrations at the first event, and turns them on and off. Importing it imports none of their packages."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Protocol

from compile_retry._locks import Lock
from compile_retry.events import AttemptStarted, Event, Hook, Hooks, first_hooks, log

from ._logging import write_line


class Integration(Hook, Protocol):
    """A hook that passes events to one package."""

    def start(self) -> None:
        """Start, before the first event and again after each `stop`."""

    def stop(self) -> None:
        """Stop, and leave nothing behind."""


def _structlog() -> Integration:
    from ._structlog import Structlog

    return Structlog()


def _prometheus() -> Integration:
    from ._prometheus import Prometheus

    return Prometheus()


def _opentelemetry() -> Integration:
    from ._opentelemetry import OpenTelemetry

    return OpenTelemetry()


def _ignore(event: Event) -> None: ...


class Switch:
    """Calls one integration while it is on, and another hook while it is off.

    Args:
        name: The integration's public name.
        make: Imports the package and creates the integration.
        modules: The modules whose absence means that the package is not installed.
        otherwise: The hook to call while the integration is off.
    """

    def __init__(self, name: str, make: Callable[[], Integration], *modules: str, otherwise: Hook = _ignore) -> None:
        self.name = name
        self.wanted = True
        self._make = make
        self._modules = modules
        self._otherwise = otherwise
        self._integration: Integration | None = None
        self._hook = otherwise

    @property
    def running(self) -> bool:
        return self._hook is not self._otherwise

    def start(self) -> None:
        try:
            self._integration = self._integration or self._make()
            self._integration.start()
        except Exception as exc:
            if not (isinstance(exc, ModuleNotFoundError) and exc.name in self._modules):
                log.exception("the integration with %s could not be started and is disabled", self.name)
        else:
            self._hook = self._integration

    def stop(self) -> None:
        if self._integration is not None and self.running:
            self._hook = self._otherwise
            self._integration.stop()

    def __call__(self, event: Event) -> None:
        self._hook(event)

    def __repr__(self) -> str:
        return f"the integration with {self.name}"


class Switchboard:
    """Passes each event to all integrations, and starts them before the first one."""

    def __init__(self, *switches: Switch) -> None:
        self._switches = {switch.name: switch for switch in switches}
        self._hooks = Hooks()
        for switch in switches:
            self._hooks.register(switch)
        self._lock = Lock()
        self._settled = False  # starting has been tried for all wanted integrations
        self._early: deque[Event] = deque()

    def __call__(self, event: Event) -> None:
        """Pass on an event, after the earlier ones that had to wait for the integrations to start."""
        if not self._settled:
            if isinstance(event, AttemptStarted):  # torch holds its compile lock: do not import now
                self._early.append(event)
                return
            self._settle()
        while True:
            try:
                early = self._early.popleft()
            except IndexError:  # checking first would race with other threads
                break
            self._hooks.tell(early)
        self._hooks.tell(event)

    def _settle(self) -> None:
        with self._lock:
            if self._settled:  # another thread was faster
                return
            before = random.getstate()  # importing structlog imports rich, which draws random numbers
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


_switchboard = Switchboard(
    Switch("structlog", _structlog, "structlog", otherwise=write_line),
    Switch("prometheus", _prometheus, "prometheus_client"),
    Switch("opentelemetry", _opentelemetry, "opentelemetry", "opentelemetry.metrics", "opentelemetry.trace"),
)
first_hooks.register(_switchboard)


def disable(*names: str) -> None:
    """Disable integrations in this process, until they are enabled again.

    Before the first event, this keeps their packages from being imported. Later, it unregisters everything that they
    have registered. OpenTelemetry's instruments remain, but report nothing.

    Args:
        names: The names of the integrations; by default all.

    Raises:
        ValueError: A name is unknown.
    """
    _switchboard.switch(names, on=False)


def enable(*names: str) -> None:
    """Enable integrations again, from the next event on. Those that could not be started are tried once more.

    Args:
        names: The names of the integrations; by default all.

    Raises:
        ValueError: A name is unknown.
    """
    _switchboard.switch(names, on=True)


def active() -> tuple[str, ...]:
    """Return the names of the running integrations. None runs before the first event."""
    return _switchboard.active()
