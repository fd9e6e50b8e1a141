"""Inductor's autotuning: which candidates dropped out for a reason that may pass, and what is remembered of them.

Inductor times candidates for an operation and uses the fastest. A candidate that fails counts as infinitely slow,
whatever the reason, and its time is stored on disk. If all fail, the operation cannot be compiled, now or later. So in
an attempt, a failure that may pass is not stored, and an infinite time that is stored is measured again once.

All names are optional: if one is missing in another version of PyTorch, these failures go unnoticed there.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from compile_retry._failures import may_pass, qualified_name, root_cause

# Added to the times on disk: the candidates whose infinite time was measured with this module's precautions.
_CHECKED = "compile_retry: measured as infinite"
# Set on a candidate that dropped out: the reason.
_REASON = "_compile_retry_reason"


class Tuning:
    """The autotuning of one attempt, as far as candidates dropped out for a reason that may pass.

    Attributes:
        candidates: The number of candidates of the operations concerned.
        timed: How many of them were timed.
        reason: A copy of the first of the errors; None if no candidate dropped out.
    """

    def __init__(self) -> None:
        self.candidates = self.timed = 0
        self.reason: BaseException | None = None

    def add(self, candidates: int, reasons: list[BaseException]) -> None:
        """Add an operation or a kernel some of whose candidates have dropped out."""
        if reasons:
            self.candidates += candidates
            self.timed += candidates - len(reasons)
            self.reason = self.reason or reasons[0]


class _ThisThread(threading.local):
    tuning: Tuning | None = None  # of the attempt in progress
    choices: Iterable[Any] = ()  # the candidates that are being timed
    error: BaseException | None = None  # of a process that times candidates


_this_thread = _ThisThread()


@contextmanager
def watching_autotuning(tuning: Tuning, *, uses_inductor: bool) -> Iterator[None]:
    """Watch an attempt's autotuning in this thread.

    Args:
        tuning: What candidates drop out is added to this.
        uses_inductor: Whether the attempt will certainly import Inductor's autotuning, which takes a second.
    """
    if uses_inductor or "torch._inductor.select_algorithm" in sys.modules:
        _watch_select_algorithm()
    outer, _this_thread.tuning = _this_thread.tuning, tuning
    try:
        yield
    finally:
        _this_thread.tuning = outer


def _replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function or method of torch by a wrapper."""
    original = inspect.getattr_static(owner, name, None)
    kind = type(original) if isinstance(original, (staticmethod, classmethod)) else None
    function = original.__func__ if kind is not None else original
    if function is not None:  # pragma: no branch  # exists in the torch version that the tests use
        wrapper = functools.wraps(function)(wrap(function))
        setattr(owner, name, kind(wrapper) if kind is not None else wrapper)


@functools.cache
def _watch_select_algorithm() -> None:
    """Wrap the functions that time candidates, and those that store times and compiled graphs.

    Since 2.0: `benchmark_choice`, `lookup`, `get_local_cache`, `update_local_cache`, and `_save_graph` (2.1). Since
    2.3: `target` and `get` of the processes that time candidates. Since 2.9: `do_autotuning`, and
    `_log_autotune_exceptions`, which takes the errors of candidates that could not be compiled.
    """
    from torch._functorch._aot_autograd import autograd_cache
    from torch._inductor import autotune_process, codecache, select_algorithm

    selector = select_algorithm.AlgorithmSelectorCache
    _replace(selector, "benchmark_choice", _noting_errors)
    _replace(select_algorithm, "_log_autotune_exceptions", _noting_all_errors)
    _replace(getattr(autotune_process, "TuningProcess", None), "get", _keeping_errors)
    _replace(getattr(autotune_process, "TuningProcessPool", None), "target", _noting_kept_errors)
    _replace(selector, "do_autotuning", _counting)
    _replace(selector, "lookup", _naming_choices)
    _replace(selector, "get_local_cache", _without_unchecked_times)
    _replace(selector, "update_local_cache", _without_passing_times)
    for cache, save in ((codecache.FxGraphCache, "_save_graph"), (autograd_cache.AOTAutogradCache, "save")):
        _replace(cache, save, _unless_badly_tuned)


