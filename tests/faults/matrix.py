"""Runs the fault matrix, cell by cell, and writes docs/reliability-table.md.

    make faults                                  all cells, most of an hour
    make faults ARGS='--position "first call"'   some cells; the others keep the outcome of an earlier run
    make faults ARGS=--render                    no cell, only the table

Outcomes are kept in docs/_build/faults.jsonl, so an interrupted run continues where it stopped. --again discards them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import cells, injected
from .faults import BY_NAME, FAULTS, POSITIONS, Fault
from .worker import POLICIES

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "_build" / "faults.jsonl"
TABLE = ROOT / "docs" / "reliability-table.md"

DEFAULT = next(iter(POLICIES))
# Every policy with two faults: the due moment of an attempt does not depend on the last failure's cause.
UNDER_EVERY_POLICY = (("full disk", "recompile"), ("compiler killed", "second graph"))

Key = tuple[str, str, str]


def all_cells() -> list[Key]:
    under_default = [(fault.name, position, DEFAULT) for position in POSITIONS for fault in FAULTS]
    under_others = [(*cell, policy) for policy in POLICIES for cell in UNDER_EVERY_POLICY if policy != DEFAULT]
    return [cell for cell in [*under_default, *under_others] if cell[1] in BY_NAME[cell[0]].positions]


def recorded() -> dict[Key, dict[str, Any]]:
    if not RECORD.exists():
        return {}
    answers = [json.loads(line) for line in RECORD.read_text().splitlines()]
    return {(answer["fault"], answer["position"], answer["policy"]): answer for answer in answers}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run(wanted: list[Key]) -> None:
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    done = recorded()
    try:
        for number, cell in enumerate(wanted, 1):
            if cell in done:
                continue
            if BY_NAME[cell[0]].tmpfs is not None and not cells.can_mount():
                say(f"{number}/{len(wanted)} {', '.join(cell)}: not run, needs root for a tmpfs")
                continue
            answer = cells.run_cell(*cell)
            with RECORD.open("a") as record:
                record.write(json.dumps(answer) + "\n")
            summary = answer.get("error", "")[:150]
            report = f"{number}/{len(wanted)} {', '.join(cell)}: {answer['outcome']} {summary} ({answer['seconds']} s)"
            say(report)
    finally:
        cells.clean_up()


def outcome(answer: dict[str, Any] | None, fault: Fault, position: str) -> str:
    if position not in fault.positions:
        return "n/a"
    if answer is None:
        return "not run"
    if answer["outcome"] == "error":
        return f"**FAILS**: {_plain(answer['error'])[:100]}"
    failures = answer["failures"]
    return f"{answer['outcome']} ({failures})" if failures else str(answer["outcome"])


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", r"\<")


def reported(answers: list[dict[str, Any]]) -> str:
    types = [cause["type"].rpartition(".")[2] for a in answers for cause in a.get("causes", ())]
    errors = [f"`{name}`" for name in dict.fromkeys(types)]
    return ", ".join(errors) or "none"


def _rows(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def render() -> None:
    done = recorded()
    rows = []
    for fault in FAULTS:
        answers = {position: done.get((fault.name, position, DEFAULT)) for position in POSITIONS}
        rows.append(
            [
                fault.name,
                fault.made + (" (root)" if fault.tmpfs is not None else ""),
                *(outcome(answers[position], fault, position) for position in POSITIONS),
                reported([answer for answer in answers.values() if answer is not None]),
            ]
        )
    policies = [
        [name, position, *(outcome(done.get((name, position, p)), BY_NAME[name], position) for p in POLICIES)]
        for name, position in UNDER_EVERY_POLICY
    ]
    left_out = [
        f"- {fault.name}: {', '.join(p for p in POSITIONS if p not in fault.positions)} (n/a): {fault.left_out}."
        for fault in FAULTS
        if len(fault.positions) < len(POSITIONS)
    ]
    TABLE.write_text(
        "\n".join(
            [
                "<!-- Written by `make faults`; do not edit. -->",
                "",
                "Real faults, with the policy that retries on every call:",
                "",
                *_rows(["fault", "how it is made", *POSITIONS, "root cause reported"], rows),
                "",
                *left_out,
                "",
                "Two of them with every policy:",
                "",
                *_rows(["fault", "position", *POLICIES], policies),
                "",
                "Injected faults, which would need a GPU, a network file system or luck:",
                "",
                *_rows(["exception", *POSITIONS], injected.table()),
                "",
            ]
        )
    )
    say(f"wrote {TABLE.relative_to(ROOT)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", help="run only faults whose name contains this", default="")
    parser.add_argument("--position", choices=POSITIONS)
    parser.add_argument("--render", action="store_true", help="run nothing, only write the table")
    parser.add_argument("--again", action="store_true", help="also run cells that already have an outcome")
    arguments = parser.parse_args()
    wanted = [cell for cell in all_cells() if arguments.fault in cell[0] and arguments.position in (None, cell[1])]
    if arguments.again:
        keep = [answer for key, answer in recorded().items() if key not in wanted]
        RECORD.write_text("".join(json.dumps(answer) + "\n" for answer in keep))
    if not arguments.render:
        run(wanted)
    render()
    return int(any(recorded().get(cell, {}).get("outcome") == "error" for cell in wanted))


if __name__ == "__main__":
    sys.exit(main())
