"""A C++ compiler that fails on request: a script that `CXX` names, in front of the real compiler."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# The files `mode` and `count`, next to the script, hold the current mode and the number of invocations since it was
# set. A mode counts "every" invocation, or only those for a "kernel", which excludes probes of the processor.
SCRIPT = """#!/bin/bash
place=$(dirname "$0")
mode=none; which=every; number=0
[ -e "$place/mode" ] && read -r mode which number < "$place/mode"
if [ "$which" = every ] || [[ "$*" == *.main.cpp* ]]; then echo >> "$place/count"; fi
if [ "$number" != 0 ] && { [ "$(wc -l < "$place/count")" != "$number" ] ||
    { [ "$which" = kernel ] && [[ "$*" != *.main.cpp* ]]; }; }; then mode=none; fi
output=; previous=
for argument in "$@"; do
    [ "$previous" = -o ] && output=$argument
    previous=$argument
done
case $mode in
fail) echo "internal compiler error: told to" >&2; exit 1 ;;
kill) @CXX@ "$@" & sleep 0.1; kill -KILL $! ; kill -KILL $$ ;;
kill-parent) [ "$PPID" = "$(cat "$place/trainer")" ] || kill -KILL "$PPID"; exec @CXX@ "$@" ;;
garbage) if [ -n "$output" ]; then head -c 4096 /dev/urandom > "$output"; exit 0; fi ;;
memory) ulimit -v 60000 ;;
wipe) @CXX@ "$@"; status=$?; rm -rf "$place"/cache/*; exit $status ;;
wipe-before) rm -rf "$place"/cache/* ;;
wipe-headers) @CXX@ "$@"; status=$?; find "$place/tmp" -name '*.gch' -delete; exit $status ;;
esac
exec @CXX@ "$@"
"""


class Script:
    """The script, in a directory with the files that control it."""

    def __init__(self, place: Path) -> None:
        self.path = place / "c++"
        self._mode, self._count = place / "mode", place / "count"
        self._trainer = place / "trainer"

    def install(self) -> None:
        self._trainer.write_text(str(os.getpid()))
        real = shutil.which("g++") or shutil.which("c++")
        self._count.write_text("")
        self.path.write_text(SCRIPT.replace("@CXX@", real or "c++"))
        self.path.chmod(0o755)

    def tell(self, mode: str) -> None:
        """Set the mode. With a number, it applies only to that invocation, counted from now."""
        if mode != "none":
            self._count.write_text("")
        self._mode.write_text(f"{mode}\n")

    def invocations(self) -> int:
        """Return the number of invocations since a mode other than "none" was set."""
        return len(self._count.read_text())
