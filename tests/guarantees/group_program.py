"""One rank of a training run with `group=`, for test_g01_group_*.py: `python group_program.py PORT RANK SIZE TIMEOUT
SCENARIO...`.

Each scenario trains weights in a decorated function and in its eager twin, while compiles fail on some ranks. The last
line of the output has the outcomes, as JSON.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from prometheus_client import generate_latest
from ranks_program import (
    D,
    Faults,
    Twins,
    all_reduce,
    backend,
    backward_faults,
    body,
    broken,
    fail_in_dynamo,
    main,
    on_last_rank,
    tensor_parallel,
    two_graphs,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from compile_retry import RetryPolicy, compile_with_fallback, compiled_function, report, set_strict
from compile_retry.events import AttemptFailed
from compile_retry.testing import record_events

EVERY_3_CALLS = RetryPolicy.every(calls=3)
NEVER_AGAIN = RetryPolicy.every(calls=1000)


class Recorded(Twins):
    """Twins that also record the calls with attempts, the failures, and the lines of the log."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.attempts: list[int] = []
        self.lines: list[list[str]] = []
        self.extra: dict[str, Any] = {}
        self._handler = logging.Handler()
        self._handler.emit = self._emit  # type: ignore[method-assign]
        logging.getLogger("compile_retry").addHandler(self._handler)
        logging.getLogger("compile_retry").setLevel(logging.DEBUG)

    def _emit(self, record: logging.LogRecord) -> None:
        self.lines.append([record.levelname, record.getMessage()])

    def step(self, rows: int, faults: Faults | None = None, *, scale: int = 1) -> None:
        before = self.function.stats.attempts
        super().step(rows, faults, scale=scale)
        if self.function.stats.attempts > before:
            self.attempts.append(len(self.calls))

    def result(self) -> dict[str, Any]:
        last = self.function.last_failure
        logging.getLogger("compile_retry").removeHandler(self._handler)
        return {
            **super().result(),
            "attempts": self.attempts,
            "failures": self.function.stats.failures,
            "failed_on": last.rank if last is not None else None,
            "error": str(last),
            "lines": self.lines,
            **self.extra,
        }


def functions(
    name: str,
    body: Callable[..., torch.Tensor] = body,
    *,
    policy: RetryPolicy = EVERY_3_CALLS,
    group: Any = "world",
    agree_timeout: float | None = None,
    **options: Any,
) -> Recorded:
    torch.manual_seed(0)
    w = nn.Parameter(0.1 * torch.randn(3, D, D))
    twin = nn.Parameter(w.detach().clone())
    options = {"dynamic": False, "group": group, "agree_timeout": agree_timeout, **options}
    fn = compile_with_fallback(body, name=name, backend=backend, policy=policy, **options)
    return Recorded(lambda x, scale: fn(x, w, scale), lambda x, scale: body(x, twin, scale), [w], [twin], fn)


def modules(name: str, wrap: Callable[[nn.Module], nn.Module]) -> Recorded:
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(nn.Sequential(nn.Linear(D, 4 * D), nn.Tanh(), nn.Linear(4 * D, D)))
    model, twin = pair
    decorated, eager = wrap(model), wrap(twin)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    compile_with_fallback(model, name=name, backend=backend, policy=EVERY_3_CALLS, group=mesh)
    return Recorded(
        lambda x, scale: decorated(x),
        lambda x, scale: eager(x),
        [*model.parameters()],
        [*twin.parameters()],
        compiled_function(model),
    )


def on_rank(rank: int, faults: Faults) -> Faults:
    return faults if dist.get_rank() == rank else nullcontext()


def broken_for_good(name: str) -> Faults:
    from compile_retry.testing import fail_compiles

    return fail_compiles(NotImplementedError, function=name)


@contextmanager
def fail_to_create() -> Iterator[None]:
    """Make the call to ``torch.compile`` fail."""
    with mock.patch.object(torch, "compile", side_effect=OSError(30, "Read-only file system")):
        yield


def steps(twins: Recorded, *rows: int, faults: dict[int, Faults] | None = None) -> Recorded:
    """Train one step for each of these numbers of rows, some of them with faults."""
    for step, n in enumerate(rows, 1):
        twins.step(n, (faults or {}).get(step))
    return twins


def plain(x: torch.Tensor, w: torch.Tensor, scale: int) -> torch.Tensor:
    return torch.tanh(x @ w[0]) @ w[1] * scale


