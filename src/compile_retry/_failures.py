"""Compile failures: the root cause, its classification, and the record that is kept.

Exceptions are classified by class name, so that this module imports neither torch nor Triton. Records hold text only,
because an exception would keep the call's tensors alive.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

# Function, file and line.
Location: TypeAlias = tuple[str, str, int]

FailureKind = Literal["transient", "permanent"]
FailureStage = Literal["torch.compile", "trace", "backend"]

# Compiling the same graph again would fail again: the code cannot be traced, or the backend or the machine lacks
# something. By class name, anywhere in the method resolution order.
_PERMANENT = frozenset(
    {
        "NotImplementedError",
        # torch._dynamo.exc
        "Unsupported",
        "UserError",
        "UncapturedHigherOrderOpError",
        "TorchRuntimeError",
        "FailOnRecompileLimitHit",
        "CondOpArgsMismatchError",
        "InvalidBackend",
        # torch._subclasses.fake_tensor
        "UnsupportedOperatorException",
        "UnsupportedFakeTensorException",
        "UnsupportedMutationAliasingException",
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        # torch._inductor.exc and select_algorithm
        "TritonMissing",
        "GPUTooOldForTriton",
        "LoweringException",
        "MissingOperatorWithDecomp",
        "MissingOperatorWithoutDecomp",
        "SubgraphLoweringException",
        "NoValidChoicesError",
        # triton.runtime.errors
        "OutOfResources",
    }
)

# After one of these the accelerator's context is gone, and eager execution fails too.
_FATAL_TYPES = frozenset({"AcceleratorError"})
# Errors of that class that the context survives.
_SURVIVED_TEXT = (
    "out of memory",
    "invalid argument",
    "invalid configuration argument",
    "no kernel image is available",
    "stream is capturing",
)
_FATAL_TEXT = (
    "CUDA error: an illegal memory access",
    "CUDA error: misaligned address",
    "CUDA error: device-side assert",
    "CUDA error: unspecified launch failure",
    "HIP error: an illegal memory access",
)

# Taken as root causes although they have causes themselves: Inductor's error contains the compiler's output.
_ROOTS = frozenset({"CppCompileError"})

# Errors raised when Python, its import system or a linker reads a truncated or overwritten file.
_DAMAGED_TYPES = frozenset(
    {"ImportError", "SyntaxError", "UnicodeDecodeError", "EOFError", "UnpicklingError", "JSONDecodeError"}
)
_DAMAGED_TEXT = ("Failed to import", "has no attribute 'call'", "PCH file", "null bytes")
# A cache path that is not a writable directory.
_UNUSABLE_ERRNO = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}
)
# The timeout of a lock file in the cache directory that another process holds forever.
_LOCKED_TYPE = "Timeout"
# Signs that a C++ compiler failed for lack of resources, not because of its input.
_OUT_OF_RESOURCES = ("No space left", "Killed", "Cannot allocate memory", "out of memory", "Too many open files")

# Reasons for an autotuning candidate to fail that are not its own: by class, and in the text of torch's wrappers.
_PASSING_TYPES = frozenset(
    {"OutOfMemoryError", "MemoryError", "OSError", "PTXASError", "EOFError", "BrokenExecutor", "SubprocException"}
)
_TOO_LARGE = "uses too much"  # what `ptxas` says of a kernel's shared memory
_PASSING_TEXT = (*_OUT_OF_RESOURCES, "OutOfMemoryError", "PTXASError")

# Maximum length of a message in a log line.
_LINE = 200

# Torch's wrapper exceptions that set neither `inner_exception` nor `__cause__`: their `__context__` is the cause. For
# all other classes, `__context__` may be unrelated.
_WRAPS_ITS_CONTEXT = frozenset({"InternalTorchDynamoError", "LoweringException"})


@dataclass(frozen=True)
class CompileFailure:
    """Record of one failed attempt: text and numbers only, so it can be pickled, logged and kept.

    Attributes:
        kind: ``"transient"`` if the policy allows a retry, ``"permanent"`` if not.
        error_type: Qualified name of the root cause's class, for example ``"builtins.OSError"``.
        message: The root cause's message.
        stage: The failing stage: ``"torch.compile"`` (the call to it), ``"trace"`` (inside Dynamo) or ``"backend"``
            (the compiler that received the captured graph; forward or backward).
        frame: The Python frame that was being compiled, as ``(function, file, line)``.
        attempt: The attempt's number within the episode, from 1.
        call: Number of the decorated function's call in which it failed, from 1.
        traceback: The formatted traceback of the exception and its causes; empty if it failed on another rank.
        rank: The rank on which it failed, if the function has a group of ranks.
    """

    kind: FailureKind
    error_type: str
    message: str
    stage: FailureStage
    frame: tuple[str, str, int]
    attempt: int
    call: int
    traceback: str
    rank: int | None = None

    def __str__(self) -> str:
        _, _, output = self.message.rpartition("Output:\n")  # a C++ compiler's output
        text = output.strip()
        first_line = text.splitlines()[0][:_LINE] if text else ""
        return f"{self.error_type.removeprefix('builtins.')}: {first_line}".removesuffix(": ")


def reason(exc: BaseException) -> Hashable:
    """Return equal keys for root causes that are probably the same: the class, and the number of a system error."""
    return qualified_name(exc), exc.errno if isinstance(exc, OSError) else None


def in_words(location: Location) -> str:
    """Format function, file and line for messages."""
    function, file, line = location
    return f"{function} ({file}:{line})"


def summary(failure: CompileFailure) -> str:
    """Describe a failed attempt in one line."""
    where = "" if failure.rank is None else f" on rank {failure.rank}"
    when = f"attempt {failure.attempt} failed{where} in call {failure.call}"
    return f"{when}: {failure}, compiling {in_words(failure.frame)}"


def causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield the exception and all exceptions that it wraps or was raised from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        inner = getattr(current, "inner_exception", None)
        if type(current).__name__ in _ROOTS:
            return
        if isinstance(inner, BaseException):
            current = inner
        elif current.__cause__ is not None:
            current = current.__cause__
        elif type(current).__name__ in _WRAPS_ITS_CONTEXT:
            current = current.__context__
        else:
            current = None


def root_cause(exc: BaseException) -> BaseException:
    """Return the innermost cause: the exception raised by the compiler, the disk or the allocator."""
    *_, root = causes(exc)
    return root


def _names(exc: BaseException) -> Iterator[str]:
    return (cls.__name__ for cls in type(exc).__mro__)


def device_error(exc: BaseException) -> BaseException | None:
    """Return the device's own error, from beneath its wrappers, if it means that the accelerator's context is gone."""
    return next((cause for cause in causes(exc) if _means_lost_context(cause)), None)


def _means_lost_context(exc: BaseException) -> bool:
    if not _FATAL_TYPES.isdisjoint(_names(exc)):
        return not any(text in str(exc) for text in _SURVIVED_TEXT)
    return isinstance(exc, RuntimeError) and str(exc).startswith(_FATAL_TEXT)


def is_fatal(exc: BaseException) -> bool:
    """Return True if the accelerator's context is gone, so that eager execution cannot continue either."""
    return device_error(exc) is not None


