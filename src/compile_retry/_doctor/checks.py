"""Would ``torch.compile`` work here? The checks, each a function of what the child process has found.

Nothing here asks torch itself: see `child`, and `process` for how it is run and ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from .process import Findings, ask

Status = Literal["ok", "warning", "failed", "skipped"]
Facts = Mapping[str, Any]

# With less left, a disk is about to be full: precompiled headers alone take 150 MB.
_LITTLE_ROOM = 2**30
# An attempt in another directory is not worth beginning with less time than importing torch may take.
_SECONDS_TO_BEGIN = 3.0

_DISABLING = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
# The value that has an effect, None if any has, and which it is.
_CHANGING: dict[str, tuple[str | None, str]] = {
    "COMPILE_RETRY_STRICT": ("1", "failed compiles raise"),
    "TORCHDYNAMO_SUPPRESS_ERRORS": (None, "what fails to compile runs eagerly for good, without an exception"),
    "TORCH_COMPILE_OVERRIDE_BACKENDS": (None, "some graphs get another backend"),
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": ("1", "nothing is taken from the cache"),
    "TORCH_COMPILE_FORCE_DISABLE_CACHES": ("1", "nothing is taken from the cache"),
    "TORCHINDUCTOR_VEC_ISA_OK": ("0", "code without vector instructions"),
    "ATEN_CPU_CAPABILITY": (None, "other vector instructions than the best"),
    "TORCH_COMPILE_DEBUG": ("1", "files for debugging are written at each compile"),
}


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: What was checked.
        status: ``"ok"``, ``"warning"`` (compiling works, but not as it should), ``"failed"`` or ``"skipped"`` (there is
            nothing to check, or it could not be).
        detail: What was found, in a line.
        remedy: What to do about it; empty where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(timeout: float) -> list[Check]:
    """Run every check.

    Args:
        timeout: Seconds after which the child is ended, whatever it is doing.

    Returns:
        The checks, always the same ones in the same order.
    """
    due = time.monotonic() + timeout
    findings = ask("look" if _disabled_by() else "compile", timeout)
    elsewhere = _try_elsewhere(findings, due - time.monotonic())
    checks = [_environment()]
    for name, judge in _CHECKS.items():
        checks.append(_not_known(name, findings, timeout) or judge(name, findings.facts[name]))
    return [_with_cause(check, findings.facts, elsewhere) for check in checks]


def _not_known(name: str, findings: Findings, timeout: float) -> Check | None:
    """For a step that was not finished: it is to blame, or another one is."""
    if name in findings.facts:
        return None
    if _disabled_by() and name in _COMPILING:
        return Check(name, "skipped", f"{_disabled_by()} is set")
    if findings.during not in (None, name):
        return Check(name, "skipped", f"not reached: see {findings.during}")
    if findings.stopped:
        limit = f" (limit: {timeout:g} s)" if findings.during and "too long" in findings.stopped else ""
        return Check(name, "failed", findings.stopped + limit, _REMEDIES_WHEN_STOPPED.get(name, ""))
    return Check(name, "skipped", "not reached: see versions")


def _disabled_by() -> str:
    return ", ".join(f"{name}=1" for name in _DISABLING if os.environ.get(name) == "1")


def _environment() -> Check:
    name = "environment"
    if disabled := _disabled_by():
        return Check(name, "failed", f"{disabled}: torch.compile does nothing", "unset it")
    changes = [
        f"{variable}={os.environ[variable]}: {effect}"
        for variable, (value, effect) in _CHANGING.items()
        if os.environ.get(variable) and value in (None, os.environ[variable])
    ]
    if changes:
        return Check(name, "warning", "; ".join(changes), "unset what is not meant")
    return Check(name, "ok", "no variable that disables or changes compiling")


def _versions(name: str, facts: Facts) -> Check:
    if "error" in facts:
        return Check(name, "failed", facts["error"], "install a Python and a PyTorch that support each other")
    return Check(name, "ok", "Python {python}, torch {torch}, compile-retry {compile_retry}".format(**facts))


def _directory(variable: str) -> Callable[[str, Facts], Check]:
    def check(name: str, facts: Facts) -> Check:
        if "path" not in facts:
            return Check(name, "failed", facts["error"], f"set {variable} to a directory that can be written")
        if "error" in facts:
            text = f"{facts['path']} cannot be written: {facts['error']}"
            return Check(name, "failed", text, f"repair it, or set {variable} to another directory")
        room = f"{facts['path']}, {facts['free'] / 2**30:.1f} GiB free"
        if facts["free"] < _LITTLE_ROOM:
            return Check(name, "warning", room, f"make room, or set {variable} to another directory")
        return Check(name, "ok", room)

    return check


def _compiler(name: str, facts: Facts) -> Check:
    found = ", ".join(facts[key] for key in ("path", "version") if key in facts)
    if "error" in facts:
        text = f"{found}: {facts['error']}" if found else facts["error"]
        if "No space left" in text:
            return Check(name, "failed", text, "see temporary directory")
        remedy = "install g++ with OpenMP and Python's headers (Debian: g++ and python3-dev)"
        if "CXX" in os.environ:
            remedy += f", or correct CXX={os.environ['CXX']}: inductor takes the name of one program"
        return Check(name, "failed", text, remedy)
    return Check(name, "ok", found)


def _vector_instructions(name: str, facts: Facts) -> Check:
    if "error" in facts:
        return Check(name, "failed", facts["error"], "see C++ compiler and cache directory")
    found, elsewhere = facts["found"], facts.get("found elsewhere", [])
    best = found[0] if found else "none"
    if len(elsewhere) > len(found):
        return Check(name, "failed", f"{best}, but {elsewhere[0]} in a new cache directory", _DELETE)
    if not found and facts["processor"]:
        text = f"none, but the processor has {', '.join(facts['processor'])}: compiled code will be slow"
        return Check(name, "failed", text, "see C++ compiler; is TORCHINDUCTOR_VEC_ISA_OK set?")
    missing = sorted({*facts["processor"]} - {*" ".join(found).split()})
    return Check(name, "ok", f"{best} (not {', '.join(missing)})" if missing else best)


def _compile(name: str, facts: Facts) -> Check:
    """A forward and a backward graph that were compiled for the first time, or the same ones as ever."""
    if "error" in facts:
        return Check(name, "failed", facts["error"])
    if not facts["compiled"]:
        return Check(name, "failed", "torch.compile ran eagerly", _SEE_ENVIRONMENT)
    how = "from the cache" if facts["from cache"] else "compiled"
    return Check(name, "ok", f"forward and backward {how} in {facts['seconds']:.2g} s, results as in eager")


def _gpu(name: str, facts: Facts) -> Check:
    if "device" not in facts:
        return Check(name, "failed", facts["error"])
    if facts["device"] is None:
        built = f"; torch is built for {facts['built for']}" if facts["built for"] else ""
        return Check(name, "skipped", f"not present{built}")
    device = facts.get("name", facts["device"])
    if not facts.get("triton works", True):
        version = facts["triton"]
        text = f"Triton {version} does not support it" if version else "Triton is not installed"
        return Check(name, "failed", f"{device}: {text}", "install the Triton that this torch needs")
    compiled = _compile(name, facts)
    return Check(name, compiled.status, f"{device}: {compiled.detail}", compiled.remedy)


_SEE_ENVIRONMENT = "see environment"
# Inductor runs it to find out whether a precompiled header is still right.
_NO_OPENSSL = "No such file or directory: 'openssl'"
_DELETE = "files in the cache directory are damaged: delete it once no process uses it"
_COMPILING = ("compile", "cached compile", "GPU")
_CHECKS: dict[str, Callable[[str, Facts], Check]] = {
    "versions": _versions,
    "cache directory": _directory("TORCHINDUCTOR_CACHE_DIR"),
    "temporary directory": _directory("TMPDIR"),
    "C++ compiler": _compiler,
    "vector instructions": _vector_instructions,
    "compile": _compile,
    "cached compile": _compile,
    "GPU": _gpu,
}
_REMEDIES_WHEN_STOPPED = {
    "C++ compiler": "run it by hand; give --timeout more seconds if it is only slow",
    "cached compile": "a damaged file or a lock that somebody holds in the cache directory; try an empty one",
}


def _try_elsewhere(findings: Findings, seconds: float) -> Facts:
    """Where a compile failed though the compiler works, what comes of it in a new directory."""
    failed = any(_failed(name, findings) for name in ("compile", "cached compile"))
    if not failed or _failed("C++ compiler", findings) or seconds < _SECONDS_TO_BEGIN:
        return {}
    return ask("elsewhere", seconds).facts.get("elsewhere", {})


def _failed(name: str, findings: Findings) -> bool:
    return findings.during == name or "error" in findings.facts.get(name, {})


def _with_cause(check: Check, facts: Mapping[str, Facts], elsewhere: Facts) -> Check:
    """Say of a failed compile what an attempt in a new directory makes of it."""
    if check.name not in ("compile", "cached compile") or check.status != "failed" or check.remedy == _SEE_ENVIRONMENT:
        return check
    detail, remedy = _cause(check, facts, elsewhere)
    return replace(check, detail=check.detail + detail, remedy=remedy or check.remedy)


def _cause(check: Check, facts: Mapping[str, Facts], elsewhere: Facts) -> tuple[str, str]:
    """What to add to the failed compile's detail, and its remedy."""
    if "error" in facts.get("C++ compiler", {}):
        return "", "see C++ compiler"
    if "error" in elsewhere:
        return "; fails in a new cache directory, too", ""
    if "without headers" in elsewhere:
        repair = "install openssl" if _NO_OPENSSL in check.detail else f"delete {elsewhere['without headers']}"
        remedy = f"{repair}, or set TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS=0"
        return "; works without precompiled headers", remedy
    if not elsewhere.get("compiled"):  # it was not tried, or did not end
        return "", ""
    directory = facts.get("cache directory", {}).get("path", "the cache directory")
    works = "; works in a new cache directory"
    if "error" in facts.get("compile", {}):  # which was made in an empty directory below the usual one
        return works, f"set TORCHINDUCTOR_CACHE_DIR to another directory than {directory}"
    return works, f"poisoned cache suspected: delete {directory} once no process uses it"
