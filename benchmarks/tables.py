"""Turn pytest-benchmark results into docs/performance-tables.md. Run by `make bench`.

    python benchmarks/tables.py RESULTS.json [MORE.json ...]

The `extra_info` of a benchmark holds its table, row and column, and the lap in which it was taken. Subjects are
compared within a lap, side by side, and a cell is the median over the laps. If two files have the same cell, the later
file counts. Tables without new results stay unchanged; each says when and on what it was measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "performance-tables.md"

Laps = dict[int, Any]


class Table(NamedTuple):
    """The layout of one table.

    Attributes:
        title: Heading.
        reference: The column to compare the others with; empty for no comparison.
        shows: What a cell adds to a time: "difference", "ratio" or both.
        unit: Unit of values that are not times.
        upright: Rows become columns: a single row of many cells is wider than a page.
    """

    title: str
    reference: str = ""
    shows: tuple[str, ...] = ()
    unit: str = ""
    upright: bool = False


BARE, EAGER = "bare `torch.compile`", "eager"
TABLES = {
    "compiled": Table("A compiled call", BARE, ("difference", "ratio")),
    "floor, compiled": Table("What the parts of a compiled call cost", BARE, ("difference",)),
    "held off": Table("A call while the compiler is broken", EAGER, ("difference", "ratio")),
    "floor, held off": Table("What the parts of a held-off call cost", EAGER, ("difference",)),
    "held off beside compiled": Table(
        "A call of a shape that is held off while another one is compiled", EAGER, ("difference", "ratio")
    ),
    "scale": Table("Many graphs, many parameters: a compiled call", BARE, ("difference", "ratio")),
    "memory": Table("Memory kept after the first calls, Python objects only", unit="kB"),
    "attempt": Table("An attempt, in a fresh process with an empty cache", BARE, ("ratio",)),
    "equal blocks": Table("The first step of equal blocks wrapped one by one, in a fresh process", BARE, ("ratio",)),
    "peak memory": Table("The largest size of a process in memory", unit="MB"),
    "step memory": Table("Memory of a healthy train step: its peak over the time between steps", unit="MB"),
    "recovered": Table("A train step after a recovery, against one that never failed", "never failed", ("ratio",)),
    "bad day, 10 min": Table("A bad day of 10 minutes, simulated: time to finish against an ideal"),
    "bad day, 1 h": Table("A bad day of 1 hour, simulated: time to finish against an ideal"),
    "bad day, 8 h": Table("A bad day of 8 hours, simulated: time to finish against an ideal"),
    "bad day, functions": Table(
        "Several functions, 8 hours without a repair, 60 s to fail, simulated: share of the time taken by failures"
    ),
    "bad day, for real": Table("A bad day of two minutes, for real", "ideal", ("ratio",), upright=True),
    "import": Table("Importing, with torch already imported", "", ()),
    "decorating": Table("Decorating a thousand functions", BARE, ("ratio",), unit="bytes"),
}

SIZES = {"kB": 1e3, "MB": 1e6}


def collected(files: list[Path]) -> tuple[dict[str, dict[str, dict[str, tuple[str, Laps]]]], dict[str, str]]:
    """Return each lap's values and their kind, by table, row and column; and each table's date and machine."""
    cells: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    origins: dict[str, str] = {}
    for file in files:
        results = json.loads(file.read_text())
        cpu = results["machine_info"]["cpu"]
        machine = f"{cpu.get('brand_raw', 'an unknown processor')}, {cpu['count']} cores"
        for result in results["benchmarks"]:
            info = result["extra_info"]
            if "table" not in info:  # a benchmark that failed
                continue
            kind = "value" if "value" in info else "time"
            row = cells[info["table"]][info["row"]]
            _, laps = row.get(info["column"], (kind, {}))
            laps[info.get("lap", 0)] = info.get("value", result["stats"]["min"])
            row[info["column"]] = kind, laps
            origins[info["table"]] = f"Measured on {results['datetime'][:10]}: {machine}."
    return cells, origins


def in_words(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.2f} µs"


def cell(kind: str, laps: Laps, reference: Laps | None, table: Table) -> str:
    if any(isinstance(value, str) for value in laps.values()):
        return str(next(iter(laps.values())))
    middle = statistics.median(laps.values())
    if kind == "value":
        if table.unit in SIZES:
            return f"{middle / SIZES[table.unit]:,.1f} {table.unit}"
        return f"{middle:.4g} {table.unit}".strip()
    words = in_words(middle)
    shared = sorted(laps.keys() & reference.keys()) if reference else []
    if reference is None or reference is laps or not shared:
        return words
    against = []
    if "difference" in table.shows:
        difference = statistics.median(laps[lap] - reference[lap] for lap in shared)
        against.append(("+" if difference >= 0 else "-") + in_words(abs(difference)))
    if "ratio" in table.shows:
        against.append(f"{statistics.median(laps[lap] / reference[lap] for lap in shared):.4g}x")
    return f"{words} ({', '.join(against)})" if against else words


def rendered(table: Table, rows: dict[str, dict[str, tuple[str, Laps]]], origin: str) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns]]
    for row, found in rows.items():
        _, reference = found.get(table.reference, ("", None))
        lines.append([row, *(cell(*found[column], reference, table) if column in found else "" for column in columns)])
    if table.upright:
        lines = [list(line) for line in zip(*lines, strict=True)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join([table.title, "", origin, "", *(f"| {' | '.join(line)} |" for line in lines)])


def main() -> None:
    files = [Path(argument) for argument in sys.argv[1:]]
    if not files:
        sys.exit(__doc__)
    head, *tables = TARGET.read_text().split("\n\n### ")
    by_title = {table.partition("\n")[0]: table.rstrip() for table in tables}
    cells, origins = collected(files)
    by_title |= {TABLES[name].title: rendered(TABLES[name], rows, origins[name]) for name, rows in cells.items()}
    tables = [by_title[table.title] for table in TABLES.values() if table.title in by_title]
    TARGET.write_text("\n\n### ".join([head, *tables]) + "\n")
    print(f"wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
