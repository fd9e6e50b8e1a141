"""Inductor's autotuning: which candidates dropped out for a reason that may pass, and what is remembered of them.

Inductor times candidates for an operation and uses the fastest. A candidate that fails counts as infinitely slow,
whatever the reason, and its time is stored on disk. If all fail, the operation cannot be compiled, now or later. So in
an attempt, a failure that may pass is not stored, and an infinite time that is stored is measured again once.

A Triton kernel is built in several configurations, and the fastest is used. Those that cannot be built drop out too.

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


class UnexplainedError(RuntimeError):
    """A worker process could not build a configuration of a kernel. It does not say why; mostly `ptxas` has failed."""


class Tuning:
    """The autotuning of one attempt, as far as candidates dropped out for a reason that may pass.

    Attributes:
        candidates: The number of candidates of the operations concerned.
        timed: How many of them were timed.
        reason: A copy of the first of the errors; None if no candidate dropped out.
        is_explained: Whether any of the reasons is known.
    """

    def __init__(self) -> None:
        self.candidates = self.timed = 0
        self.reason: BaseException | None = None
        self.is_explained = False

    def add(self, candidates: int, reasons: list[BaseException]) -> None:
        """Add an operation or a kernel some of whose candidates have dropped out."""
        if reasons:
            self.candidates += candidates
            self.timed += candidates - len(reasons)
            self.reason = self.reason or reasons[0]
            self.is_explained |= not all(isinstance(reason, UnexplainedError) for reason in reasons)


class _ThisThread(threading.local):
    tuning: Tuning | None = None  # of the attempt in progress
    choices: Iterable[Any] = ()  # the candidates that are being timed
    error: BaseException | None = None  # of a process that times candidates
    errors: list[BaseException] | None = None  # of the kernel that is being built


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
    _watch_kernels()


def _watch_kernels() -> None:
    """Wrap the methods that build a Triton kernel's configurations and load them onto the device.

    Since 2.0 `precompile` and `_precompile_config`. Since 2.6 `_make_launchers`, and `make_launcher` of a configuration
    that was built. Since 2.7 `_precompile_worker`.
    """
    from torch._inductor.runtime import triton_heuristics

    kernel = triton_heuristics.CachingAutotuner
    _replace(kernel, "_precompile_config", _noting_config_errors)
    _replace(kernel, "_precompile_worker", _counting_configs)
    _replace(kernel, "_make_launchers", _counting_configs)
    _replace(kernel, "precompile", _counting_configs_from_workers)
    for result in ("TritonCompileResult", "StaticTritonCompileResult"):
        _replace(getattr(triton_heuristics, result, None), "make_launcher", _noting_config_errors)


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
            reasons = _reasons(choices)
            if reasons and _this_thread.tuning is not None:
                raise exc from reasons[0]  # which is the root cause
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


def _noting_config_errors(build: Callable[..., Any]) -> Callable[..., Any]:
    def noting(*args: Any) -> Any:
        try:
            return build(*args)
        except Exception as exc:
            if _this_thread.errors is not None and may_pass(exc):
                _this_thread.errors.append(_without_frames(exc))
            raise

    return noting


def _counting_configs(build: Callable[[Any], None]) -> Callable[[Any], None]:
    def counting(kernel: Any) -> None:
        outer, _this_thread.errors = _this_thread.errors, []
        configs = len(kernel.compile_results or kernel.configs)
        try:
            build(kernel)  # raises if there is none left
            _lacks_configs(kernel, configs, _this_thread.errors)
        finally:
            _this_thread.errors = outer

    return counting


def _counting_configs_from_workers(precompile: Callable[..., None]) -> Callable[..., None]:
    def counting(kernel: Any, *args: Any, **kwargs: Any) -> None:
        built = len(kernel.compile_results)
        precompile(kernel, *args, **kwargs)
        # The number of configurations before they were built: since 2.7.
        configs = (getattr(kernel, "autotune_cache_info", None) or {}).get("num_configs", built)
        if built:  # by a worker process
            error = UnexplainedError("a worker process could not build a configuration of a Triton kernel")
            _lacks_configs(kernel, configs, [error] * (configs - built))

    return counting


def _lacks_configs(kernel: Any, configs: int, errors: list[BaseException]) -> None:
    """Count a kernel that lacks configurations, and do not let Inductor remember it."""
    if errors and _this_thread.tuning is not None:
        from torch._inductor.codecache import PyCodeCache

        _this_thread.tuning.add(configs, errors)
        kernel.save_cache_hook = None  # stores the fastest configuration, when the kernel runs
        for path, module in list(PyCodeCache.modules_no_attr.items()):
            if any(value is kernel for value in list(vars(module).values())):
                del PyCodeCache.modules_no_attr[path]