def _note(choice: Any, exc: BaseException) -> None:
    if may_pass(exc):
        setattr(choice, _REASON, _without_frames(exc))


def _reasons(choices: Iterable[Any]) -> list[BaseException]:
    return [reason for choice in choices if (reason := getattr(choice, _REASON, None)) is not None]


def _without_frames(exc: BaseException) -> BaseException:
    """Copy the root cause. The original's frames hold the buffers that a candidate is timed with."""
    root = root_cause(exc)
    try:
        return type(root)(*root.args)
    except Exception:  # its class takes other arguments
        return RuntimeError(f"{qualified_name(root)}: {root}")


def _noting_errors(benchmark_choice: Callable[..., float]) -> Callable[..., float]:
    def noting(cls: type, choice: Any, *args: Any) -> float:
        try:
            return benchmark_choice(cls, choice, *args)
        except Exception as exc:
            _note(choice, exc)
            raise

    return noting


def _noting_all_errors(log: Callable[[Any], None]) -> Callable[[Any], None]:
    def noting(exceptions: list[tuple[Any, BaseException]]) -> None:
        for choice, exc in exceptions:
            _note(choice, exc)
        log(exceptions)

    return noting


def _keeping_errors(get: Callable[..., Any]) -> Callable[..., Any]:
    def keeping(*args: Any) -> Any:
        try:
            return get(*args)
        except Exception as exc:
            _this_thread.error = exc
            raise

    return keeping


def _noting_kept_errors(target: Callable[[Any, Any], float]) -> Callable[[Any, Any], float]:
    def noting(pool: Any, choice: Any) -> float:
        time = target(pool, choice)
        error, _this_thread.error = _this_thread.error, None
        if error is not None:
            _note(choice, error)
        return time

    return noting


def _counting(do_autotuning: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor.select_algorithm import NoValidChoicesError

    signature = inspect.signature(do_autotuning)

    def counting(*args: Any, **kwargs: Any) -> Any:
        choices = signature.bind(*args, **kwargs).arguments["choices"]
        try:
            return do_autotuning(*args, **kwargs)
        except NoValidChoicesError as exc:
            exc.__cause__ = next(iter(_reasons(choices)), None)  # which is the root cause
            raise
        finally:
            if _this_thread.tuning is not None:
                _this_thread.tuning.add(len(choices), _reasons(choices))

    return counting


def _naming_choices(lookup: Callable[..., Any]) -> Callable[..., Any]:
    def naming(selector: Any, choices: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        outer, _this_thread.choices = _this_thread.choices, choices
        try:
            return lookup(selector, choices, *args, **kwargs)
        finally:
            _this_thread.choices = outer

    return naming


def _without_unchecked_times(get_local_cache: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def without(selector: Any) -> Any:
        cache = get_local_cache(selector)
        for times in _tables(cache) if _this_thread.tuning is not None else ():
            for key in _infinite(times) - {*times.get(_CHECKED, ())}:
                del times[key]
        return cache

    return without


def _without_passing_times(update_local_cache: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def without(selector: Any, cache: Any) -> None:
        passing = {choice.hash_key() for choice in _this_thread.choices if _reasons([choice])}
        for times in _tables(cache) if _this_thread.tuning is not None else ():
            for key in _infinite(times) & passing:
                del times[key]
            if checked := _infinite(times):
                times[_CHECKED] = sorted(checked)
        update_local_cache(selector, cache)

    return without


def _tables(cache: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    """Yield the tables of times, by operation, inputs and precision."""
    return (times for operation in cache.values() for inputs in operation.values() for times in inputs.values())


def _infinite(times: dict[str, Any]) -> set[str]:
    return {key for key, time in times.items() if isinstance(time, float) and math.isinf(time)}


def _unless_badly_tuned(save: Callable[..., None]) -> Callable[..., None]:
    def save_unless(*args: Any, **kwargs: Any) -> None:
        if _this_thread.tuning is None or _this_thread.tuning.reason is None:
            save(*args, **kwargs)

    return save_unless
