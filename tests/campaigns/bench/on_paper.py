"""What a fold of 405 B parameters takes on many machines, from what an element took on one worker. Nobody ran it: the
machines, the model and the store are as ops/docs/many-machines.md says."""

from __future__ import annotations

import statistics
from typing import Any

ELEMENTS = 405e9
WEIGHTS = 2 * ELEMENTS / 1e9
"""GB of a model in bfloat16."""
MOVED = 6 * WEIGHTS
"""GB that a fold reads and writes: base and candidate, and four bytes an element of the state, read and written."""
TABLE = 128_256 * 16_384
"""Elements of the largest tensor that is read element by element."""
CORES, NETWORK, STORE = 16, 3.0, 10.0
"""Cores and GB/s of a machine, and GB/s of the shared store."""
MACHINES = (8, 32, 128)
BY_ELEMENT = ("mean", "task-arithmetic", "iso-c", "ties")
"""Rules whose fold takes so much an element. What decomposes matrices goes by m·n², and is no matter of such models."""


def table(figures: Any) -> str:
    """The table, in Markdown, of those of `BY_ELEMENT` whose folds `figures` has: what `many --json` wrote."""
    rows = {name.partition(", ")[2]: turns for name, turns in figures["rows"].items() if name.startswith("fold, ")}
    each = {
        rule: statistics.median(one["worked"] for one in turns["ray, 1"]) / figures["elements"]
        for rule, turns in rows.items()
        if rule in BY_ELEMENT
    }
    lines = [
        "| what it takes | " + " | ".join(f"`{rule}`" for rule in each) + " |",
        "|---" * (len(each) + 1) + "|",
        _line("work, measured", [f"{1e9 * s:.1f} s for 10⁹ elements" for s in each.values()]),
        _line("work in all", [f"{s * ELEMENTS:,.0f} s" for s in each.values()]),
        _line("read and written", [f"{MOVED / 1000:.1f} TB" for _ in each]),
        _line("the largest tensor, on one core (a table)", [f"{s * TABLE:.0f} s" for s in each.values()]),
    ]
    for count in MACHINES:
        lines.append(_line(f"{count} machines: cores, network, store", [_on(count, s) for s in each.values()]))
    return "\n".join(lines)


def _on(count: int, seconds: float) -> str:
    """What bounds a fold on so many machines, the longest of them marked."""
    cores = max(seconds * ELEMENTS / (count * CORES), seconds * TABLE)
    found = [cores, MOVED / (count * NETWORK), MOVED / STORE]
    return ", ".join(f"**{s:.0f} s**" if s == max(found) else f"{s:.0f} s" for s in found)


def _line(what: str, cells: list[str]) -> str:
    return f"| {what} | " + " | ".join(cells) + " |"
