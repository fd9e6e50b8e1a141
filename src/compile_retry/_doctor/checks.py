"""Checks of ``torch.compile`` on this machine, each based on the findings of the child process.

Nothing here uses torch itself: `child` does, and `process` runs and ends the child.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from compile_retry._switches import is_set

from .process import Findings, Tell, ask

Status = Literal["ok", "warning", "failed", "skipped"]
Facts = Mapping[str, Any]
Judge: TypeAlias = Callable[[str, Facts], "Check"]

# A disk with less free space is about to be full: precompiled headers alone take 150 MB.
_MIN_FREE_BYTES = 2**30
# An autotuning of a large matrix product needs about that much device memory.
_MIN_FREE_DEVICE_BYTES = 2**30
# Minimum time left for a compile in another directory: importing torch alone may take as long.
_SECONDS_TO_BEGIN = 3.0

_DISABLING = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
# For each variable, the value that has an effect (None for any value), and the effect.
_CHANGING: dict[str, tuple[str | None, str]] = {
    "COMPILE_RETRY_STRICT": ("1", "failed compiles raise"),
    "TORCHDYNAMO_SUPPRESS_ERRORS": (None, "frames that fail to compile run eagerly for good, without an error"),
    "TORCH_COMPILE_OVERRIDE_BACKENDS": (None, "some graphs use another backend"),
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": ("1", "compile caches are disabled"),
    "TORCH_COMPILE_FORCE_DISABLE_CACHES": ("1", "compile caches are disabled"),
    "TORCHINDUCTOR_VEC_ISA_OK": ("0", "compiled code uses no vector instructions"),
    "ATEN_CPU_CAPABILITY": (None, "code may not use the best vector instructions"),
    "TORCH_COMPILE_DEBUG": ("1", "each compile writes debug files"),
}


# The words that ``COMPILE_RETRY`` may contain, and their effects.
_SWITCHES = {
    "off": "functions are compiled without a fallback",
    "strict": "failed compiles raise",
    "install": "whatever calls torch.compile gets a fallback",
}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: The name of the check.
        status: ``"ok"``, ``"warning"`` (compilation works, but not as it should), ``"failed"`` or ``"skipped"`` (there
            is nothing to check, or it could not be checked).
        detail: The finding, in one line.
        remedy: The advice; empty if there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(timeout: float, report: Callable[[Check], None] = lambda check: None) -> list[Check]:
    """Run all checks. Once torch is imported, those of the GPU run at the same time as the others.

    Args:
        timeout: Seconds after which the children are ended, whatever they are doing.
        report: Called with each result as soon as it is known, possibly from another thread.

    Returns:
        The results, always in the same order. Without a GPU, there is only one check of it.
    """
    due = time.monotonic() + timeout
    reported: set[str] = set()

    def tell(name: str, facts: Facts) -> None:
        check = {**_CHECKS, **_GPU_CHECKS}[name](name, facts)
        if name not in _COMPILING or check.status == "ok":  # otherwise the cause is not known yet
            reported.add(name)
            report(check)
        if name == "versions" and check.status == "ok" and not _disabled_by():
            gpu.start()

    gpu = _AskingInBackground(due, tell)
    environment = _environment()
    report(environment)
    findings = ask("look" if _disabled_by() else "compile", timeout, tell)
    elsewhere = _try_elsewhere(findings, due - time.monotonic())
    of_gpu = gpu.result() or findings
    checks = [_with_cause(check, findings.facts, elsewhere) for check in _judged(_CHECKS, findings, timeout)]
    is_present = of_gpu.facts.get("GPU", {}).get("device") == "cuda"
    checks += _judged(_GPU_CHECKS if is_present else {"GPU": _gpu}, of_gpu, timeout)
    for check in checks:
        if check.name not in reported:
            report(check)
    return [environment, *checks]


class _AskingInBackground(threading.Thread):
    """Asks about the GPU. A daemon, so that Ctrl-C does not wait for it; its child ends with this process."""

    def __init__(self, due: float, tell: Tell) -> None:
        super().__init__(daemon=True)
        self._due, self._tell = due, tell
        self._findings = Findings({}, "GPU", "the check could not be run")

    def run(self) -> None:
        self._findings = ask("gpu", self._due - time.monotonic(), self._tell)

    def result(self) -> Findings | None:
        """Wait for the findings, and return them; None if nothing was asked."""
        if self.ident is None:
            return None
        self.join()
        return self._findings


def _judged(judges: Mapping[str, Judge], findings: Findings, timeout: float) -> list[Check]:
    return [
        _without_facts(name, findings, timeout) or judge(name, findings.facts[name]) for name, judge in judges.items()
    ]


def _without_facts(name: str, findings: Findings, timeout: float) -> Check | None:
    """Return the result for a step without facts: it failed, or was skipped because of another one."""
    if name in findings.facts:
        return None
    if _disabled_by() and (name in _COMPILING or name == "GPU"):
        return Check(name, "skipped", f"{_disabled_by()} is set")
    if findings.during not in (None, name):
        return Check(name, "skipped", f"because of {findings.during}")
    if findings.stopped:
        limit = f" (limit: {timeout:g} s)" if findings.during and findings.timed_out else ""
        return Check(name, "failed", findings.stopped + limit, _REMEDIES_WHEN_STOPPED.get(name, ""))
    cause = "import torch" if _failed("import torch", findings) else "versions"
    return Check(name, "skipped", f"because of {cause}")


def _disabled_by() -> str:
    return ", ".join(f"{name}=1" for name in _DISABLING if os.environ.get(name) == "1")


def _environment() -> Check:
    name = "environment"
    if disabled := _disabled_by():
        return Check(name, "failed", f"{disabled}: torch.compile does nothing", "unset it")
    changes = _switches()
    changes += [
        f"{variable}={os.environ[variable]}: {effect}"
        for variable, (value, effect) in _CHANGING.items()
        if os.environ.get(variable) and value in (None, os.environ[variable])
    ]
    if changes:
        return Check(name, "warning", "; ".join(changes), "unset any that is not intended")
    return Check(name, "ok", "no variables that affect compilation")


def _switches() -> list[str]:
    """Return the value of ``COMPILE_RETRY`` and its effects, unless it has none."""
    effects = [effect for word, effect in _SWITCHES.items() if is_set(word)]
    if not effects and not is_set("on"):
        effects = ["not understood, so it is ignored"]
    return [f"COMPILE_RETRY={os.environ['COMPILE_RETRY']}: {', '.join(effects)}"] if effects else []


def _import_torch(name: str, facts: Facts) -> Check:
    if "error" in facts:
        place, again = (f"{facts['path']}: ", "re") if facts.get("path") else ("", "")
        return Check(name, "failed", place + facts["error"], f"{again}install PyTorch for {sys.executable}")
    return Check(name, "ok", "{path}, in {seconds:.2g} s".format(**facts))


def _versions(name: str, facts: Facts) -> Check:
    if "error" in facts:
        return Check(name, "failed", facts["error"], "install compatible versions of Python and PyTorch")
    return Check(name, "ok", "Python {python}, torch {torch}, compile-retry {compile_retry}".format(**facts))


def _directory(variable: str) -> Callable[[str, Facts], Check]:
    def check(name: str, facts: Facts) -> Check:
        if "path" not in facts:
            return Check(name, "failed", facts["error"], f"set {variable} to a writable directory")
        if "error" in facts:
            text = f"{facts['path']} is not writable: {facts['error']}"
            return Check(name, "failed", text, f"repair it, or set {variable} to another directory")
        space = f"{facts['path']}, {facts['free'] / 2**30:.1f} GiB free"
        if facts["free"] < _MIN_FREE_BYTES:
            return Check(name, "warning", space, f"free some space, or set {variable} to another directory")
        return Check(name, "ok", space)

    return check


def _compiler(name: str, facts: Facts) -> Check:
    found = ", ".join(facts[key] for key in ("path", "version") if key in facts)
    if "error" in facts:
        text = f"{found}: {facts['error']}" if found else facts["error"]
        if "No space left" in text:
            return Check(name, "failed", text, "see temporary directory")
        remedy = "install g++ with OpenMP and Python's headers (Debian: g++ and python3-dev)"
        if "CXX" in os.environ:
            remedy += f", or correct CXX={os.environ['CXX']}: Inductor expects the name of a single program"
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
    """Judge a compile of a forward and a backward graph, either new ones or always the same ones."""
    if "error" in facts:
        return Check(name, "failed", facts["error"])
    if not facts["compiled"]:
        return Check(name, "failed", "torch.compile ran the function eagerly", _SEE_ENVIRONMENT)
    how = "from the cache" if facts["from cache"] else "compiled"
    return Check(name, "ok", f"forward and backward {how} in {facts['seconds']:.2g} s, results match eager")


def _gpu(name: str, facts: Facts) -> Check:
    if "device" not in facts:
        return Check(name, "failed", facts["error"])
    if facts["device"] is None:
        built = f"; torch is built for {facts['built for']}" if facts["built for"] else ""
        return Check(name, "skipped", f"not present{built}")
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    if facts["device"] != "cuda":
        return Check(name, "skipped", f"{facts['name']}{driver}; only CUDA devices are checked further")
    return Check(name, "ok", f"{facts['name']}{driver}")


def _gpu_memory(name: str, facts: Facts) -> Check:
    if "error" in facts:
        return Check(name, "failed", facts["error"], "see GPU")
    text = f"{facts['free'] / 2**30:.1f} of {facts['total'] / 2**30:.1f} GiB free"
    if facts["free"] < _MIN_FREE_DEVICE_BYTES:
        text += ": autotuning allocates an operation's inputs and outputs a second time, and 256 MiB to clear the cache"
        return Check(name, "warning", text, "end other processes on the GPU")
    return Check(name, "ok", text)


def _ptxas(name: str, facts: Facts) -> Check:
    if "error" in facts:
        found = f"{facts['path']}: " if "path" in facts else ""
        return Check(name, "failed", found + facts["error"], "repair it, or set TRITON_PTXAS_PATH to one that works")
    return Check(name, "ok", f"{facts['path']}, {facts['version']}")


def _triton(name: str, facts: Facts) -> Check:
    if "error" in facts:
        remedy = "install the Triton version that this torch requires, and a C compiler; see ptxas"
        return Check(name, "failed", facts["error"], remedy)
    return Check(name, "ok", f"Triton {facts['version']} compiled and ran a kernel in {facts['seconds']:.2g} s")


_SEE_ENVIRONMENT = "see environment"
# Inductor runs openssl to check that a precompiled header is up to date.
_NO_OPENSSL = "No such file or directory: 'openssl'"
_DELETE = "files in the cache directory are damaged: delete it once no process uses it"
_COMPILING = ("compile", "cached compile")
_CHECKS: dict[str, Judge] = {
    "import torch": _import_torch,
    "versions": _versions,
    "cache directory": _directory("TORCHINDUCTOR_CACHE_DIR"),
    "temporary directory": _directory("TMPDIR"),
    "C++ compiler": _compiler,
    "vector instructions": _vector_instructions,
    "compile": _compile,
    "cached compile": _compile,
}
_GPU_CHECKS: dict[str, Judge] = {
    "GPU": _gpu,
    "GPU memory": _gpu_memory,
    "ptxas": _ptxas,
    "Triton": _triton,
    "GPU compile": _compile,
}
_REMEDIES_WHEN_STOPPED = {
    "import torch": "run python -X importtime -c 'import torch' to see where it stops",
    "C++ compiler": "run it by hand; increase --timeout if it is only slow",
    "cached compile": "the cache directory may contain a damaged file or a held lock; try an empty directory",
}


def _try_elsewhere(findings: Findings, seconds: float) -> Facts:
    """Compile in a new directory if a compile failed although the compiler works. Return the facts."""
    failed = any(_failed(name, findings) for name in ("compile", "cached compile"))
    if not failed or _failed("C++ compiler", findings) or seconds < _SECONDS_TO_BEGIN:
        return {}
    return ask("elsewhere", seconds).facts.get("elsewhere", {})


def _failed(name: str, findings: Findings) -> bool:
    return findings.during == name or "error" in findings.facts.get(name, {})


def _with_cause(check: Check, facts: Mapping[str, Facts], elsewhere: Facts) -> Check:
    """Add the result of the compile in a new directory to a failed check."""
    if check.name not in ("compile", "cached compile") or check.status != "failed" or check.remedy == _SEE_ENVIRONMENT:
        return check
    detail, remedy = _cause(check, facts, elsewhere)
    return replace(check, detail=check.detail + detail, remedy=remedy or check.remedy)


def _cause(check: Check, facts: Mapping[str, Facts], elsewhere: Facts) -> tuple[str, str]:
    """Return an addition to the failed compile's detail, and its remedy."""
    if "error" in facts.get("C++ compiler", {}):
        return "", "see C++ compiler"
    if "error" in elsewhere:
        return "; also fails in a new cache directory", ""
    if "without headers" in elsewhere:
        repair = "install openssl" if _NO_OPENSSL in check.detail else f"delete {elsewhere['without headers']}"
        remedy = f"{repair}, or set TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS=0"
        return "; works without precompiled headers", remedy
    if not elsewhere.get("compiled"):  # not tried, or not finished
        return "", ""
    directory = facts.get("cache directory", {}).get("path", "the cache directory")
    works = "; works in a new cache directory"
    if "error" in facts.get("compile", {}):  # which used an empty directory below the usual one
        return works, f"set TORCHINDUCTOR_CACHE_DIR to a directory other than {directory}"
    return works, f"poisoned cache suspected: delete {directory} once no process uses it"
