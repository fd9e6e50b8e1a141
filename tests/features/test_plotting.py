"""`plot_timeline()`: the contents of the plot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from tenacity import stop_after_attempt

from compile_retry import RetryPolicy, compile_repeated_blocks, compile_with_fallback
from compile_retry.plotting import plot_timeline
from compile_retry.testing import FakeClock, fail_compiles
from support import Compiler, dynamo_fails_in, full_disk

X = torch.ones(3)


@pytest.fixture(autouse=True)
def _no_display() -> Iterator[None]:
    mpl.use("Agg")
    yield
    plt.close("all")


def recovered(slow: float = 1.0) -> Any:
    """Make a function with two failed attempts in eight calls. The clock advances in the calls and between them."""
    clock = FakeClock(start=1000)
    tick = torch.compiler.disable(lambda: clock.advance(0.1))

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        clock.advance(slow)
        return graph_module.forward

    def step(x: torch.Tensor) -> torch.Tensor:
        tick()
        return x.sin()

    fn = compile_with_fallback(
        step, backend=compiler, policy=RetryPolicy(wait=None, wait_calls=2, clock=clock), name="train_step"
    )
    with fail_compiles(full_disk(), times=2):
        for _ in range(8):
            fn(X)
            clock.advance(1)
    return fn


def series(ax: Any) -> dict[str, Any]:
    return {drawn.get_label(): drawn for drawn in ax.collections}


def marks(ax: Any, label: str) -> int:
    return len(series(ax)[label].get_offsets())


def calls(ax: Any, label: str) -> list[int]:
    """Return the calls at which there are points with this label."""
    return [int(call) for call, _ in series(ax)[label].get_offsets()]


def test_an_episode() -> None:
    """The plot shows calls by path, attempts, failures and the recovery, each with a legend entry."""
    ax = plot_timeline(recovered())
    assert (ax.get_title(loc="left"), ax.get_xlabel()) == ("train_step", "call")
    assert ax.get_ylabel() == "seconds per call"
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(series(ax))
    assert list(series(ax)) == [
        *["compiled", "compiled, with an attempt"],
        *["eager", "eager, with an attempt", "failure", "recovery"],
    ]
    assert (marks(ax, "failure"), marks(ax, "recovery")) == (2, 1)
    assert (marks(ax, "eager, with an attempt"), marks(ax, "compiled, with an attempt")) == (2, 1)
    assert calls(ax, "eager, with an attempt") == [1, 3]
    assert series(ax)["eager, with an attempt"].get_offsets()[0].tolist() == pytest.approx([1, 0.1])  # call and seconds
    assert calls(ax, "compiled, with an attempt") == calls(ax, "recovery") == [5]


def test_paths_differ_without_colours() -> None:
    """Compiled and eager calls differ in colour and in shape."""
    drawn = series(plot_timeline(recovered()))
    compiled, eager = drawn["compiled"], drawn["eager"]
    assert to_hex(compiled.get_facecolor()[0]) != to_hex(eager.get_facecolor()[0])
    assert len(compiled.get_paths()[0]) != len(eager.get_paths()[0])
    assert len(drawn["eager, with an attempt"].get_facecolor()) == 0  # hollow


@pytest.mark.parametrize(("slow", "scale"), [(0.2, "linear"), (60.0, "log")])
def test_scale(slow: float, scale: str) -> None:
    """The scale is logarithmic only if the durations differ widely."""
    assert plot_timeline(recovered(slow)).get_yscale() == scale


def shapes(*sizes: int, between: int) -> Any:
    """Return a function that was called with each size, and after each of them so often with the first one."""
    clock = FakeClock()
    policy = RetryPolicy(wait=1, clock=clock)
    fn: Any = compile_with_fallback(lambda x: x.sin(), backend="eager", dynamic=False, policy=policy)
    for size in sizes:
        fn(torch.ones(size))
        for _ in range(between):
            fn(torch.ones(sizes[0]))
            clock.advance(1e-4)
    return fn


def test_a_run_of_ten_calls() -> None:
    """Each call has a place of its own, although one of them takes nearly all of the time."""
    clock = FakeClock()

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        clock.advance(60)
        return graph_module.forward

    fn = compile_with_fallback(lambda x: x.sin(), backend=compiler, policy=RetryPolicy(wait=1, clock=clock))
    for _ in range(10):
        clock.advance(1e-3)
        fn(X)
    ax = plot_timeline(fn)
    assert calls(ax, "compiled, with an attempt") == [1]
    assert calls(ax, "compiled") == [*range(2, 11)]
    assert ax.get_xscale() == "linear"


def test_attempts_in_a_long_run() -> None:
    """Each call that compiled for a new shape is shown, however few of the fast calls around it are timed."""
    ax = plot_timeline(shapes(*range(2, 8), between=1000))
    assert calls(ax, "compiled, with an attempt") == [1 + 1001 * k for k in range(6)]
    assert marks(ax, "compiled") < 1000
    assert ax.get_xscale() == "linear"


def test_attempts_at_the_beginning_of_a_long_run() -> None:
    """If most attempts came early, the calls have a logarithmic scale, so that these attempts do not coincide."""
    fn = shapes(2, 3, 4, between=1)
    for _ in range(1000):
        fn(torch.ones(2))
    ax = plot_timeline(fn)
    assert calls(ax, "compiled, with an attempt") == [1, 3, 5]
    assert ax.get_xscale() == "log"


def test_attempts_in_calls_that_raise() -> None:
    """A call that compiled and then raised is shown too."""

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        if len(x) == 5:
            raise ValueError("of the program")
        return y

    fn = compile_with_fallback(step, backend="eager", dynamic=False)
    for _ in range(1000):
        fn(X)
    with pytest.raises(ValueError, match="of the program"):
        fn(torch.ones(5))
    assert calls(plot_timeline(fn), "compiled, with an attempt") == [1, 1001]


def test_attempts_that_fail_before_the_compiler_runs() -> None:
    """A failure inside Dynamo is an attempt, too."""

    def step(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    fn = compile_with_fallback(step, backend="eager", policy=RetryPolicy(wait=None, wait_calls=3))
    with dynamo_fails_in("step", MemoryError(), times=2):
        for _ in range(10):
            fn(X)
    ax = plot_timeline(fn)
    assert calls(ax, "eager, with an attempt") == calls(ax, "failure") == [1, 4]
    assert calls(ax, "compiled, with an attempt") == [7]


def test_attempts_in_nested_calls() -> None:
    """A call held an attempt if it compiled, or a call within it, and only then."""
    within: list[torch.Tensor] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no annotations here
    def nested() -> None:
        if within:
            fn(within.pop())

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x.sin().sum()
        nested()
        return y + 1

    fn: Any = compile_with_fallback(step, backend="eager", dynamic=False)
    for size, size_within in ((3, None), (3, None), (3, 4), (3, 4), (5, 4), (5, 4)):
        within[:] = [torch.ones(size_within)] if size_within else []
        fn(torch.ones(size))
    # In turn: calls 1, 2, 3 with 4 in it, 5 with 6, 7 with 8, 9 with 10.
    ax = plot_timeline(fn)
    assert calls(ax, "compiled, with an attempt") == [1, 3, 4, 7]
    assert calls(ax, "compiled") == [2, 5, 6, 8, 9, 10]


def test_many_failures() -> None:
    """Each of a hundred failures is shown, as a mark and as a call with an attempt."""
    fn = compile_with_fallback(torch.sin, backend="eager", policy=RetryPolicy(wait=None, wait_calls=2), name="f")
    with fail_compiles(full_disk(), times=100):
        for _ in range(400):
            fn(X)
    ax = plot_timeline(fn)
    assert calls(ax, "failure") == [*range(1, 200, 2)]
    assert sorted(calls(ax, "eager, with an attempt")) == calls(ax, "failure")
    assert calls(ax, "compiled, with an attempt") == calls(ax, "recovery") == [201]


def test_functions_that_share() -> None:
    """Twenty equal blocks have one plot, whichever of them is asked for, because one attempt is for all of them."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(4, 2, 4) for _ in range(20))
    policy = RetryPolicy(wait=None, wait_calls=25)
    compile_repeated_blocks(model, backend="eager", policy=policy, name="PlottedBlock")
    with fail_compiles(full_disk(), times=1):
        for _ in range(3):
            x = torch.ones(2, 4)
            for layer in model.layers:
                x = layer(x)
    for ax in (plot_timeline(model.layers[0]), plot_timeline(model.layers[7])):
        assert ax.get_title(loc="left") == "PlottedBlock x20 (layers.0 ... layers.19)"
        assert calls(ax, "failure") == calls(ax, "eager, with an attempt") == [1]
        # The first block's input has no gradient, so it is compiled on its own, and in its own turn.
        assert calls(ax, "compiled, with an attempt") == [26, *calls(ax, "recovery")] == [26, 41]
        assert {*range(2, 11)} <= {*calls(ax, "eager")}


