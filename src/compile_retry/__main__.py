"""``python -m compile_retry``: the command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, NoReturn

from ._doctor.checks import Check, Status, examine
from ._version import installed_version

if TYPE_CHECKING:
    from rich.console import Console

# Of the longest name of a check.
_WIDTH = len("vector instructions")
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
        default=60.0,
        metavar="SECONDS",
        help="Time limit for the checks, at least 1 (default: 60).",
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
    """Replace this process with the program, so that it has its own `__main__`, arguments, signals and exit status."""
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
    with _printing(as_json=options.json) as report:
        checks = examine(options.timeout, report)
    bad = {"failed", "warning"} if options.strict else {"failed"}
    ok = not any(check.status in bad for check in checks)
    if options.json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    return 0 if ok else 1


@contextmanager
def _printing(*, as_json: bool) -> Iterator[Callable[[Check], None]]:
    """Print each check as it finishes: in a table on a terminal, and as searchable lines everywhere else."""
    console = None if as_json else _terminal()
    if console is not None:
        with _table(console) as report:
            yield report
    else:
        yield _ignore if as_json else _print_line


def _terminal() -> Console | None:
    """Return a console if the output is a terminal and rich is installed."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console()
    return console if console.is_terminal else None


def _ignore(check: Check) -> None:
    """Do not print a check that is printed with all others."""


def _print_line(check: Check) -> None:
    line = f"{check.status:<8} {check.name:<{_WIDTH}}  {check.detail}\n"
    remedy = f"{'':<8} {'':<{_WIDTH}}  -> {check.remedy}\n" if check.remedy else ""
    print(line + remedy, end="", flush=True)


@contextmanager
def _table(console: Console) -> Iterator[Callable[[Check], None]]:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "status", "detail", "remedy")

    def report(check: Check) -> None:
        status = Text(check.status, _COLOURS[check.status])
        table.add_row(Text(check.name), status, Text(check.detail), Text(check.remedy))

    with Live(table, console=console):
        yield report


if __name__ == "__main__":
    sys.exit(main())