def is_from_compiler(exc: BaseException | None) -> bool:
    """Return True for an exception of one of Dynamo's or Inductor's own classes."""
    return type(exc).__module__.startswith(("torch._dynamo.", "torch._inductor."))


def is_transient(exc: BaseException) -> bool:
    """Return True if a compile failure may be transient. This is the default ``retry`` of a :class:`RetryPolicy`.

    It classifies the root cause, beneath PyTorch's wrapper exceptions. An unknown kind of failure counts as transient,
    because the backoff bounds its cost.

    Args:
        exc: The exception raised by an attempt.

    Returns:
        ``False`` for failures that would occur again (code that cannot be traced, a missing lowering, no Triton, a
        kernel that does not fit the device) and for fatal accelerator errors; ``True`` for all others.
    """
    root = root_cause(exc)
    return _PERMANENT.isdisjoint(_names(root)) and not is_fatal(root)


def may_pass(exc: BaseException) -> bool:
    """Return True if an autotuning candidate failed for lack of memory or disk space, or because a process ended.

    A candidate that is wrong, or too large for the device, would fail again.
    """
    root = root_cause(exc)
    if not is_transient(root) or _TOO_LARGE in str(root):
        return False
    return not _PASSING_TYPES.isdisjoint(_names(root)) or any(text in str(root) for text in _PASSING_TEXT)


def suggests_damaged_cache(exc: BaseException, attempt: int) -> bool:
    """Return True if the next attempt should use another cache directory.

    Args:
        exc: The root cause of the failure.
        attempt: Number of the failed attempt within its episode. If a C++ compiler rejects its input, the reason may be
            a truncated file or something else, so only every second attempt uses another directory.
    """
    text = str(exc)
    if isinstance(exc, OSError) and exc.errno in _UNUSABLE_ERRNO:
        return True
    if not _DAMAGED_TYPES.isdisjoint(_names(exc)) or any(sign in text for sign in _DAMAGED_TEXT):
        return True
    if type(exc).__name__ == _LOCKED_TYPE and hasattr(exc, "lock_file"):
        return True
    rejected = type(exc).__name__ == "CppCompileError" and not any(sign in text for sign in _OUT_OF_RESOURCES)
    return rejected and attempt % 2 == 0


def qualified_name(exc: BaseException) -> str:
    """Return the class of an exception as ``module.name``."""
    return f"{type(exc).__module__}.{type(exc).__qualname__}"


def release(exc: BaseException) -> None:
    """Release the Python frames that an exception holds, and with them the call's tensors.

    PyTorch's exceptions and their frames form reference cycles, so they would live until a garbage collection.
    """
    for cause in causes(exc):
        cause.__traceback__ = None
        if hasattr(cause, "first_useful_frame"):
            cause.first_useful_frame = None


def format_traceback(exc: BaseException) -> str:
    """Format the traceback, including causes, without the values of local variables."""
    return "".join(traceback.format_exception(exc))