def test_failures_show_on_a_dark_background() -> None:
    """Their marks have the colour of the text."""
    with plt.style.context("dark_background"):
        ax = plot_timeline(recovered())
    assert to_hex(series(ax)["failure"].get_facecolor()[0]) == "#ffffff"


def test_giving_up() -> None:
    """Giving up has its own mark."""
    policy = RetryPolicy(stop=stop_after_attempt(1))
    fn = compile_with_fallback(lambda x: x.sin(), backend=Compiler(full_disk), policy=policy)
    fn(X)
    ax = plot_timeline(fn)
    assert (marks(ax, "gave up"), marks(ax, "failure")) == (1, 1)


def test_an_attempt_that_fails_in_dynamo() -> None:
    """A call whose attempt ended before there was a graph is marked as one with an attempt, too."""
    fn = compile_with_fallback(lambda x: x.sin(), backend="eager", policy=RetryPolicy(wait=None, wait_calls=3))
    with dynamo_fails_in("lambda", full_disk(), times=1):
        for _ in range(3):
            fn(X)
    assert marks(plot_timeline(fn), "eager, with an attempt") == 1


def test_mixed_calls() -> None:
    """Mixed calls have their own series."""

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    fn = compile_with_fallback(step, backend="eager", policy=RetryPolicy(wait=1e6))
    with fail_compiles(full_disk(), graph=2):
        for _ in range(3):
            fn(X)
    assert {"mixed", "mixed, with an attempt"} <= set(series(plot_timeline(fn)))


