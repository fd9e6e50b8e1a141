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

from compile_retry import RetryPolicy, compile_with_fallback
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


def test_an_episode() -> None:
    """The plot shows calls by path, attempts, failures and the recovery, each with a legend entry."""
    ax = plot_timeline(recovered())
    assert (ax.get_title(loc="left"), ax.get_xlabel()) == ("train_step", "seconds since the first call")
    assert ax.get_ylabel() == "seconds per call"
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(series(ax))
    assert list(series(ax)) == [
        *["attempt", "compiled", "compiled, with an attempt"],
        *["eager", "eager, with an attempt", "failure", "recovery"],
    ]
    assert len(series(ax)["attempt"].get_paths()) == 3
    assert (marks(ax, "failure"), marks(ax, "recovery")) == (2, 1)
    assert (marks(ax, "eager, with an attempt"), marks(ax, "compiled, with an attempt")) == (2, 1)
    first = series(ax)["eager, with an attempt"].get_offsets()[0]
    assert first.tolist() == pytest.approx([0.1, 0.1])  # not 1000 s, the clock's start


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
