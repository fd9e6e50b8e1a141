"""``torch.compile`` that falls back to eager when compilation fails, and returns to compiled code when it can."""

from importlib import import_module
from typing import TYPE_CHECKING

from ._command import is_command as _is_command

if not _is_command():
    from . import _torch as _torch  # raises an ImportError if PyTorch is too old
    from . import events as events
    from . import instrumentation as instrumentation  # also writes the log
    from ._blocks import compile_repeated_blocks
    from ._compile.checkpointing import mark_step_end
    from ._decorator import compile_with_fallback, compiled_function
    from ._failures import CompileFailure, is_transient
    from ._function import CompiledFunction
    from ._install import install
    from ._install import install_at_start as _install_at_start
    from ._report import report
    from ._schedule.episode import NextRetry
    from ._schedule.policy import RetryPolicy
    from ._stats import CompileState, CompileStats
    from ._switches import set_active, set_strict

if TYPE_CHECKING:
    from . import plotting as plotting
    from . import testing as testing

    __version__: str

__all__ = [
    "CompileFailure",
    "CompileState",
    "CompileStats",
    "CompiledFunction",
    "NextRetry",
    "RetryPolicy",
    "compile_repeated_blocks",
    "compile_with_fallback",
    "compiled_function",
    "install",
    "is_transient",
    "mark_step_end",
    "report",
    "set_active",
    "set_strict",
]

if not _is_command():
    for _name in __all__:  # the public path, in reprs, pickles and docs
        globals()[_name].__module__ = __name__
    del _name

    _install_at_start()


if not TYPE_CHECKING:  # pragma: no branch  # type checkers would accept any attribute

    def __getattr__(name):
        """Import a submodule, or look up the version, when it is first used: either would slow down the import."""
        if name in ("plotting", "testing"):
            return import_module(f"{__name__}.{name}")  # sets the attribute, too
        if name == "__version__":
            from ._version import installed_version

            return installed_version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "__version__", "plotting", "testing"})
