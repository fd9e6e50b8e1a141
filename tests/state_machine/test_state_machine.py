"""Everything at once, in any order: a training step, its eager twin and a reference model, driven by Hypothesis.

`make test` makes the same few runs every time, and `make test-all` the same twenty. To search for new failures, for as
long as you like::

    HYPOTHESIS_PROFILE=long python -m pytest -o faulthandler_timeout=0 tests/state_machine -k at_length

A failing run is printed as a sequence of calls. Turn it into a separate test in test_counter_examples.py.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from reference_model import SCHEDULES, Config, Model
from training_bench import (
    PERMANENT,
    Bench,
    Fault,
    Subject,
    Trouble,
    armed,
    assert_same,
    decorated,
    deep,
    expected_graphs,
    flat,
    in_thread_or_not,
    perform,
)

from compile_retry import CompileState, CompileStats
from compile_retry._compile.sharing import start_anew
from compile_retry.events import Event
from compile_retry.testing import FakeClock, record_events
from support import process_state

NAME = "step"
DUE_MOMENTS = 6
MOST_SUBJECTS = 3


# The chances are uneven on purpose: a failed frame must be called again, or it is never retried.
configs = st.builds(
    Config,
    rows=st.sampled_from([3, 3, 3, 5]),
    grad=st.sampled_from([True, True, True, False]),
    training=st.sampled_from([True, True, True, False]),
    tag=st.sampled_from(["plain", "plain", "plain", "other"]),
)
many_configs = st.lists(
    st.builds(Config, st.sampled_from([3, 5]), st.booleans(), st.booleans(), st.sampled_from(["plain", "other"])),
    min_size=5,
    max_size=12,
)
subjects = st.sampled_from([0, 0, 0, 1, 2])
errors = st.sampled_from([Trouble("no", 1), OSError(28, "No space left on device"), NotImplementedError("not this")])
graphs = st.sampled_from([None, "sin", "cos", "tanh", "sigmoid"])
faults = st.builds(
    Fault,
    stage=st.sampled_from(["backend", "backend", "trace", "torch.compile"]),
    kind=st.sampled_from([OSError, OSError, MemoryError, *PERMANENT]),
    graph=graphs,
    rows=st.sampled_from([None, None, 3]),
    tag=st.sampled_from([None, None, "plain"]),
    times=st.sampled_from([1, 2, 10**9]),
)
moments = st.tuples(
    configs, st.none() | faults, st.sampled_from([0.0, 10.0, 100.0]), st.sampled_from([False, False, True])
)
interventions = st.sampled_from(["retry_now", "retry_now", "reset", "torch._dynamo.reset"])


class TrainingMachine(RuleBasedStateMachine):
    """Calls of up to three decorated steps, most of which share, while faults come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.clock = FakeClock()
        self.bench = Bench(self.clock)
        self.subjects: list[Subject] = []
        self.seed = 0
        self.stack.enter_context(self.bench.installed())
        self.events: list[Event] = self.stack.enter_context(record_events(NAME))
        self.overruled = 0  # number of events when the user last changed the state, which is not an event

    @initialize(
        body=st.sampled_from([flat, deep, deep]),
        as_module=st.booleans(),
        schedule=st.sampled_from(sorted(SCHEDULES)),
        seconds=st.sampled_from([0.0, 2.0, 2.0]),
        functions=st.sampled_from([1, 2, 3]),
    )
    def decorate(
        self,
        body: Callable[..., torch.Tensor],
        as_module: bool,
        schedule: str,
        seconds: float,
        functions: int,
    ) -> None:
        self.bench.seconds = seconds
        self.schedule = SCHEDULES[schedule].with_clock(self.clock)
        self.newest = Model(self.schedule)
        self.body, self.as_module = body, as_module
        torch.manual_seed(1)
        for _ in range(functions):
            self.subjects.append(self.new_subject())

    # Calls

    @rule(which=subjects, config=configs, in_thread=st.booleans(), times=st.sampled_from([1, 2, 3, 6]))
    def steps(self, which: int, config: Config, in_thread: bool, times: int) -> None:
        for _ in range(times):
            self.check_step(self.subject(which), config, in_thread=in_thread)

    @rule(which=subjects, config=configs, fault=faults, times=st.sampled_from([1, 2, 5, 70]))
    def steps_with_a_fault(self, which: int, config: Config, fault: Fault, times: int) -> None:
        self.bench.fault = copy.copy(fault)
        for _ in range(times):
            self.check_step(self.subject(which), config)

    @rule(which=subjects, moments=st.lists(moments, min_size=4, max_size=8))
    def a_bad_hour(self, which: int, moments: list[tuple[Config, Fault | None, float, bool]]) -> None:
        """Make calls with changing faults, and with errors of the program in between."""
        for config, fault, seconds, raises in moments:
            self.bench.fault = copy.copy(fault) or self.bench.fault
            self.clock.advance(seconds)
            if raises:
                self.a_step_raises(which, config, "between", Trouble("no", 2))
            else:
                self.check_step(self.subject(which), config)

    @rule(which=subjects, configs=many_configs, stage=st.sampled_from(["backend", "trace"]), graph=st.none() | graphs)
    def nothing_can_be_compiled(self, which: int, configs: list[Config], stage: str, graph: str | None) -> None:
        """Let all graphs fail permanently, or one graph for all arguments."""
        self.bench.fault = Fault(stage, NotImplementedError, graph)
        for config in configs:
            self.check_step(self.subject(which), config)

    @rule(which=subjects, one=configs, other=configs, seconds=st.sampled_from([0.0, 4.0, 10.0]))
    def steps_in_turn(self, which: int, one: Config, other: Config, seconds: float) -> None:
        for config in (one, other) * 3:
            self.clock.advance(seconds)
            self.check_step(self.subject(which), config)

    @rule(which=subjects, config=configs, place=st.sampled_from(["first", "between", "second"]), error=errors)
    def a_step_raises(self, which: int, config: Config, place: str, error: BaseException) -> None:
        """Raise before, between or after the step's graphs. Dynamo sees the first and the last error."""
        if place == "between":
            armed.append(error)
        else:
            config = replace(config, tag=f"raise {place}")
        try:
            self.check_step(self.subject(which), config)
        finally:
            armed.clear()

    @rule(which=subjects, config=configs, meanwhile=st.sampled_from(["nothing", "repair", "retry_now", "reset"]))
    def a_checkpointed_step(self, which: int, config: Config, meanwhile: str) -> None:
        self.check_checkpointed(self.subject(which), replace(config, grad=True), meanwhile)

    # Faults, repairs and interventions

    @rule(fault=faults)
    def break_it(self, fault: Fault) -> None:
        self.bench.fault = copy.copy(fault)

    @precondition(lambda self: self.bench.fault)
    @rule()
    def repair_it(self) -> None:
        self.bench.fault = None

    @rule(seconds=st.sampled_from([4.0, 10.0, 40.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.check_books()

    @rule(which=subjects, what=interventions)
    def intervene(self, which: int, what: str) -> None:
        subject = self.subject(which)
        if what == "torch._dynamo.reset":
            torch._dynamo.reset()
            for each in self.subjects:
                each.model.dynamo_reset()
        else:
            subject.tell(what)
        assert what != "reset" or subject.fn.last_failure is None
        self.check_books()

    @rule(which=subjects, copied=st.booleans(), apart=st.sampled_from([False, False, True]))
    def decorate_another(self, which: int, copied: bool, apart: bool) -> None:
        """Make a function that shares with those decorated last, unless Dynamo was reset since then.

        Functions that do not share have a budget of their own here: the model does not know that of the process.
        """
        if len(self.subjects) == MOST_SUBJECTS:
            self.drop_last()
        if apart or not self.newest.takes_more:
            start_anew()
            self.newest = Model(self.schedule)
        self.subjects.append(self.subject(which).copied(self.newest) if copied else self.new_subject())
        self.check_books()

    def new_subject(self) -> Subject:
        options = {"backend": self.bench, "dynamic": False, "policy": self.schedule.policy, "name": NAME}
        return decorated(self.body, self.newest, as_module=self.as_module, **options)

    def drop_last(self) -> None:
        subject = self.subjects.pop()
        subject.model.functions.remove(subject.books)
        del subject
        gc.collect()

    # Checks

    def subject(self, which: int) -> Subject:
        return self.subjects[which % len(self.subjects)]

    def check_step(self, subject: Subject, config: Config, *, in_thread: bool = False) -> None:
        """Run one step and its twin's, and compare everything."""
        eager = perform(partial(subject.body, subject.twin), subject.twin, config, self.seed)
        model, before, expected = subject.model, process_state(), expected_graphs(subject.body, config)
        state, known = subject.fn.state, len(self.events)
        with self.checking(subject) as runs:
            model.begin(config, subject.books)
            ours = in_thread_or_not(lambda: perform(subject.call, subject.net, config, self.seed), in_thread=in_thread)
            model.end(expected, runs, raised=ours.error is not None)
        assert process_state() == before
        assert len(self.events) > known or subject.fn.state in (state, CompileState.GAVE_UP)
        assert_same(ours, eager, subject)

    def check_checkpointed(self, subject: Subject, config: Config, meanwhile: str) -> None:
        """Run a checkpointed step, which calls the function again in the backward pass, with an action in between."""
        eager = perform(partial(subject.body, subject.twin), subject.twin, config, self.seed, lambda: None)
        model, forward, expected = subject.model, list[str](), expected_graphs(subject.body, config)

        def between_the_passes() -> None:
            forward.extend(runs)
            runs.clear()
            model.end(expected, forward, raised=False)
            self.meanwhile(subject, meanwhile)
            model.begin(config, subject.books, in_backward=True)

        with self.checking(subject) as runs:
            model.begin(config, subject.books)
            ours = perform(subject.call, subject.net, config, self.seed, between_the_passes)
            # checkpoint() ends the recomputation by raising as soon as it has all saved tensors.
            model.end(expected, runs, raised=True)
        assert_same(ours, eager, subject)
        assert runs == forward, (runs, forward)

    def meanwhile(self, subject: Subject, what: str) -> None:
        if what == "repair":
            self.bench.fault = None
            self.clock.advance(40)
        elif what != "nothing":
            subject.tell(what)
            self.overruled = len(self.events)

    @contextmanager
    def checking(self, subject: Subject) -> Iterator[list[str]]:
        """Check the statistics after a call. Yields the list of graphs whose compiled code runs in it."""
        stats, calls, known = subject.fn.stats, subject.model.calls, len(self.events)
        self.bench.model, self.bench.runs = subject.model, []
        try:
            yield self.bench.runs
        finally:
            self.bench.model = None
        subject.update()
        self.seed += 1
        self.check_books()
        self.check_transitions(self.events[known:], subject, calls, stats)

    def check_books(self) -> None:
        for subject in self.subjects:
            fn, model, books = subject.fn, subject.model, subject.books
            assert not model.complaints, model.complaints
            books.clear_up(fn.stats.compiled_calls)
            stats = fn.stats.as_dict()
            counted = {name: stats[name] for name in books.as_dict()}
            assert counted == books.as_dict(), (counted, books)
            assert fn.state is model.state, (fn.state, model.state)
            assert fn.next_retry == model.next_retry, (fn.next_retry, model.next_retry)
            assert fn.last_failure is None or fn.last_failure.call <= model.calls

    def check_transitions(self, events: list[Event], subject: Subject, calls: int, before: CompileStats) -> None:
        kinds, fn, model = [event.kind for event in events], subject.fn, subject.model
        assert kinds.count("failed") == fn.stats.failures - before.failures
        assert kinds.count("recovered") == fn.stats.recoveries - before.recoveries
        assert all(calls < event.call <= model.calls for event in events)
        assert all(event.functions == len(model.functions) for event in events)
        if len(self.events) > self.overruled:
            assert not events or events[-1].state in (fn.state, CompileState.FALLBACK)

    def come_back(self, model: Model, *subjects: Subject) -> None:
        """After the repair, everything that was ever called is compiled within a number of due moments."""
        self.bench.fault = None
        calls = [(subject, config) for subject in subjects for config in model.seen]
        if model.waits_out_of_reach:
            subjects[0].tell("retry_now")
        for _ in range(DUE_MOMENTS):
            self.make_due(subjects[0])
            for subject, config in calls:
                self.check_step(subject, config)
            if model.episode is None:
                break
        assert model.episode is None
        subjects[0].tell("retry_now")
        for subject, config in calls:
            self.check_step(subject, config)
        assert model.state is (CompileState.COMPILED if model.has_code else CompileState.PENDING)

    def make_due(self, subject: Subject) -> None:
        if subject.fn.state is CompileState.GAVE_UP:
            subject.tell("retry_now")
        if (retry := subject.fn.next_retry) is not None:
            self.clock.advance(max(100.0, retry.seconds or 0.0, retry.at_least))
        while (retry := subject.fn.next_retry) is not None and retry.seconds is None and (retry.calls or 0) > 1:
            self.check_step(subject, next(iter(subject.model.seen)))

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                for model in {id(subject.model): subject.model for subject in self.subjects}.values():
                    self.come_back(model, *(subject for subject in self.subjects if subject.model is model))
        finally:
            self.stack.close()
            torch._dynamo.reset()


def train(machine: type[TrainingMachine], runs: int) -> None:
    profile = hypothesis.settings()
    settings = hypothesis.settings(
        max_examples=runs if profile.derandomize else profile.max_examples,
        stateful_step_count=25,
        suppress_health_check=list(hypothesis.HealthCheck),  # compiling makes it slow
    )
    run_state_machine_as_test(machine, settings=settings)


def test_training() -> None:
    """A few runs find no failure."""
    train(TrainingMachine, 4)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_training_at_length(part: int) -> None:
    """Many runs, in parts with different draws, find no failure."""
    train(type(f"TrainingMachine{part}", (TrainingMachine,), {}), 5)
