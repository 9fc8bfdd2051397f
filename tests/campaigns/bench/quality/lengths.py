"""What the default's length costs: the merge by the default of its kind of state, `tsv-flow` or `tsv-m`, at its own
length and at multiples, cell by cell, and constants that were fitted on the other suites.

    # for each suite of adapters in a state of adapters, beside the length by default four others; the same of whole
    # tensors by tsv-flow
    python -m tests.campaigns.bench.quality --work W ... --kept --rule tsv-m --counts 4 8 --read default \\
        --scale spread:0.5 --scale spread:0.7071067811865476 --scale spread:1.4142135623730951 --scale spread:2
    python -m tests.campaigns.bench.quality.lengths --work W
    # the tables put into the page; its cells of other runs stay, and the laws are fitted on all
    python -m tests.campaigns.bench.quality.lengths --work W --page ops/docs/quality.md

A cell is a suite, a form and a number of models. *Tuned*: in each order the multiple that is best on every second test
row of each task, judged on the others, and the other way round; so no row both chooses and judges, and the default is
judged on the same rows. Between the multiples that were asked
accuracy is a smooth curve through them over their logarithm (piecewise cubic, its slope at each that of the line
between its neighbours).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from continual.rules import ReadOptions, read_options
from continual.rules.scale import FEW, held
from tests.campaigns.bench.quality.figures import DRAWS, Answers, Table, mean
from tests.campaigns.bench.quality.report import tables
from tests.campaigns.bench.quality.report_language import interval, made
from tests.campaigns.bench.quality.sections import Section, written

HEADING, MERGED, RULE, LESS, NEUTRAL = (
    "What the default's length costs",
    "merged",
    "rule",
    "default less tuned",
    "neutral perplexity",
)
POWERS, GROWTHS = (1.0, 1.25, 1.5, 1.75, 2.0), (0.0, 0.125, 0.25, 0.375, 0.5)
LONGER = 2.0**0.25
"""A constant that is shown besides, without being fitted: × 1.19."""
CONSTANTS = tuple(2.0 ** (step / 8) for step in range(-8, 9))


@dataclass(frozen=True)
class Law:
    """‖X‖ over the matrices: c times the mean of ρ^power·‖τ‖ over the models, ρ^power counting for count^0.75 at the
    most, times (count/4)^growth."""

    c: float = 1.0
    power: float = 1.5
    growth: float = 0.0

    def length(self, each: Sequence[tuple[float, float]]) -> float:
        """For models of these ρ and ‖τ‖; odd ones are held as `spread` holds them."""
        count = len(each)
        centre, norm = (
            held(values) if count >= FEW else sum(values) / count
            for values in ([rho**self.power * norm for rho, norm in each], [norm for _, norm in each])
        )
        return self.c * min(centre, count**0.75 * norm) * (count / 4) ** self.growth

    def __str__(self) -> str:
        grows = f"·(t/4)^{self.growth:g}" if self.growth else ""
        return f"{self.c:.2f}·ρ^{self.power:g}{grows}"


@dataclass(frozen=True)
class Merged:
    """One order of one cell: ρ and ‖τ‖ of each model, and the accuracy in per cent at each multiple of the default's
    length."""

    each: Sequence[tuple[float, float]]
    right: Mapping[float, float]

    def at(self, multiple: float) -> float:
        """Accuracy in per cent at this multiple; that of the nearest one beyond the ends."""
        known = sorted((math.log2(m), right) for m, right in self.right.items())
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
    """A suite, a form and a number of models, in the orders in which they were merged, and the `rule` that reads them.
    `gap`: the default less tuned, as the table says it. `perplexity`: by multiple, where the suite says it, and what is
    `allowed`."""

    name: str
    rule: str
    orders: Sequence[Merged]
    gap: str
    perplexity: Mapping[float, str]
    allowed: str = ""

    @property
    def suite(self) -> str:
        """The suite's name."""
        return self.name.partition(":")[0]

    @property
    def key(self) -> str:
        """The name without the number of orders."""
        return self.name.partition(" (")[0]

    @property
    def place(self) -> tuple[str, int]:
        """Suite and form, and the number of models."""
        made_of, _, count = self.key.rpartition(", ")
        return made_of, int(count)

    @property
    def rho(self) -> float:
        """Mean ρ of the models."""
        return sum(rho for one in self.orders for rho, _ in one.each) / sum(len(one.each) for one in self.orders)

    def under(self, law: Law) -> float:
        """Mean accuracy over the orders at this law's length."""
        return sum(one.under(law) for one in self.orders) / len(self.orders)

    def at(self, multiple: float) -> float:
        """Mean accuracy over the orders at this multiple of the default's length."""
        return sum(one.at(multiple) for one in self.orders) / len(self.orders)

    def multiples(self) -> list[float]:
        """Those that were asked in every order."""
        return sorted(set.intersection(*(set(one.right) for one in self.orders)))


