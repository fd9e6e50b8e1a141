"""The faults: how each one begins and ends. All of them are real, and happen inside the training process."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .compilers import Script

POSITIONS = ("first call", "recompile", "second graph", "backward")


@dataclass
class Place:
    """The files of one run, and the original limits, which some faults need in order to end."""

    root: Path
    limits: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def script(self) -> Script:
        return Script(self.root)


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: Its name in the table.
        made: A description of how it is made.
        begin: Begins it.
        end: Ends it; None if it is never repaired, so that the library must work around it.
        positions: The positions at which it can hit.
        tmpfs: The directory, relative to the run's, that must be a tmpfs, which needs root; None if none.
        script: Whether the compiler must be the script.
        may_miss: Whether torch may cope with it by itself.
        populate: Whether another process has compiled the same code into the same cache before.
        environment: Environment variables that are set from the start.
        left_out: The reason why it is not made at the other positions.
    """

    name: str
    made: str
    begin: Callable[[Place], None]
    end: Callable[[Place], None] | None
    positions: tuple[str, ...] = POSITIONS
    tmpfs: str | None = None
    script: bool = False
    may_miss: bool = False
    populate: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    left_out: str = "-"


def nothing(place: Place) -> None:
    """Do nothing, for a fault that ends by itself."""


# Disks


def fill(place: Place) -> None:
    with (place.root / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def empty(place: Place) -> None:
    (place.root / "filler").unlink()


def remount(options: str, where: str = ".") -> Callable[[Place], None]:
    def run(place: Place) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place.root / where)], check=True)

    return run


def replace_by_file(place: Place) -> None:
    if place.cache.exists():
        place.cache.rename(place.root / "aside")
    place.cache.write_text("")


def put_back(place: Place) -> None:
    place.cache.unlink()
    if (place.root / "aside").exists():
        (place.root / "aside").rename(place.cache)


# Limits of the process


def limit(which: int, value: Callable[[], int]) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        place.limits[which] = resource.getrlimit(which)
        resource.setrlimit(which, (value(), place.limits[which][1]))

    return run


def unlimit(which: int) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        resource.setrlimit(which, place.limits[which])

    return run


def _lowest_free_descriptor() -> int:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def _a_little_more_memory(entry: str) -> Callable[[], int]:
    def value() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))
        return (kilobytes << 10) + (1 << 20)

    return value


# Compilers


