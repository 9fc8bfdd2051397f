"""The table of `tests.campaigns.bench.selection`, as a page and on the terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.campaigns.bench.quality.sections import Section, update
from tests.campaigns.bench.selection.methods import METHODS, WITHOUT
from tests.campaigns.bench.selection.world import POLLUTED, WORLDS


def rows(work: Path, suite: str) -> list[dict[str, Any]]:
    """Every result of a suite."""
    return [
        json.loads(file.read_text())
        for file in sorted((work / f"selection-{suite}").glob("*/*.json"))
        if _is_result(file)
    ]


def _is_result(file: Path) -> bool:
    return any(
        file.name == f"{method.replace(' ', '-').replace(',', '')}-{n}.json" for method in METHODS for n in POLLUTED
    )


def accuracy(row: dict[str, Any]) -> float:
    """Mean over the wanted tasks, in percent."""
    return 100 * statistics.fmean(row["right"].values())


def spread(values: Sequence[float]) -> str:
    """Mean, and least and most over the seeds."""
    return f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else ""


def table(work: Path, suite: str) -> str:
    """Markdown: a row a method; of each pool the accuracy, and what share of the weight irrelevant models have."""
    found = rows(work, suite)
    head = [
        "method",
        *(f"8 + {n}" for n in POLLUTED),
        *(f"irrelevant weight, 8 + {n}" for n in POLLUTED[1:]),
        "wanted ones in, of 8",
        "CPU s, 8 + 16",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for method in METHODS:
        mine = [row for row in found if row["method"] == method]
        if not mine:
            continue
        by = {n: [row for row in mine if row["irrelevant"] == (0 if method in WITHOUT else n)] for n in POLLUTED}
        cells = [method, *(spread([accuracy(r) for r in by[n]]) for n in POLLUTED)]
        if method in WITHOUT:
            cells += ["", "", ""]
        else:
            cells += [spread([100 * useless(r) for r in by[n]]) + " %" if by[n] else "" for n in POLLUTED[1:]]
            cells.append(" / ".join(f"{statistics.fmean([good(r) for r in by[n]]):.1f}" for n in POLLUTED if by[n]))
        last = by[POLLUTED[-1]]
        cells.append(f"{statistics.fmean([r['cpu_seconds'] for r in last]):.0f}" if last else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def useless(row: dict[str, Any]) -> float:
    """The share of the weight that models nobody wants have."""
    return sum(share for name, share in row["shares"].items() if not name.startswith("good-"))


def good(row: dict[str, Any]) -> int:
    """How many of the wanted models are in the merge."""
    return sum(name.startswith("good-") and share > 0 for name, share in row["shares"].items())


def show(work: Path) -> None:
    """The tables on standard output."""
    for suite in WORLDS:
        seeds = sorted({row["seed"] for row in rows(work, suite)})
        print(f"\n{suite}, seeds {', '.join(map(str, seeds))}\n\n{table(work, suite)}")


def write(work: Path, target: Path) -> None:
    """Puts the rows that there are results of into the tables of selection-measured.md; all else there stays."""
    found = [
        Section(suite, [table(work, suite).split("\n")], keys=1) for suite in ("text", "digits") if rows(work, suite)
    ]
    update(target / "selection-measured.md", "Selection, measured", found)
