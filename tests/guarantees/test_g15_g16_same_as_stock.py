"""Many small programs behave as under stock torch.compile while healthy, and as in eager after a failure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from compile_retry import CompileState
from programs import PROGRAMS
from programs.program import Program
from programs.runs import ROUNDS, Raised, Run, Seen, Work, difference, eagerly, ours, stock
from support import no_log_records

# Prototype features warn, and a warning turned into an error would be an additional exception in the program.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with no_log_records():
        yield


class Baselines(NamedTuple):
    """A program's runs without the library."""

    eager: Run
    stock: Run

    def differences(self) -> list[str]:
        """Return the calls in which stock torch.compile differs from eager."""
        pairs = enumerate(zip(self.eager.seen, self.stock.seen, strict=True), 1)
        return [found for n, (a, b) in pairs if (found := difference(a, b, f"call {n}"))]

    def expected(self, call: int, ran_as: str) -> tuple[Seen, ...]:
        """Return the correct outcomes for a call.

        If the call ran eagerly, or raises in eager, that is eager's: stock may wrap the exception. Otherwise it is
        stock's, or eager's, because a retry compiles later than stock does, and a part of the call may have run
        eagerly.
        """
        eager, stock = self.eager.seen[call], self.stock.seen[call]
        return (eager,) if ran_as == "eager" or isinstance(eager.result, Raised) else (stock, eager)

    def wrong(self, run: Run) -> list[str]:
        """Return the first call of a run whose outcome is not correct."""
        for call, (seen, ran_as) in enumerate(zip(run.seen, run.ran_as, strict=True)):
            found = [difference(seen, right) for right in self.expected(call, ran_as)]
            if all(found):
                return [f"call {call + 1} ({ran_as}){found[0]}"]
        return []

    def raised_by_stock(self, call: int) -> bool:
        """Return True if stock raises an error that eager does not, so that the library runs the call eagerly."""
        eager, stock = self.eager.seen[call].result, self.stock.seen[call].result
        return isinstance(stock, Raised) and difference(eager, stock) is not None

    def other_work(self, run: Run) -> list[str]:
        """Return the calls in which the numbers of attempts, graphs run or graph breaks differ from stock's."""
        return [
            f"call {call + 1}: {ours}, stock {stock}"
            for call, (ours, stock) in enumerate(zip(run.work, self.stock.work, strict=True))
            if ours != stock and not self.raised_by_stock(call)
        ]

    def not_recovered(self, run: Run, program: Program) -> list[str]:
        """Return what is wrong if the last round runs fewer graphs than stock, or if the state is wrong.

        If stock runs no graphs any more, the state may be any except FALLBACK.
        """
        ours, stock = last_round(run), last_round(self.stock)
        problems = []
        if ours.ran < stock.ran if program.given_up else ours != stock:
            problems.append(f"last round {ours}, stock {stock}")
        if (run.state is not CompileState.COMPILED) if stock.ran else (run.state is CompileState.FALLBACK):
            problems.append(f"ends as {run.state}, last failure {run.last_failure}")
        return problems

    def failures(self, run: Run, attempt: int) -> int:
        """Return the number of failures to be counted: 1, or 0 if the attempt is in a call that raises in eager too."""
        made = itertools.accumulate(work.asked for work in run.work)
        call = next((call for call, total in enumerate(made) if total >= attempt), None)
        return 0 if call is not None and isinstance(self.eager.seen[call].result, Raised) else 1


def parameter(program: Program) -> pytest.ParameterSet:
    """Return a test parameter. Programs for Inductor are marked as long."""
    marks = [pytest.mark.long] if program.backend == "inductor" else []
    return pytest.param(program, id=program.name, marks=marks)


def first_round(run: Run) -> list[Work]:
    return run.work[: len(run.work) // ROUNDS]


def last_round(run: Run) -> Work:
    """Return the sums of the compiler's work over the calls of the last round."""
    return Work(*map(sum, zip(*run.work[-len(run.work) // ROUNDS :], strict=True)))


def attempts_of_first_round(known: Baselines) -> list[int]:
    """Return the numbers of the attempts that stock makes in the first round."""
    return list(range(1, 1 + sum(work.asked for work in first_round(known.stock))))


def wrong_while_healthy(program: Program, known: Baselines) -> list[str]:
    """Return what a healthy run does differently from stock: outcomes, compiles, graph breaks or graphs run."""
    run = ours(program)
    problems = known.wrong(run)
    if not program.given_up:
        problems += known.other_work(run)
    elif not any(ours.ran > stock.ran for ours, stock in zip(run.work, known.stock.work, strict=True)):
        problems.append("no call runs more graphs than under stock")
    return problems


def wrong_after_a_failure(program: Program, known: Baselines, attempt: int) -> list[str]:
    """Return what is wrong after a failed attempt: outcomes, or the graphs that the last of three rounds runs."""
    run = ours(program, failing=attempt)
    problems = known.wrong(run)
    if any(known.raised_by_stock(call) for call in range(len(run.work))):  # permanent, so it is given up
        return problems
    problems += known.not_recovered(run, program)
    if run.failures != known.failures(run, attempt):
        problems.append(f"{run.failures} failures are booked, last {run.last_failure}")
    return problems


@pytest.mark.parametrize("program", [parameter(program) for program in PROGRAMS])
def test_program(program: Program, subtests: pytest.Subtests) -> None:
    """A program behaves as under stock torch.compile, and after a failed compile as in eager."""
    known = Baselines(eagerly(program), stock(program))
    with subtests.test("stock is eager, or the program says why it is not"):
        found = known.differences()
        assert bool(found) == bool(program.differs), found
    with subtests.test("healthy"):
        problems = wrong_while_healthy(program, known)
        assert not problems, "\n".join(problems)
    attempts = attempts_of_first_round(known)
    for attempt in dict.fromkeys(attempts[:1] + attempts[-1:]):
        with subtests.test("failing", attempt=attempt):
            problems = wrong_after_a_failure(program, known, attempt)
            assert not problems, "\n".join(problems)


@pytest.mark.long
@pytest.mark.parametrize("program", [parameter(program) for program in PROGRAMS])
def test_attempts_in_between(program: Program, subtests: pytest.Subtests) -> None:
    """The same holds if an attempt fails that is neither the first nor the last one of a round."""
    known = Baselines(eagerly(program), stock(program))
    for attempt in attempts_of_first_round(known)[1:-1]:
        with subtests.test("failing", attempt=attempt):
            problems = wrong_after_a_failure(program, known, attempt)
            assert not problems, "\n".join(problems)