def gap(orders: Sequence[Mapping[float, Answers]]) -> tuple[float, float, float]:
    """The default less tuned, in points, and its 95 % interval, from the answers at each multiple in each order: a
    bootstrap over the rows of each task, with what was chosen as it was."""
    by_task: dict[str, list[np.ndarray]] = {}
    for asked in orders:
        apart = {m: {task: _rows(found) for task, found in a.items()} for m, a in asked.items()}
        for half in (0, 1):
            best = max(apart, key=lambda m: (sum(r[half::2].mean() for r in apart[m].values()), -abs(m - 1)))
            for task, rows in apart[1.0].items():
                gained = rows - apart[best][task]
                gained[half::2] = 0.0  # these rows chose
                by_task.setdefault(task, []).append(gained)
    random = np.random.default_rng(0)
    centre, draws = 0.0, np.zeros(DRAWS)
    for task in sorted(by_task):
        summed = np.sum(by_task[task], axis=0) / sum(len(asked[1.0]) for asked in orders)
        centre += float(summed.mean())
        draws += summed[random.integers(0, len(summed), (DRAWS, len(summed)))].mean(1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return 100 * centre, 100 * float(low), 100 * float(high)


def _rows(answers: str) -> np.ndarray:
    return np.array([float(one) for one in answers])


def cells(found: Sequence[Table]) -> Iterator[Cell]:
    """What was asked at the default's length and at others."""
    for table in found:
        rule = table.default
        for count in table.counts(rule):
            orders, asked = [], []
            for order in table.asked(rule, count, "default"):
                row = table.rows[order, rule, count, "default"]
                answers = _asked(table, order, count)
                if len(answers) > 1 and row.get("each"):
                    each = [(float(rho), float(norm)) for rho, norm in row["each"][:count]]
                    orders.append(Merged(each, {m: mean(told) for m, told in answers.items()}))
                    asked.append(answers)
            if orders:
                times = f" ({len(orders)} orders)" if len(orders) > 1 else ""
                form = f"language: {made(table)}" if table.watches else made(table)
                allowed = table.allowed() if table.watches else None
                yield Cell(
                    f"{form}, {count}{times}",
                    rule,
                    orders,
                    interval(gap(asked)),
                    dict(_perplexities(table, count, orders[0].right)),
                    "" if allowed is None else f"{allowed:.1f}",
                )


def _asked(table: Table, order: int, count: int) -> dict[float, Answers]:
    """The answers by multiple of the default's length."""
    return {
        _nearest(ReadOptions.parse(row["scale"]).value / read_options(table.default).value): row["test"]
        for (o, rule, c, read), row in table.rows.items()
        if (o, rule, c) == (order, table.default, count) and "scale" in row and read in ("default", row["scale"])
    }


def _nearest(multiple: float) -> float:
    """The power of the square root of two, or of its root, that it is rounded from."""
    return 2.0 ** (round(4 * math.log2(multiple)) / 4)


def _perplexities(table: Table, count: int, multiples: Iterable[float]) -> Iterator[tuple[float, str]]:
    rule = table.default
    for multiple in multiples:
        scale = ReadOptions("spread", read_options(rule).value * multiple)
        found = table.watched(rule, count, "default" if multiple == 1.0 else scale.scale, "perplexity")
        if found is not None:
            yield multiple, f"{found:.1f}"


def told(page: str) -> Iterator[Cell]:
    """The cells that are on the page, of whatever run. A cell's models are taken to have its mean ρ and one norm, and
    its orders to be one."""
    _, _, section = page.partition(f"## {HEADING}\n")
    parts = section.partition("\n## ")[0].strip().split("\n\n")
    blocks = [part.split("\n") for part in parts if part.startswith("|")]
    watched = {}
    rows: list[dict[str, str]] = []
    for block in blocks:
        head, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block]
        found = [dict(zip(head, line, strict=True)) for line in lines[1:]]
        if head[0] == MERGED:
            rows = found
        elif head[0] == NEUTRAL:
            watched = {row[NEUTRAL].partition(" (")[0]: row for row in found}
    for row in rows:
        right = {m: float(value) for m, value in _by_multiple(row)}
        name = row[MERGED].partition(" (")[0]
        count = int(name.rpartition(", ")[2])
        seen = watched.get(name, {})
        orders = [Merged([(float(row["ρ"]), 1.0)] * count, right)]
        yield Cell(row[MERGED], row[RULE], orders, row[LESS], dict(_by_multiple(seen)), seen.get("allowed", ""))


