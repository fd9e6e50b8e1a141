"""Many small programs: healthy as under stock torch.compile, with failures as in eager, and compiled again afterwards."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from compile_retry import CompileState
from programs import PROGRAMS
from programs.program import Program
from programs.runs import ROUNDS, Raised, Run, Seen, difference, eagerly, ours, stock
from support import no_log_records

# Prototype features warn, and as an error a warning would be one more exception of the program's.
pytestmark = pytest.mark.filterwarnings("ignore")

every_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with no_log_records():
        yield


class Baselines(NamedTuple):
    """A program's runs without the library."""

    eager: Run
    stock: Run

    def differences(self) -> list[str]:
        """The calls in which stock torch.compile does not do what eager does."""
        pairs = enumerate(zip(self.eager.seen, self.stock.seen, strict=True), 1)
        return [found for n, (a, b) in pairs if (found := difference(a, b, f"call {n}"))]

    def expected(self, call: int, ran_as: str) -> tuple[Seen, ...]:
        """The outcomes that are right for a call: more than one only where it ran partly compiled.

        An exception of eager's is always right: stock may wrap it.
        """
        eager, stock = self.eager.seen[call], self.stock.seen[call]
        if ran_as == "eager" or isinstance(eager.result, Raised):
            return (eager,)
        return (stock,) if ran_as == "compiled" else (eager, stock)

    def wrong(self, run: Run) -> list[str]:
        """The calls of a run whose outcome is not right."""
        problems = []
        for call, (seen, ran_as) in enumerate(zip(run.seen, run.ran_as, strict=True)):
            found = [difference(seen, right) for right in self.expected(call, ran_as)]
            if all(found):
                problems.append(f"call {call + 1} ({ran_as}){found[0]}")
        return problems

    def raised_by_stock(self, call: int) -> bool:
        """True where stock raises an error that is not eager's, and the library runs the call eagerly."""
        eager, stock = self.eager.seen[call].result, self.stock.seen[call].result
        return isinstance(stock, Raised) and difference(eager, stock) is not None

    def other_work(self, run: Run, *, calls: range) -> list[str]:
        """The calls in which a run asks the compiler for other graphs, runs others or breaks elsewhere than stock."""
        pairs = [(call, run.work[call], self.stock.work[call]) for call in calls if not self.raised_by_stock(call)]
        return [f"call {call + 1}: {ours}, stock {stock}" for call, ours, stock in pairs if ours != stock]

    def failures(self, run: Run, attempt: int) -> int:
        """The failures to be booked: one, or none if the attempt is made in a call that raises in eager too."""
        made = itertools.accumulate(work.asked for work in run.work)
        call = next((call for call, total in enumerate(made) if total >= attempt), None)
        return 0 if call is None or isinstance(self.eager.seen[call].result, Raised) else 1


@functools.cache
def baselines(program: Program) -> Baselines:
    return Baselines(eagerly(program), stock(program))


def attempts_to_fail(known: Baselines) -> list[int]:
    """The first two attempts that stock makes, and the last."""
    made = sum(work.asked for work in known.stock.work)
    return sorted({1, 2, made} & set(range(1, made + 1)))


@every_program
def test_stock_is_eager(program: Program) -> None:
    """Stock torch.compile does what eager does, or the program says why it does not."""
    found = baselines(program).differences()
    assert bool(found) == bool(program.differs), found


@every_program
def test_healthy(program: Program) -> None:
    """A healthy program compiles, breaks and runs as many graphs as under stock torch.compile, and does the same."""
    known = baselines(program)
    run = ours(program)
    problems = known.wrong(run) + known.other_work(run, calls=range(len(run.work)))
    assert not problems, "\n".join(problems)


@every_program
def test_failing(program: Program) -> None:
    """A failed attempt changes no outcome, and afterwards each graph is compiled that stock compiles."""
    known = baselines(program)
    problems = []
    for attempt in attempts_to_fail(known):
        run = ours(program, failing=attempt)
        calls = len(run.work)
        found = known.wrong(run) + known.other_work(run, calls=range(calls - calls // ROUNDS, calls))
        if any(known.raised_by_stock(call) for call in range(calls)):
            pass  # what stock cannot compile is permanent: it is given up
        elif (run.state, run.failures) != (CompileState.COMPILED, known.failures(run, attempt)):
            found.append(f"ends as {run.state} with {run.failures} failures, last {run.last_failure}")
        problems += [f"attempt {attempt}: {text}" for text in found]
    assert not problems, "\n".join(problems)