# Scenarios


def healthy(name: str) -> Recorded:
    """Steady calls do not use the store, whether compiled or held off."""
    twins = functions(name)
    held_off = compile_with_fallback(plain, name="held off", backend=backend, group="world", policy=NEVER_AGAIN)
    compiled = compile_with_fallback(plain, name="compiled", backend=backend, group="world")
    w, x = torch.ones(3, D, D), torch.ones(2, D)
    with counting_operations() as operations:
        steps(twins, 8, 9)
        compiled(x, w, 1)
        with on_last_rank(broken("held off")):
            held_off(x, w, 1)
        twins.extra["operations_when_compiling"] = len(operations)
        steps(twins, *(8, 9) * 10)
        for _ in range(10_000):
            compiled(x, w, 1)
        for _ in range(900):
            held_off(x, w, 1)
    twins.extra["operations"] = len(operations) - twins.extra["operations_when_compiling"]
    twins.extra["steady"] = [compiled.stats.compiled_calls, held_off.stats.eager_calls]
    return twins


@contextmanager
def counting_operations() -> Iterator[list[str]]:
    """Record the operations on the stores of this process."""
    from torch._C._distributed_c10d import PrefixStore

    names = ("set", "get", "check", "add", "compare_set", "multi_get", "delete_key")
    done: list[str] = []

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            done.append(name)
            return real(*args)

        return operation

    operations: Any = {name: counting(name, getattr(PrefixStore, name)) for name in names}
    with mock.patch.multiple(PrefixStore, **operations):
        yield done


def retry_on(name: str, asking: str) -> Recorded:
    """All ranks are held off for long. Some ask for a retry."""
    twins = functions(name, policy=NEVER_AGAIN)
    twins.step(8, on_last_rank(broken(name)))
    if asking == "all" or dist.get_rank() == 0:
        twins.function.retry_now()
    return steps(twins, 8, 8)


def reset_after_giving_up(name: str) -> Recorded:
    twins = functions(name)
    steps(twins, 8, 8, faults={1: on_last_rank(broken_for_good(name))})
    twins.function.reset()
    return steps(twins, 8, 8)


def strict(name: str) -> Recorded:
    """In strict mode, a failure on one rank raises on all ranks."""
    twins = functions(name)
    with set_strict(True):
        try:
            twins.step(8, on_last_rank(broken(name)))
        except Exception as exc:
            twins.extra["strict"] = [type(exc).__name__, str(exc)]
        twins.step(8)
    return twins


def two_functions(name: str) -> Recorded:
    """Another function, of another group, fails on another rank in the same steps."""
    other = functions(f"{name} 2", group=dist.new_group(), policy=RetryPolicy.every(calls=2))
    twins = functions(name)
    for step in range(1, 7):
        other.step(8, on_rank(0, broken(f"{name} 2")) if step <= 2 else None)
        twins.step(8, on_last_rank(broken(name)) if step == 1 else None)
    twins.extra["other"] = [other.calls, other.difference]
    return twins


def seen(name: str) -> Recorded:
    twins = functions(name)
    with record_events(name) as events:
        steps(twins, 8, 8, 8, 8, faults={1: on_last_rank(broken(name))})
    twins.extra["events"] = [[event.kind, event.rank] for event in events]
    twins.extra["event_failed_on"] = [event.failure.rank for event in events if isinstance(event, AttemptFailed)]
    (function,) = (each for each in report().as_dict()["functions"] if each["name"] == name)
    twins.extra["report"] = function["ranks"]
    twins.extra["table"] = str(report())
    twins.extra["metrics"] = generate_latest().decode()
    return twins


def in_seconds(name: str) -> Recorded:
    """Waits in seconds, by clocks of different speeds, on ranks that are at different points of the wait."""
    began, speed = time.monotonic(), (1.0, 0.5, 3.0, 0.7)[dist.get_rank() % 4]
    policy = RetryPolicy(wait=0.3, clock=lambda: (time.monotonic() - began) * speed, max_overhead=float("inf"))
    twins = functions(name, policy=policy)
    twins.step(8, on_last_rank(broken(name)))
    twins.extra["next_retry"] = str(twins.function.next_retry)
    while twins.function.stats.recoveries == 0 and len(twins.calls) < 2000:
        twins.step(8)
    return steps(twins, 8, 9)