def _by_multiple(row: Mapping[str, str]) -> Iterator[tuple[float, str]]:
    for name, value in row.items():
        if name.startswith("× ") and value:
            yield _nearest(float(name.removeprefix("× "))), value


def fitted(some: Sequence[Cell], powers: Sequence[float], growths: Sequence[float]) -> Law:
    """The law with the highest accuracy in these cells, each suite counted alike."""
    suites: dict[str, list[Cell]] = {}
    for cell in some:
        suites.setdefault(cell.suite, []).append(cell)

    def score(law: Law) -> float:
        return sum(sum(cell.under(law) for cell in of) / len(of) for of in suites.values())

    return max((Law(*one) for one in product(CONSTANTS, powers, growths)), key=score)


def page(some: Sequence[Cell]) -> Iterator[Iterator[str]]:
    """The tables."""
    multiples = sorted({m for cell in some for m in cell.multiples()})
    yield curves(some, multiples)
    watched = [cell for cell in some if cell.perplexity]
    if watched:
        yield perplexities(watched, multiples)
    yield laws(some)


def curves(some: Sequence[Cell], multiples: Sequence[float]) -> Iterator[str]:
    """Accuracy at each multiple, and what the default's costs."""
    yield f"| {MERGED} | {RULE} | ρ | " + " | ".join(f"× {m:.3g}" for m in multiples) + f" | {LESS} |"
    yield "|---" * (len(multiples) + 4) + "|"
    for cell in some:
        curve = [f"{cell.at(m):.1f}" if m in cell.multiples() else "" for m in multiples]
        yield f"| {cell.name} | {cell.rule} | {cell.rho:.2f} | " + " | ".join(curve) + f" | {cell.gap} |"


def perplexities(some: Sequence[Cell], multiples: Sequence[float]) -> Iterator[str]:
    """Perplexity of neutral text at each multiple."""
    yield f"| {NEUTRAL} | allowed | " + " | ".join(f"× {m:.3g}" for m in multiples) + " |"
    yield "|---" * (len(multiples) + 2) + "|"
    for cell in some:
        yield f"| {cell.name} | {cell.allowed} | " + " | ".join(cell.perplexity.get(m, "") for m in multiples) + " |"


def laws(some: Sequence[Cell]) -> Iterator[str]:
    """Laws that were fitted without a suite, and what the default gains on them there."""
    kinds = {"c": ((1.5,), (0.0,)), "c and power": (POWERS, (0.0,)), "all three": (POWERS, GROWTHS)}
    yield f"| {RULE} | left out | fitted on the others | law | default less it | by cell |"
    yield "|---" * 6 + "|"
    for rule in dict.fromkeys(cell.rule for cell in some):
        mine = [cell for cell in some if cell.rule == rule]
        for left in (*sorted({cell.suite for cell in mine}), "none"):
            others = [cell for cell in mine if cell.suite != left]
            judged = [cell for cell in mine if left in (cell.suite, "none")]
            for name, (powers, growths) in kinds.items():
                if others:
                    yield _law(left, name, fitted(others, powers, growths), judged)
        yield _law("none", "nothing", Law(LONGER), mine)


def _law(left: str, fitted_on: str, law: Law, some: Sequence[Cell]) -> str:
    gaps = [cell.under(Law()) - cell.under(law) for cell in some]
    each = ", ".join(f"{round(gap, 1) + 0.0:+.1f}" for gap in gaps)
    rule, number = some[0].rule, read_options(some[0].rule).value
    told = replace(law, c=law.c * number)
    return f"| {rule} | {left} | {fitted_on} | {told} | {round(sum(gaps) / len(gaps), 1) + 0.0:+.1f} | {each} |"


def together(some: Sequence[Cell], others: Sequence[Cell]) -> list[Cell]:
    """These cells, and those of the page that they are not, by suite, form and number of models."""
    known = {(cell.key, cell.rule) for cell in some}
    kept = (cell for cell in others if (cell.key, cell.rule) not in known)
    return sorted([*some, *kept], key=lambda cell: (cell.rule, cell.place))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the results are")
    parser.add_argument(
        "--page", type=Path, help="quality.md, which gets the tables; its cells that WORK does not have stay in them"
    )
    args = parser.parse_args()
    found = list(cells(tables(args.work)))
    if args.page:
        text = args.page.read_text()
        made_of = [list(table) for table in page(together(found, list(told(text))))]
        args.page.write_text(written(text, [Section(HEADING, made_of)]))
    else:
        print("\n\n".join("\n".join(table) for table in page(found)))


if __name__ == "__main__":
    main()