def tell(mode: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        place.script.tell(mode)

    return run


def hide_compiler(place: Place) -> None:
    place.script.path.rename(place.root / "hidden")


def bring_compiler_back(place: Place) -> None:
    (place.root / "hidden").rename(place.script.path)


def kill_sidecar(place: Place) -> None:
    """Kill the idle process that owns the compile workers."""
    killed = False
    for line in Path("/proc/self/task").glob("*/children"):
        for child in line.read_text().split():
            command = Path("/proc", child, "cmdline").read_bytes()
            if b"compile_worker" in command:
                os.kill(int(child), signal.SIGKILL)
                time.sleep(0.5)  # torch notices it when it reads from the pipe
                killed = True
    assert killed, "no compile worker to kill"


# Files


def cut(pattern: str, part: float, where: str = "cache") -> Callable[[Place], None]:
    def run(place: Place) -> None:
        cut_any = False
        for file in (place.root / where).rglob(pattern):
            if file.is_file() and not file.name.endswith(".lock"):
                # Create a new file, because processes keep the old one's contents mapped into their memory.
                content = file.read_bytes()
                file.unlink()
                file.write_bytes(content[: int(len(content) * part)])
                cut_any = True
        assert cut_any, f"no {pattern} to cut short"

    return run


def cut_source(place: Place) -> None:
    cut("*.main.cpp", 0.5)(place)
    for library in place.cache.rglob("*.main.so"):
        library.unlink()


def wipe(where: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        for entry in (place.root / where).iterdir():
            shutil.rmtree(entry, ignore_errors=True)

    return run


HEADERS = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "1"}
WORKER = {"TORCHINDUCTOR_FX_COMPILE_MODE": "SUBPROCESS"}
NOT_IN_WORKER = "the compile runs in the worker, out of the test's reach"
FROM_CACHE = ("first call", "recompile")


def _compiler(name: str, made: str, mode: str, **more: object) -> Fault:
    return Fault(name, made, tell(mode), tell("none"), script=True, **more)  # type: ignore[arg-type]  # passed on to Fault


def _cut_short(suffix: str, begin: Callable[[Place], None], part: str = "half") -> Fault:
    made = f"every {suffix} in the cache truncated to {part} after another process wrote it; never repaired"
    why = "the files of another process are read before the graph is split"
    return Fault(f"truncated {suffix}", made, begin, None, FROM_CACHE, populate=True, may_miss=True, left_out=why)


FAULTS = [
    Fault("full disk", "a full tmpfs", fill, empty, tmpfs="."),
    Fault("read-only disk", "a tmpfs with cache and TMPDIR, remounted ro", remount("ro"), remount("rw"), tmpfs="."),
    Fault(
        "read-only cache",
        "a tmpfs with the cache, remounted ro; never repaired",
        remount("ro", "cache"),
        None,
        tmpfs="cache",
    ),
    Fault("cache directory cannot be created", "a file in its place", replace_by_file, put_back),
    Fault(
        "file-size limit",
        "RLIMIT_FSIZE of 512 bytes",
        limit(resource.RLIMIT_FSIZE, lambda: 512),
        unlimit(resource.RLIMIT_FSIZE),
    ),
    Fault(
        "too many open files",
        "RLIMIT_NOFILE at the lowest free descriptor",
        limit(resource.RLIMIT_NOFILE, _lowest_free_descriptor),
        unlimit(resource.RLIMIT_NOFILE),
    ),
    Fault(
        "memory limit of the process",
        "RLIMIT_DATA 1 MB above what is in use",
        limit(resource.RLIMIT_DATA, _a_little_more_memory("VmData")),
        unlimit(resource.RLIMIT_DATA),
        may_miss=True,
    ),
    Fault("no compiler", "CXX names a missing file", hide_compiler, bring_compiler_back, script=True),
    _compiler("compiler killed", "SIGKILL 0.1 s into each compile", "kill every 0"),
    _compiler("compiler writes garbage", "4 KB of noise instead of each library, exit status 0", "garbage every 0"),
    _compiler("compiler out of memory", "ulimit -v in a CXX script", "memory every 0"),
    _compiler("cache wiped after each compile", "a CXX script that wipes it", "wipe every 0"),
    _compiler("cache wiped before each compile", "a CXX script that wipes it", "wipe-before every 0"),
    Fault(
        "cache wiped once",
        "all its files removed",
        wipe("cache"),
        nothing,
        ("recompile",),
        may_miss=True,
        left_out="it does not exist yet",
    ),
    _compiler(
        "precompiled header wiped after each compile",
        "a CXX script that wipes it from TMPDIR",
        "wipe-headers every 0",
        environment=HEADERS,
        may_miss=True,
    ),
    Fault(
        "precompiled header wiped once",
        "TMPDIR emptied",
        wipe("tmp"),
        nothing,
        ("recompile",),
        environment=HEADERS,
        left_out="it does not exist yet",
    ),
    Fault(
        "truncated .gch",
        "every precompiled header truncated to half; never repaired",
        cut("*.gch", 0.5, "tmp"),
        None,
        ("recompile",),
        environment=HEADERS,
        left_out="it does not exist yet",
    ),
    _cut_short(".so", cut("*.so", 0.0), "zero"),
    _cut_short(".py", cut("*.py", 0.5)),
    _cut_short(".cpp", cut_source),
    _cut_short("FX graph", cut("fxgraph/*/*/*", 0.5)),
    _cut_short("autograd entry", cut("aotautograd/*/*", 0.5)),
    _compiler(
        "compile worker killed while compiling",
        "SIGKILL to the worker, from the CXX script that it started",
        "kill-parent kernel 0",
        positions=("first call", "recompile", "second graph"),
        environment=WORKER,
        left_out=NOT_IN_WORKER,
    ),
    Fault(
        "compile workers' parent killed while idle",
        "SIGKILL; the library creates a new one",
        kill_sidecar,
        None,
        ("recompile", "second graph"),
        environment=WORKER,
        may_miss=True,
        left_out="it does not exist yet, or is not idle",
    ),
    *(
        _compiler(
            f"compiler fails at invocation {k}",
            "a CXX script that counts",
            f"fail every {k}",
            may_miss=True,
            positions=("first call", *(("recompile", "second graph", "backward") if k <= 6 else ())),
            left_out="the compile has fewer invocations",
        )
        for k in range(1, 18)
    ),
]
BY_NAME = {fault.name: fault for fault in FAULTS}
