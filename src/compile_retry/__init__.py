"""``torch.compile`` that falls back to eager when compilation fails, and returns to compiled code when it can."""

from importlib import import_module
from typing import TYPE_CHECKING

import torch

if torch.__version__ < "2.10":  # compares as a version
    raise ImportError(f"compile_retry requires torch 2.10 or later, this is {torch.__version__}")

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

for _name in __all__:  # the public path, in reprs, pickles and docs
    globals()[_name].__module__ = __name__
del _name


if not TYPE_CHECKING:  # pragma: no branch  # type checkers would accept any attribute

    def __getattr__(name):
        """Import a submodule, or look up the version, when it is first used: either would slow down the import."""
        if name in ("plotting", "testing"):
            return import_module(f"{__name__}.{name}")  # sets the attribute, too
        if name == "__version__":
            from ._version import installed_version

            return installed_version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_install_at_start()


def __dir__() -> list[str]:
    return sorted({*globals(), "__version__", "plotting", "testing"})