def slow_compile(name: str) -> Recorded:
    """One rank compiles for longer than the process group's timeout."""

    def slowly() -> Faults:
        from compile_retry._compile.backend import faults

        @contextmanager
        def sleeping() -> Iterator[None]:
            def sleep(attempt: object) -> None:
                time.sleep(float(os.environ.get("SLOW", "12")))

            faults.append(sleep)
            yield
            faults.remove(sleep)

        return sleeping()

    return steps(functions(name), 8, 8, faults={1: on_last_rank(slowly())})


def killed(name: str) -> Recorded:
    """The last rank is killed in its second attempt."""
    twins = functions(name, agree_timeout=8)
    twins.step(8)
    if dist.get_rank() == dist.get_world_size() - 1:
        from compile_retry._compile.backend import faults

        faults.append(lambda attempt: os.kill(os.getpid(), signal.SIGKILL))
    began = time.monotonic()
    try:
        twins.step(9)
    except RuntimeError as exc:
        twins.extra["error"] = [type(exc).__name__, str(exc)]
    twins.extra.update(took=time.monotonic() - began, is_over=True)
    return twins


def different_frames(name: str) -> Recorded:
    """The ranks attempt different frames, after a frame that all have compiled."""

    rank = dist.get_rank()

    def branch(x: torch.Tensor, w: torch.Tensor, scale: int) -> torch.Tensor:
        if scale > 1:
            return one(x, w) if rank == 0 else other(x, w)
        return body(x, w, scale)

    twins = functions(name, branch)
    twins.step(8)
    began = time.monotonic()
    try:
        twins.step(8, scale=2)
    except RuntimeError as exc:
        twins.extra["error"] = [type(exc).__name__, str(exc)]
    twins.extra.update(took=time.monotonic() - began, is_over=True)
    return twins


