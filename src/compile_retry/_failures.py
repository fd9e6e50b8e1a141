"""What went wrong: the root cause of a compile failure, its kind, and the record that is kept of it.

Knows exceptions by the names of their classes, so it imports neither torch nor Triton, and keeps text only: a kept
exception would keep the call's tensors alive.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

# Function, file and line.
Location: TypeAlias = tuple[str, str, int]

FailureKind = Literal["transient", "permanent"]
FailureStage = Literal["torch.compile", "trace", "backend"]

# Compiling the same graph again cannot end differently: the code cannot be traced, the backend lacks something, or the
# machine does. By class name, anywhere in the method resolution order.
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

# After one of these the accelerator's context is gone and eager execution fails as well.
_FATAL_TYPES = frozenset({"AcceleratorError"})
_FATAL_TEXT = (
    "CUDA error: an illegal memory access",
    "CUDA error: misaligned address",
    "CUDA error: device-side assert",
    "CUDA error: unspecified launch failure",
    "HIP error: an illegal memory access",
)

# Names its own cause better than what it was raised from: inductor's has the compiler's output.
_ROOTS = frozenset({"CppCompileError"})

# What a file says that was cut short or overwritten, when Python, its import machinery or a linker reads it.
_DAMAGED_TYPES = frozenset(
    {"ImportError", "SyntaxError", "UnicodeDecodeError", "EOFError", "UnpicklingError", "JSONDecodeError"}
)
_DAMAGED_TEXT = ("Failed to import", "has no attribute 'call'", "PCH file", "null bytes")
# A cache directory that is none, or cannot be written to; and a lock in it that somebody holds for ever.
_UNUSABLE_ERRNO = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}
)
_LOCKED_TYPE = "Timeout"
# Says of a C++ compiler that failed that it is not for what it was given to read.
_OUT_OF_RESOURCES = ("No space left", "Killed", "Cannot allocate memory", "out of memory", "Too many open files")

# So much of a message is put into a log line.
_LINE = 200

# Wrappers that torch puts round a cause without naming it in `inner_exception` or `__cause__`: the exception that was
# being handled is the cause. For any other class `__context__` is a coincidence.
_WRAPS_ITS_CONTEXT = frozenset({"InternalTorchDynamoError", "LoweringException"})


@dataclass(frozen=True)
class CompileFailure:
    """What is known of one failed attempt: text and numbers only, so it can be pickled, logged and kept.

    Attributes:
        kind: ``"transient"`` if it is worth another attempt, ``"permanent"`` if not.
        error_type: Qualified name of the root cause's class, for example ``"builtins.OSError"``.
        message: The root cause's message.
        stage: Where it failed: ``"torch.compile"`` (the call of that name), ``"trace"`` (inside Dynamo) or
            ``"backend"`` (the compiler that was handed the captured graph; forward or backward).
        frame: The Python frame that was being compiled, as ``(function, file, line)``.
        attempt: The attempt's number within the episode, from 1.
        call: The call of the decorated function in which it failed, from 1.
        traceback: The formatted traceback of the exception and its causes.
    """

    kind: FailureKind
    error_type: str
    message: str
    stage: FailureStage
    frame: tuple[str, str, int]
    attempt: int
    call: int
    traceback: str

    def __str__(self) -> str:
        _, _, output = self.message.rpartition("Output:\n")  # what a C++ compiler has said
        text = output.strip()
        first_line = text.splitlines()[0][:_LINE] if text else ""
        return f"{self.error_type.removeprefix('builtins.')}: {first_line}".removesuffix(": ")


def in_words(location: Location) -> str:
    """Function, file and line, for people."""
    function, file, line = location
    return f"{function} ({file}:{line})"


def summary(failure: CompileFailure) -> str:
    """What failed, when and where: one line."""
    when = f"attempt {failure.attempt} failed in call {failure.call}"
    return f"{when}: {failure}, compiling {in_words(failure.frame)}"


def causes(exc: BaseException) -> Iterator[BaseException]:
    """The exception and, below it, each one that it wraps or was raised from, outermost first."""
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
    """The innermost cause: what the compiler, the disk or the allocator raised."""
    *_, root = causes(exc)
    return root


def _names(exc: BaseException) -> Iterator[str]:
    return (cls.__name__ for cls in type(exc).__mro__)


def is_fatal(exc: BaseException) -> bool:
    """Whether eager execution cannot go on either: the accelerator's context is gone."""
    root = root_cause(exc)
    if not _FATAL_TYPES.isdisjoint(_names(root)):
        return True
    return isinstance(root, RuntimeError) and str(root).startswith(_FATAL_TEXT)


def is_transient(exc: BaseException) -> bool:
    """Whether a compile failure may pass: the default answer to "is this worth another attempt?".

    Looks at the root cause, below the wrappers that torch puts round it. A failure of unknown kind is transient: the
    backoff bounds what it can cost.

    Args:
        exc: The exception that an attempt raised.

    Returns:
        ``False`` for what cannot end differently (code that cannot be traced, a missing lowering, no Triton, a kernel
        that does not fit the device) and after fatal accelerator errors; ``True`` for everything else.
    """
    root = root_cause(exc)
    return _PERMANENT.isdisjoint(_names(root)) and not is_fatal(root)


def suggests_damaged_cache(exc: BaseException, attempt: int) -> bool:
    """Whether another attempt should keep its files in another directory than this one did.

    Args:
        exc: The root cause of the failure.
        attempt: Number of the failed attempt within its episode. What a C++ compiler rejects may be a file that was cut
            short or anything else: then every second attempt is made elsewhere.
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
    """The class of an exception as ``module.name``."""
    return f"{type(exc).__module__}.{type(exc).__qualname__}"


def release(exc: BaseException) -> None:
    """Let go of the frames that an exception holds, and through them of a call's tensors.

    torch's exceptions point at frames that point back at them; without this they live until garbage is collected.
    """
    for cause in causes(exc):
        cause.__traceback__ = None
        if hasattr(cause, "first_useful_frame"):
            cause.first_useful_frame = None


def format_traceback(exc: BaseException) -> str:
    """The traceback with its causes as text, without the local variables' values."""
    return "".join(traceback.format_exception(exc))
