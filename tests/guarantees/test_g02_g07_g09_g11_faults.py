"""G2, G7, G9 and G11 with real faults: the part of the fault matrix that CI runs. `make faults` runs all of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults import cells, injected
from faults.faults import BY_NAME, POSITIONS


@pytest.fixture(scope="module", autouse=True)
def _clean_up() -> Iterator[None]:
    yield
    cells.clean_up()


CELLS = [
    ("full disk", "first call", "seconds"),
    ("full disk", "backward", "every call"),
    ("read-only cache", "recompile", "every call"),
    ("cache directory cannot be created", "first call", "every call"),
    ("too many open files", "second graph", "every call"),
    ("compiler killed", "recompile", "doubling calls"),
    ("compiler fails at invocation 1", "backward", "every call"),
]


@pytest.mark.long
@pytest.mark.parametrize(("fault", "position", "policy"), CELLS, ids=map("-".join, CELLS))
def test_real_fault(fault: str, position: str, policy: str) -> None:
    """The run continues, equals its eager twin, and runs compiled code after the fault as if nothing had happened."""
    if BY_NAME[fault].tmpfs is not None and not cells.can_mount():
        pytest.skip("a full or read-only disk is a tmpfs, and to mount one needs root")
    answer = cells.run_cell(fault, position, policy, probed=True)
    assert answer["outcome"] in {"recovered", "worked around"}, answer
    assert answer["failures"] >= 1
    assert answer["recoveries"] == 1
    assert {cause["kind"] for cause in answer["causes"]} == {"transient"}


OUTCOMES = {
    **dict.fromkeys(injected.TRANSIENT, "recovers"),
    **dict.fromkeys(injected.PERMANENT, "gives up, as documented"),
    **dict.fromkeys(injected.FATAL, "surfaces"),
}
ONE_OF_EACH_KIND = ["torch.OutOfMemoryError", "OutOfResources", "AcceleratorError"]
every_position = pytest.mark.parametrize("position", POSITIONS)


@every_position
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_injected_fault(name: str, position: str) -> None:
    """Each kind of fault has its outcome: recovery, giving up, or, if eager cannot run either, an error."""
    assert injected.run(name, position) == OUTCOMES[name]


@pytest.mark.long
@every_position
@pytest.mark.parametrize("name", [name for name in OUTCOMES if name not in ONE_OF_EACH_KIND])
def test_every_injected_fault(name: str, position: str) -> None:
    """All other faults have the outcome of their kind, too."""
    assert injected.run(name, position) == OUTCOMES[name]
