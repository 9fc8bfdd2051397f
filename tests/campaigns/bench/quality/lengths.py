"""What the default's length costs: the merge by the default rule at its own length and at multiples, cell by cell,
and constants that were fitted on the other suites.

    # for each suite and form, beside the length by default four others
    python -m tests.campaigns.bench.quality --work W ... --rule tsv-m --counts 4 8 --read default \\
        --scale spread:0.5 --scale spread:0.7071067811865476 --scale spread:1.4142135623730951 --scale spread:2
    python -m tests.campaigns.bench.quality.lengths --work W

A cell is a suite, a form and a number of models. *Tuned*: in each order the multiple that is best on every second test
row of each task, judged on the others, and the other way round; so no row both chooses and judges, and the default is
judged on the same rows. Between the multiples that were asked accuracy is a smooth curve through them over their
logarithm (piecewise cubic, its slope at each that of the line between its neighbours).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from continual.making import DEFAULT
from continual.rules import ReadOptions, read_options
from continual.rules.scale import FEW, held
from tests.campaigns.bench.quality.figures import DRAWS, Answers, Table, mean
from tests.campaigns.bench.quality.report import tables
from tests.campaigns.bench.quality.report_language import interval, made

POWERS, GROWTHS = (1.0, 1.25, 1.5, 1.75, 2.0), (0.0, 0.125, 0.25, 0.375, 0.5)
CONSTANTS = tuple(2.0 ** (step / 8) for step in range(-8, 9))


@dataclass(frozen=True)
class Law:
    """‖X‖ over the matrices: c times the mean of ρ^power·‖τ‖ over the models, times (count/4)^growth."""

    c: float = 1.0
    power: float = 1.5
    growth: float = 0.0

    def length(self, each: Sequence[tuple[float, float]]) -> float:
        """For models of these ρ and ‖τ‖; odd ones are held as `spread` holds them."""
        values = [rho**self.power * norm for rho, norm in each]
        centre = held(values) if len(values) >= FEW else sum(values) / len(values)
        return self.c * centre * (len(values) / 4) ** self.growth

    def __str__(self) -> str:
        grows = f"·(t/4)^{self.growth:g}" if self.growth else ""
        return f"{self.c:.2f}·ρ^{self.power:g}{grows}"


@dataclass(frozen=True)
class Merged:
    """One order of one cell: ρ and ‖τ‖ of each model, and the answers at each multiple of the default's length."""

    each: Sequence[tuple[float, float]]
    asked: Mapping[float, Answers]

    def at(self, multiple: float) -> float:
        """Accuracy in per cent at this multiple; that of the nearest one beyond the ends."""
        known = sorted((math.log2(m), mean(answers)) for m, answers in self.asked.items())
        x, y = ([point[axis] for point in known] for axis in (0, 1))
        where = min(max(math.log2(multiple), x[0]), x[-1])
        at = max(i for i in range(len(x) - 1) if x[i] <= where)
        wide = x[at + 1] - x[at]
        t = (where - x[at]) / wide
        slopes = [
            (y[min(i + 1, len(y) - 1)] - y[max(i - 1, 0)]) / (x[min(i + 1, len(x) - 1)] - x[max(i - 1, 0)])
            for i in (at, at + 1)
        ]
        low = (1 - t) ** 2 * ((1 + 2 * t) * y[at] + t * wide * slopes[0])
        return low + t**2 * ((3 - 2 * t) * y[at + 1] - (1 - t) * wide * slopes[1])

    def under(self, law: Law) -> float:
        """Accuracy in per cent at this law's length."""
        return self.at(law.length(self.each) / Law().length(self.each))


@dataclass(frozen=True)
class Cell:
    """A suite, a form and a number of models, in the orders in which they were merged."""

    table: Table
    count: int
    orders: Sequence[Merged]

    @property
    def name(self) -> str:
        times = f" ({len(self.orders)} orders)" if len(self.orders) > 1 else ""
        form = made(self.table) if not self.table.watches else f"language: {made(self.table)}"
        return f"{form}, {self.count}{times}"

    @property
    def rho(self) -> float:
        """Mean ρ of the models."""
        return sum(rho for one in self.orders for rho, _ in one.each) / sum(len(one.each) for one in self.orders)

    def under(self, law: Law) -> float:
        """Mean accuracy over the orders at this law's length."""
        return sum(one.under(law) for one in self.orders) / len(self.orders)

    def multiples(self) -> list[float]:
        """Those that were asked in every order."""
        return sorted(set.intersection(*(set(one.asked) for one in self.orders)))

    def gap(self) -> tuple[float, float, float]:
        """The default less tuned, in points, and its 95 % interval: a bootstrap over the rows of each task, with what
        was chosen as it was."""
        by_task: dict[str, list[np.ndarray]] = {}
        for one in self.orders:
            apart = {m: {task: _rows(found) for task, found in a.items()} for m, a in one.asked.items()}
            for half in (0, 1):
                best = max(apart, key=lambda m: (sum(r[half::2].mean() for r in apart[m].values()), -abs(m - 1)))
                for task, rows in apart[1.0].items():
                    gained = rows - apart[best][task]
                    gained[half::2] = 0.0  # these rows chose
                    by_task.setdefault(task, []).append(gained)
        random = np.random.default_rng(0)
        centre, draws = 0.0, np.zeros(DRAWS)
        for task in sorted(by_task):
            summed = np.sum(by_task[task], axis=0) / (len(self.orders) * self.count)
            centre += float(summed.mean())
            draws += summed[random.integers(0, len(summed), (DRAWS, len(summed)))].mean(1)
        low, high = np.percentile(draws, (2.5, 97.5))
        return 100 * centre, 100 * float(low), 100 * float(high)