def one(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(all_reduce(x @ w[0]))
    torch._dynamo.graph_break()
    return y * 2


def other(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = torch.sin(all_reduce(x @ w[0]))
    torch._dynamo.graph_break()
    return y * 2


def different_shapes(name: str) -> Recorded:
    """The first rank gets a new shape, and the others one that they have compiled before."""
    twins = functions(name, agree_timeout=5)
    twins.step(8)
    try:
        twins.step(9 if dist.get_rank() == 0 else 8)
    except RuntimeError as exc:
        twins.extra["error"] = [type(exc).__name__, str(exc)]
    twins.extra["is_over"] = True
    time.sleep(2)  # the other ranks need this one's connection until they have waited long enough, too
    return twins


def unequal_calls(name: str) -> Recorded:
    """Without collectives. The first rank makes twelve calls, and the others three."""
    twins = functions(name, plain, agree_timeout=5)
    twins.step(8, on_last_rank(broken(name)))
    steps(twins, *(8,) * (11 if dist.get_rank() == 0 else 2))
    return twins


def store_gone(name: str) -> Recorded:
    """The store goes away after the first compile."""
    twins = functions(name)
    twins.step(8)

    def gone(*args: Any) -> Any:
        raise RuntimeError("Connection reset by peer")

    from torch._C._distributed_c10d import PrefixStore

    with mock.patch.multiple(PrefixStore, compare_set=gone, check=gone, add=gone):
        steps(twins, 9, 8, 9, faults={1: on_last_rank(broken(name))})
        return steps(twins, 9)


def store_gone_while_held_off(name: str) -> Recorded:
    """The store goes away before the ranks ask each other whether an attempt is due."""
    twins = functions(name, policy=RetryPolicy(wait=0.01, max_overhead=float("inf")))

    def gone(*args: Any) -> Any:
        raise RuntimeError("Connection reset by peer")

    from torch._C._distributed_c10d import PrefixStore

    twins.step(8, on_last_rank(broken(name)))
    with mock.patch.multiple(PrefixStore, compare_set=gone, check=gone, add=gone):
        return steps(twins, 8, 8, 8)


def uneven_checks(name: str) -> Recorded:
    """Without collectives. The first rank makes no more calls, and the others expect it to look at its clock."""
    policy = RetryPolicy(wait=0.01, max_overhead=float("inf"))
    twins = functions(name, plain, agree_timeout=5, policy=policy)
    twins.step(8, on_last_rank(broken(name)))
    return twins if dist.get_rank() == 0 else steps(twins, 8, 8)


def lost_announcement(name: str) -> Recorded:
    """The store goes away between a vote and the first rank's announcement."""
    from torch._C._distributed_c10d import PrefixStore

    twins = functions(name, agree_timeout=5)
    real = PrefixStore.compare_set

    def compare_set(store: PrefixStore, key: str, *args: str) -> bytes:
        if "/due/" in key:
            raise RuntimeError("Connection reset by peer")
        return real(store, key, *args)

    with mock.patch.object(PrefixStore, "compare_set", compare_set):
        return steps(twins, 8, 8, 8, faults={1: on_last_rank(broken(name))})


def arguments(name: str) -> Recorded:
    """Groups of one rank need no agreement, and a timeout that is too long is refused."""
    twins = functions(name, plain, group=dist.new_subgroups(1)[0])
    steps(twins, 8, 8, 8, 8, faults={1: broken(name)})
    twins.extra["ranks"] = str(next(each for each in report().functions if each.name == name).ranks)
    try:
        compile_with_fallback(plain, group="world", agree_timeout=30)
    except ValueError as exc:
        twins.extra["error"] = str(exc)
    return twins


def limit_with_fullgraph(name: str) -> Recorded:
    """With fullgraph=True, Dynamo raises at the recompile limit."""
    twins = functions(name, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        return steps(twins, 8, 9, 10, 8, 10)


def absent(name: str) -> Recorded:
    """Without collectives. Only the first rank calls the function."""
    twins = functions(name, plain, agree_timeout=5)
    return steps(twins, 8, 8) if dist.get_rank() == 0 else twins


def retry_of_nothing(name: str) -> Recorded:
    """Where nothing has failed, there is nothing to agree on."""
    twins = functions(name)
    twins.step(8)
    if dist.get_rank() == 0:
        twins.function.retry_now()
    twins.step(8)
    return twins


def restarted(name: str) -> Recorded:
    """In each of its first three lives, the last rank is killed in an attempt, in a vote of its own."""
    life = int(os.environ["LIFE"])
    twins = functions(name, agree_timeout=5)
    steps(twins, *(8,) * 5, faults={1: on_last_rank(broken(name))})
    if life < 3 and dist.get_rank() == dist.get_world_size() - 1:
        from compile_retry._compile.backend import faults

        faults.append(lambda attempt: os.kill(os.getpid(), signal.SIGKILL))
    try:
        twins.step(9)
    except RuntimeError as exc:
        twins.extra["error"] = [type(exc).__name__, str(exc)]
    twins.extra["is_over"] = True
    return twins


def policy_raises(name: str) -> Recorded:
    """The first rank's wait strategy raises."""

    def wait(state: object) -> float:
        raise ZeroDivisionError

    return steps(
        functions(name, policy=RetryPolicy(wait=None, wait_calls=wait)),
        *(8,) * 4,
        faults={1: on_last_rank(broken(name))},
    )


def predicate_raises(name: str) -> Recorded:
    def retry(state: object) -> bool:
        raise ZeroDivisionError

    policy = RetryPolicy(wait=None, wait_calls=2, retry=retry)
    return steps(functions(name, policy=policy), *(8,) * 4, faults={1: on_last_rank(broken(name))})


def frameless(name: str) -> Recorded:
    """Under this stance, Dynamo calls the backend without a frame."""
    with torch.compiler.set_stance("eager_then_compile"):
        twins = functions(name)
        twins.step(8)
        return steps(twins, *(8,) * 5, faults={1: on_last_rank(broken(name))})


def over_limit(name: str) -> Recorded:
    """All ranks reach the recompile limit in the same call."""
    with torch._dynamo.config.patch(recompile_limit=8):
        return steps(functions(name), *range(8, 18))


def passed_over(name: str) -> Recorded:
    """Frames without operators, which differ between ranks, need no vote."""

    def helper(rank: int) -> int:
        torch._dynamo.graph_break()
        return rank

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # it is
    def dispatch() -> None:
        if dist.get_rank() == 0:
            helper(3)

    def with_helper(x: torch.Tensor, w: torch.Tensor, scale: int) -> torch.Tensor:
        y = body(x, w, scale)
        dispatch()
        return y * 1

    return steps(functions(name, with_helper), 8, 8)


def random_faults(name: str) -> Recorded:
    """Faults on random ranks and at random stages, clocks of different speeds, and waits in calls or in seconds."""
    seed, rank = int(name.rpartition("_")[2]), dist.get_rank()
    shared, own = random.Random(seed), random.Random(1000 * seed + rank)
    speed, began = own.uniform(0.5, 3.0), time.monotonic()
    if shared.random() < 0.5:
        policy = RetryPolicy(wait=None, wait_calls=shared.choice((1, 2, 5)))
    else:
        clock = lambda: (time.monotonic() - began) * speed  # noqa: E731
        policy = RetryPolicy(wait=shared.choice((0.1, 0.5)), clock=clock, max_overhead=float("inf"))
    rate = shared.choice((0.2, 0.6)) / dist.get_world_size()  # of calls with a fault, on each rank
    twins = functions(name, two_graphs if shared.random() < 0.5 else body, policy=policy)
    torch._dynamo.config.recompile_limit = 64
    for step in range(60):
        rows = 8 if step % 5 else 9 + (step // 5) % 6
        faults: Faults = nullcontext()
        if own.random() < 2 * rate:  # most calls compile nothing, so a fault does not show
            stages: tuple[Callable[[], Faults], ...] = (
                lambda: broken(name, 1),
                lambda: broken(name),
                lambda: broken_for_good(name),
                lambda: broken(name, graph=2),
                lambda: fail_in_dynamo(1),
                lambda: backward_faults.fail(1),
            )
            faults = own.choice(stages)()
        elif step == 0 and own.random() < rate:
            faults = fail_to_create()
        twins.step(rows, faults)
    return twins


SCENARIOS: dict[str, Callable[[str], Twins]] = {
    "healthy": healthy,
    "first_attempt": lambda name: steps(functions(name), *(8,) * 6, faults={1: on_last_rank(broken(name))}),
    "retry_fails": lambda name: steps(
        functions(name), *(8,) * 8, faults={1: on_last_rank(broken(name)), 4: on_rank(0, broken(name))}
    ),
    "recompile": lambda name: steps(functions(name), 8, 9, 8, 9, 9, 8, faults={2: on_last_rank(broken(name))}),
    "inside_dynamo": lambda name: steps(functions(name), *(8,) * 5, faults={1: on_last_rank(fail_in_dynamo(1))}),
    "backward": lambda name: steps(functions(name), *(8,) * 5, faults={1: on_last_rank(backward_faults.fail(1))}),
    "creation": lambda name: steps(functions(name), *(8,) * 5, faults={1: on_last_rank(fail_to_create())}),
    "two_frames": lambda name: steps(
        functions(name, two_graphs), *(8,) * 5, faults={1: on_last_rank(broken(name, graph=2))}
    ),
    "first_of_two_frames": lambda name: steps(
        functions(name, two_graphs), *(8,) * 5, faults={1: on_last_rank(broken(name, graph=1))}
    ),
    "permanent": lambda name: steps(functions(name), 8, 9, 8, 9, faults={2: on_last_rank(broken_for_good(name))}),
    "dtensor": lambda name: steps(modules(name, tensor_parallel), *(8,) * 5, faults={1: on_last_rank(broken(name))}),
    "retry_on_all": lambda name: retry_on(name, "all"),
    "retry_on_one": lambda name: retry_on(name, "one"),
    "reset_after_giving_up": reset_after_giving_up,
    "strict": strict,
    "two_functions": two_functions,
    "in_seconds": in_seconds,
    "seen": seen,
    "slow_compile": slow_compile,
    "killed": killed,
    "different_frames": different_frames,
    "different_shapes": different_shapes,
    "unequal_calls": unequal_calls,
    "store_gone": store_gone,
    "store_gone_while_held_off": store_gone_while_held_off,
    "uneven_checks": uneven_checks,
    "retry_of_nothing": retry_of_nothing,
    "absent": absent,
    "lost_announcement": lost_announcement,
    "arguments": arguments,
    "limit_with_fullgraph": limit_with_fullgraph,
    "policy_raises": policy_raises,
    "predicate_raises": predicate_raises,
    "frameless": frameless,
    "over_limit": over_limit,
    "passed_over": passed_over,
    "restarted": restarted,
    "without_group": lambda name: steps(functions(name, group=None), 8, 8),
    **{f"random_{seed}": random_faults for seed in range(40)},
}


if __name__ == "__main__":
    main(*sys.argv[1:], scenarios=SCENARIOS)