def test_modules_methods_and_given_axes() -> None:
    """Modules and methods can be plotted, in axes that the caller passes."""
    module = compile_with_fallback(torch.nn.Linear(3, 3), backend="eager")
    module(X)

    class Trainer:
        @compile_with_fallback(backend="eager")
        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    trainer = Trainer()
    trainer.step(X)
    upper, lower = plt.subplots(2)[1]
    assert plot_timeline(module, ax=upper) is upper
    assert upper.get_title(loc="left") == "Linear"
    assert plot_timeline(trainer.step, lower) is lower  # type: ignore[arg-type]  # bound, which its type hides


def test_no_attempts() -> None:
    """Calls without any attempt are plotted too, for example under a stance that forces eager."""
    fn = compile_with_fallback(torch.sin, backend="eager", name="step")
    with torch.compiler.set_stance("force_eager"):
        fn(X)
    assert set(series(plot_timeline(fn))) >= {"eager"}


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors say what is wrong and what would help."""
    with pytest.raises(ValueError, match="nothing to plot yet: f has not been called"):
        plot_timeline(compile_with_fallback(torch.sin, name="f"))
    with pytest.raises(TypeError, match="Linear has not been compiled by compile_with_fallback"):
        plot_timeline(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"fn must be a function or module from compile_with_fallback\(\), not <built"):
        plot_timeline(len)  # type: ignore[arg-type]  # must be refused
    fn = recovered()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'compile-retry\[plot\]'"):
        plot_timeline(fn)