def _rows(answers: str) -> np.ndarray:
    return np.array([float(one) for one in answers])


def cells(found: Sequence[Table]) -> Iterator[Cell]:
    """What was asked at the default's length and at others."""
    default = read_options(DEFAULT)
    for table in found:
        for count in table.counts(DEFAULT):
            orders = []
            for order in table.asked(DEFAULT, count, "default"):
                row = table.rows[order, DEFAULT, count, "default"]
                asked = {
                    ReadOptions.parse(other["scale"]).value / default.value: other["test"]
                    for (o, rule, c, _), other in table.rows.items()
                    if (o, rule, c) == (order, DEFAULT, count) and "scale" in other
                }
                if len(asked) > 1 and row.get("each"):
                    each = [(float(rho), float(norm)) for rho, norm in row["each"][:count]]
                    orders.append(Merged(each, asked))
            if orders:
                yield Cell(table, count, orders)


def fitted(some: Sequence[Cell], powers: Sequence[float], growths: Sequence[float]) -> Law:
    """The law with the highest accuracy in these cells, each suite counted alike."""
    suites: dict[str, list[Cell]] = {}
    for cell in some:
        suites.setdefault(suite(cell), []).append(cell)

    def score(law: Law) -> float:
        return sum(sum(cell.under(law) for cell in of) / len(of) for of in suites.values())

    return max((Law(*one) for one in product(CONSTANTS, powers, growths)), key=score)


def suite(cell: Cell) -> str:
    """The suite's name, without the number of tasks."""
    return cell.table.suite.rstrip("0123456789")


def page(some: Sequence[Cell]) -> Iterator[str]:
    """The tables."""
    multiples = sorted({m for cell in some for m in cell.multiples()})
    yield "| merged | ρ | " + " | ".join(f"× {m:.3g}" for m in multiples) + " | default less tuned |"
    yield "|---" * (len(multiples) + 3) + "|"
    for cell in some:
        curve = [f"{cell.under(Law(m)):.1f}" if m in cell.multiples() else "" for m in multiples]
        yield f"| {cell.name} | {cell.rho:.2f} | " + " | ".join(curve) + f" | {interval(cell.gap())} |"
    if any(cell.table.watches for cell in some):
        yield ""
        yield from perplexities([cell for cell in some if cell.table.watches], multiples)
    yield ""
    names = ("c", "c and power", "c and growth", "all three")
    kinds = (((1.5,), (0.0,)), (POWERS, (0.0,)), ((1.5,), GROWTHS), (POWERS, GROWTHS))
    yield "| left out | fitted on the others | law | default less it | by cell |"
    yield "|---" * 5 + "|"
    for left in sorted({suite(cell) for cell in some}):
        others = [cell for cell in some if suite(cell) != left]
        for name, (powers, growths) in zip(names, kinds, strict=True):
            if others:
                law = fitted(others, powers, growths)
                gaps = [cell.under(Law()) - cell.under(law) for cell in some if suite(cell) == left]
                told = ", ".join(f"{gap:+.1f}" for gap in gaps)
                yield f"| {left} | {name} | {law} | {sum(gaps) / len(gaps):+.1f} | {told} |"
    for name, (powers, growths) in zip(names, kinds, strict=True):
        law = fitted(some, powers, growths)
        gaps = [cell.under(Law()) - cell.under(law) for cell in some]
        yield f"| none | {name} | {law} | {sum(gaps) / len(gaps):+.1f} | {', '.join(f'{g:+.1f}' for g in gaps)} |"


def perplexities(some: Sequence[Cell], multiples: Sequence[float]) -> Iterator[str]:
    """Perplexity of neutral text at each multiple."""
    yield "| neutral perplexity | allowed | " + " | ".join(f"× {m:.3g}" for m in multiples) + " |"
    yield "|---" * (len(multiples) + 2) + "|"
    for cell in some:
        told = []
        for multiple in multiples:
            scale = ReadOptions("spread", read_options(DEFAULT).value * multiple)
            read = "default" if multiple == 1.0 else scale.scale
            found = cell.table.watched(DEFAULT, cell.count, read, "perplexity")
            told.append("" if found is None else f"{found:.1f}")
        allowed = cell.table.allowed()
        yield f"| {cell.name} | {'' if allowed is None else f'{allowed:.1f}'} | " + " | ".join(told) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the results are")
    args = parser.parse_args()
    print("\n".join(page(list(cells(tables(args.work))))))


if __name__ == "__main__":
    main()
