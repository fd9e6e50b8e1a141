"""``python -m compile_retry``: the command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, NoReturn

from ._doctor.checks import Check, Status, examine
from ._version import installed_version

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. ``run`` does not return: the program takes the place of this process.

    Args:
        arguments: The command-line arguments; by default those of the process.

    Returns:
        The exit status: 0, or 1 if a check failed or the command was interrupted.

    Raises:
        SystemExit: The command line is invalid (status 2), or asks for help or the version.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    own = len(arguments)
    if arguments[:1] == ["run"]:  # what follows is the program's own
        own = 3 if arguments[1:2] == ["-m"] else 2
    options = _parser().parse_args(arguments[:own])
    try:
        if options.command == "run":
            _run(options, arguments[own:])
        return _doctor(options)
    except KeyboardInterrupt:
        print("Aborted!", file=sys.stderr)
        return 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m compile_retry",
        description="Tools for torch.compile and its fallback.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s, version {installed_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    summary = "Check whether torch.compile works on this machine."
    doctor = commands.add_parser(
        "doctor",
        help=summary,
        description=summary,
        epilog="Exit status: 0 if no check failed, 1 if one did, 2 if the command line is invalid.",
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="Print JSON.")
    doctor.add_argument("--strict", action="store_true", help="Treat warnings as failures.")
    doctor.add_argument(
        "--timeout",
        type=_seconds,
        default=180.0,
        metavar="SECONDS",
        help="Time limit for the checks, at least 1 (default: 180).",
    )
    summary = "Run a program whose calls to torch.compile fall back to eager, and retry, without a change to its code."
    run = commands.add_parser(
        "run",
        help=summary,
        description=summary,
        usage="%(prog)s [-h] (SCRIPT | -m MODULE) [ARGUMENT ...]",
        epilog="The program runs as with python SCRIPT or python -m MODULE, with COMPILE_RETRY=install set.",
        allow_abbrev=False,
    )
    program = run.add_mutually_exclusive_group(required=True)
    program.add_argument("script", nargs="?", metavar="SCRIPT", help="The file to run.")
    program.add_argument("-m", dest="module", metavar="MODULE", help="The module to run.")
    return parser


def _run(options: Namespace, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by the program, so that it has its own `__main__`, arguments, signals and exit status."""
    if not entry_points(group="torch.backends", name="compile_retry"):
        sys.exit("compile_retry is not installed, so PyTorch cannot load it; install it with pip")
    program = ["-m", options.module] if options.module else [options.script]
    # The options of the interpreter, such as -W. There is no public name for them; multiprocessing uses this one.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # The variables also reach the program's own children. The second one may have been set to 0.
    switches = f"{os.environ['COMPILE_RETRY']},install" if "COMPILE_RETRY" in os.environ else "install"
    environment = {**os.environ, "COMPILE_RETRY": switches, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    sys.stdout.flush()
    command = [sys.executable, *flags, *program, *arguments]
    os.execve(sys.executable, command, environment)  # noqa: S606  # no shell is needed


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 1 <= (seconds := float(text)) < math.inf:
            return seconds
    raise ArgumentTypeError(f"must be a number of seconds, at least 1, not {text}")


def _doctor(options: Namespace) -> int:
    checks = examine(options.timeout)
    bad = {"failed", "warning"} if options.strict else {"failed"}
    ok = not any(check.status in bad for check in checks)
    if options.json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks)
    return 0 if ok else 1


def _print(checks: list[Check]) -> None:
    """Print a table on a terminal, and searchable lines everywhere else."""
    try:
        from rich.console import Console
    except ImportError:
        _print_lines(checks)
        return
    console = Console()
    if console.is_terminal:
        _print_table(checks, console)
    else:
        _print_lines(checks)


def _print_lines(checks: list[Check]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:<8} {check.name:<{width}}  {check.detail}")
        if check.remedy:
            print(f"{'':<8} {'':<{width}}  -> {check.remedy}")


def _print_table(checks: list[Check], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "status", "detail", "remedy")
    for check in checks:
        cells = (check.name, Text(check.status, _COLOURS[check.status]), check.detail, check.remedy)
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
