"""``python -m compile_retry``: the command line, which needs the extra ``cli``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

try:
    import click
except ImportError:
    sys.stderr.write('The command line needs the extra "cli": pip install "compile-retry[cli]"\n')
    sys.exit(2)

from ._doctor.checks import Check, Status, examine

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


@click.group()
@click.version_option(package_name="compile-retry")
def main() -> None:
    """Tools around torch.compile and its fallback."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--strict", is_flag=True, help="A warning is a failure, too.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1.0),
    default=180.0,
    show_default=True,
    metavar="SECONDS",
    help="End the checks after this time.",
)
def doctor(as_json: bool, strict: bool, timeout: float) -> None:
    """Check whether torch.compile would work here.

    Exit status: 0 if it would, 1 if a check failed, 2 if the command itself is wrong.
    """
    checks = examine(timeout)
    ok = not any(check.status == "failed" or (strict and check.status == "warning") for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks)
    sys.exit(0 if ok else 1)


def _print(checks: list[Check]) -> None:
    """As a table on a terminal, and in lines that can be searched everywhere else."""
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
        click.echo(f"{check.status:<8} {check.name:<{width}}  {check.detail}")
        if check.remedy:
            click.echo(f"{'':<8} {'':<{width}}  -> {check.remedy}")


def _print_table(checks: list[Check], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "status", "what was found", "what to do")
    for check in checks:
        cells = (check.name, Text(check.status, _COLOURS[check.status]), check.detail, check.remedy)
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
    console.print(table)


if __name__ == "__main__":
    main(prog_name="python -m compile_retry")
