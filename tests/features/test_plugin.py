"""The pytest plugin, the assertions in `compile_retry.testing`, and the example project that uses both."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tenacity
import torch

from compile_retry import CompileState, RetryPolicy, compile_with_fallback, set_strict
from compile_retry.events import Event
from compile_retry.testing import FakeClock, Faults, assert_compiled, assert_max_attempts, fail_compiles
from support import Compiler, first

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("measured")  # pytest imports plugins before measuring starts

X = torch.ones(3)
EVERY_SECOND_CALL = RetryPolicy(wait=None, wait_calls=2)
PROJECT = Path(__file__).parents[2] / "examples" / "user_project"


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def two_graphs(x: torch.Tensor) -> torch.Tensor:
    x = x.sin()
    torch._dynamo.graph_break()
    return x.cos()


class Net(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    @compile_with_fallback(backend="eager")
    def method(self, x: torch.Tensor) -> torch.Tensor:
        return x.cos()


def why_not_compiled(fn: Any) -> list[str]:
    """Return the lines of the message of `assert_compiled`."""
    with pytest.raises(AssertionError) as raised:
        assert_compiled(fn)
    return str(raised.value).splitlines()


def test_it_costs_nothing_unless_it_is_used(pytester: pytest.Pytester) -> None:
    """If a project does not use the plugin, running pytest imports neither the library nor torch."""
    pytester.makeconftest("""
        import sys

        def pytest_unconfigure(config):
            print("plugin:", config.pluginmanager.has_plugin("compile_retry"))
            print("imported:", sorted({"torch", "tenacity", "compile_retry"} & set(sys.modules)))
    """)
    pytester.makepyfile("def test_nothing(): pass")
    for arguments in (["--collect-only"], []):
        result = pytester.runpytest_subprocess(*arguments)
        assert result.ret == 0
        result.stdout.fnmatch_lines(["plugin: True", "imported: [[][]]"])


def test_tests_do_not_share(pytester: pytest.Pytester) -> None:
    """A function that is decorated in one test does not share with one of a test before it."""
    pytester.makepyfile("""
        import torch
        from compile_retry import CompileState, RetryPolicy, compile_with_fallback
        from compile_retry.testing import fail_compiles

        kept = []

        def decorated():
            kept.append(compile_with_fallback(lambda x: x.sin(), backend="eager", policy=RetryPolicy(wait=1e6)))
            return kept[-1]

        def test_first():
            with fail_compiles(OSError):
                first, second = decorated(), decorated()
                first(torch.ones(3))
            assert second.state is CompileState.FALLBACK

        def test_second():
            fn = decorated()
            fn(torch.ones(3))
            assert fn.state is CompileState.COMPILED
    """)
    pytester.runpytest_subprocess().assert_outcomes(passed=2)


def test_fixtures_end_with_their_test(pytester: pytest.Pytester) -> None:
    """Faults, strict mode and recorded events end with their test, and failed assertions are readable in the report."""
    pytester.makepyfile("""
        import pytest
        import torch
        from compile_retry import CompileState, compile_with_fallback
        from compile_retry.testing import assert_compiled, assert_max_attempts

        X = torch.ones(3)

        @pytest.fixture
        def fn():
            return compile_with_fallback(lambda x: x.sin(), backend="eager", name="fn")

        def test_first(fn, compile_faults, compile_strict, compile_events):
            compile_faults(OSError, function="fn")
            compile_strict(True)
            with pytest.raises(Exception, match="OSError"):
                fn(X)
            assert [event.kind for event in compile_events] == ["attempt started", "failed"]

        def test_second(fn, compile_events):
            fn(X)
            assert fn.state is CompileState.COMPILED
            assert [event.kind for event in compile_events] == ["attempt started", "compiled"]

        def test_assert_compiled(fn):
            assert_compiled(fn)

        def test_assert_max_attempts(fn):
            with assert_max_attempts(0):
                fn(X)
    """)
    result = pytester.runpytest_subprocess("--tb=short")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "E   AssertionError: fn is not compiled. Its state is pending: *",
            "E   AssertionError: Expected no attempt, but 1 was made:",
            "E     fn, call 1, graph 1: compiled in * s",
        ]
    )
    result.stdout.no_fnmatch_line("*/compile_retry/*.py:*")  # the library's frames are hidden


@pytest.mark.long
def test_the_example_project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example project's tests pass in a copy of their own, with COMPILE_RETRY=strict. CI runs them without it."""
    monkeypatch.setenv("COMPILE_RETRY", "strict")
    shutil.copytree(PROJECT, pytester.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    pytester.run(sys.executable, "-m", "pytest").assert_outcomes(passed=4)


def test_the_fixtures_together(
    compile_faults: Callable[..., Faults],
    compile_clock: FakeClock,
    compile_events: list[Event],
    compile_strict: Callable[[bool], None],
) -> None:
    """The fixtures work together: an episode on a fake clock, with two kinds of faults at once."""
    policy = RetryPolicy(wait=60, clock=compile_clock)
    fn = compile_with_fallback(sine, backend=Compiler(), policy=policy, name="fn")
    compile_strict(False)
    full_disk = compile_faults(OSError, times=1, function="fn")
    no_memory = compile_faults(MemoryError, function="other")
    fn(X)
    assert why_not_compiled(fn)[-3] == "The next attempt is due in 60 s."
    compile_clock.advance(60)
    fn(X)
    assert_compiled(fn)
    assert (full_disk.failed, no_memory.failed) == (1, 0)
    assert [event.kind for event in compile_events if event.function == "fn"] == [
        *["attempt started", "failed", "retry scheduled"],
        *["attempt started", "compiled", "recovered"],
    ]


def test_assert_compiled_takes_whatever_was_decorated() -> None:
    """`assert_compiled` takes functions, methods and modules compiled in place, and nothing else."""
    fn, net = compile_with_fallback(sine, backend=Compiler()), compile_with_fallback(Net(), backend=Compiler())
    for decorated in (fn, net, net.method):
        with pytest.raises(AssertionError, match=r"is not compiled\. Its state is pending"):
            assert_compiled(decorated)
        decorated(X)
        assert_compiled(decorated)
    with pytest.raises(TypeError, match=r"a function or module from compile_with_fallback\(\), not <function sine"):
        assert_compiled(sine)
    with pytest.raises(TypeError, match="Net has not been compiled"):
        assert_compiled(Net())


def test_assert_compiled_says_why_not() -> None:
    """The message has the state, the counters, the failure with its frame, the next attempt, and the events."""
    fn = compile_with_fallback(sine, backend=Compiler(first(2)), policy=EVERY_SECOND_CALL, name="step")
    for _ in range(3):
        fn(X)
    frame = f"sine ({__file__}:{sine.__code__.co_firstlineno})"
    error = "OSError: [Errno 28] No space left on device"
    assert why_not_compiled(fn) == [
        "step is not compiled. Its state is fallback: something runs eagerly, and a retry will come.",
        ("Calls: 3 (0 compiled, 0 mixed, 3 eager). Attempts: 2 (2 failed). Recoveries: 0."),
        f"The last failure was attempt 2, in call 3, and is transient: {error}, compiling {frame}.",
        "The next attempt is due in 2 calls.",
        "Events:",
        f"  attempt 1 failed in call 1: {error}, compiling {frame}; running eagerly, next attempt in 2 calls",
        f"  attempt 2 failed in call 3: {error}, compiling {frame}; running eagerly, next attempt in 2 calls",
    ]


def test_assert_compiled_after_giving_up() -> None:
    """After giving up, the message mentions no next attempt, and lists only the last events."""
    policy = RetryPolicy(wait=None, wait_calls=1, stop=tenacity.stop_after_attempt(12))
    fn = compile_with_fallback(sine, backend=Compiler(first(99)), policy=policy, name="step")
    for _ in range(15):
        fn(X)
    lines = why_not_compiled(fn)
    assert lines[0].endswith("gave up: something runs eagerly, and no retry will come.")
    assert lines[3] == "Last 10 events:"
    assert len(lines) == 14
    assert lines[-1].endswith("giving up, running eagerly until reset() or retry_now()")


def test_assert_compiled_where_nothing_was_attempted() -> None:
    """The message distinguishes a function that was never called from one for which torch.compile is disabled."""
    fn = compile_with_fallback(sine, backend=Compiler(), name="step")
    state = "step is not compiled. Its state is pending: nothing is compiled, and nothing is held off."
    assert why_not_compiled(fn) == [state, "It has not been called, or its first call is not over."]
    with torch.compiler.set_stance("force_eager"):
        fn(X)
    assert why_not_compiled(fn) == [
        state,
        (
            "Calls: 1 (0 compiled, 0 mixed, 1 eager)."
            " Attempts: 0. torch.compile may be disabled by the environment, an option or a stance."
        ),
        "Events:",
        "  bypassed: calls run eagerly under torch.compiler.set_stance('force_eager')",
    ]


def test_assert_max_attempts_lists_them() -> None:
    """The message lists the attempts of all functions, with call, graph and outcome."""
    a = compile_with_fallback(two_graphs, backend=Compiler(), policy=EVERY_SECOND_CALL, name="a")
    b = compile_with_fallback(sine, backend=Compiler(), name="b")
    full_disk = fail_compiles(OSError(28, "No space left on device"), function="a", graph=2, times=1)
    with pytest.raises(AssertionError) as raised, full_disk, assert_max_attempts(3):
        [a(X) for _ in range(3)] + [b(X)]
    heading, *attempts = str(raised.value).splitlines()
    assert heading == "Expected at most 3 attempts, but 4 were made:"
    assert [line.partition(":")[0] for line in attempts] == [
        "  a, call 1, graph 1",
        "  a, call 1, graph 2",
        "  a, call 3, graph 2",
        "  b, call 1, graph 1",
    ]
    assert attempts[0].partition(":")[2].startswith(" compiled in ")
    assert attempts[1].partition(":")[2].startswith(" failed, OSError: [Errno 28] No space left on device, compiling ")
    assert len(attempts) == a.stats.attempts + b.stats.attempts


def test_assert_max_attempts_of_one_function() -> None:
    """Only attempts of the given function count, not those of others with the same name or calls of compiled code."""
    a, b = (compile_with_fallback(sine, backend=Compiler(), name="fn") for _ in range(2))
    with assert_max_attempts(1, a):
        a(X), a(X), b(X)
    with assert_max_attempts(0):
        a(X), b(X)


def test_assert_max_attempts_before_there_is_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in torch.compile() counts as an attempt without a graph."""

    def broken(*args: object, **kwargs: object) -> None:
        raise MemoryError

    fn = compile_with_fallback(sine, backend="eager", name="fn")
    monkeypatch.setattr(torch, "compile", broken)
    said = r"no attempt, .* 1 was made:\n  fn, call 1, no graph yet: failed, MemoryError"
    with pytest.raises(AssertionError, match=said), assert_max_attempts(0, fn):
        fn(X)
    assert fn.stats.attempts == 1


def test_assert_max_attempts_while_one_runs() -> None:
    """An attempt that is still running at the end of the block counts too."""

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with pytest.raises(AssertionError) as raised:
            block.__exit__(None, None, None)
        said.append(str(raised.value).splitlines()[1])
        return graph_module.forward

    said: list[str] = []
    fn, block = compile_with_fallback(sine, backend=compiler, name="fn"), assert_max_attempts(0)
    block.__enter__()
    fn(X)
    assert said == ["  fn, call 1, graph 1: has not ended"]


def test_assert_max_attempts_and_restarts() -> None:
    """A trace that Dynamo restarts after its compile began counts as one attempt, as in the statistics."""
    left = [1]

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        left[0] -= 1
        if left[0] >= 0:
            raise torch._dynamo.exc.TensorifyScalarRestartAnalysis
        return graph_module.forward

    fn = compile_with_fallback(sine, backend=compiler)
    with assert_max_attempts(1):
        fn(X)
    assert (fn.stats.attempts, fn.state) == (1, CompileState.COMPILED)


def test_assert_max_attempts_leaves_exceptions_alone() -> None:
    """An exception raised by the block is not replaced."""
    fn = compile_with_fallback(sine, backend=Compiler(first(9)), name="fn")
    with set_strict(True), pytest.raises(torch._dynamo.exc.BackendCompilerFailed), assert_max_attempts(0):
        fn(X)


def test_assert_max_attempts_checks_its_arguments() -> None:
    """Invalid arguments raise before the block runs."""
    with pytest.raises(ValueError, match="n must not be negative, not -1"):
        assert_max_attempts(-1)
    for n in (1.0, True):
        with pytest.raises(TypeError, match=f"n must be an integer, not {n}"):
            assert_max_attempts(n)  # type: ignore[arg-type]  # the wrong type on purpose
    with pytest.raises(TypeError, match="fn must be a function or module"):
        assert_max_attempts(1, sine)
