"""From answers to figures: accuracies over orders, what is retained, backward transfer, and bootstrap intervals of
differences. No files are written here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from continual.making import DEFAULT, OF_ADAPTERS
from tests.campaigns.bench.quality.results import rows_of

Answers = Mapping[str, str]
DRAWS = 4000


def load(file: Path) -> Table:
    """The results of one suite and form."""
    suite, form, *kept = file.stem.split("-")
    return Table(suite, form, bool(kept), {(r["order"], r["rule"], r["count"], r["read"]): r for r in rows_of(file)})


@dataclass(frozen=True)
class Table:
    """Results by (order, rule, count, read)."""

    suite: str
    form: str
    kept: bool
    """Whether the fine-tunes are adapters in a state of adapters."""
    rows: Mapping[tuple[int, str, int, str], Mapping[str, Any]]

    @property
    def default(self) -> str:
        """The rule that such a state has unless told otherwise."""
        return OF_ADAPTERS if self.kept else DEFAULT

    @property
    def most(self) -> int:
        """All the tasks there are."""
        return max(count for _, rule, count, _ in self.rows if rule == "base")

    @property
    def orders(self) -> list[int]:
        return sorted({order for order, *_ in self.rows})

    @property
    def rules(self) -> list[str]:
        return sorted({rule for _, rule, _, _ in self.rows} - {"base", "own"})

    def ways(self, count: int) -> list[tuple[str, str]]:
        """The rules that were asked at this number of models, each with a way of reading it."""
        found = {(rule, read) for _, rule, c, read in self.rows if c == count and rule not in ("base", "own")}
        return sorted(way for way in found if way[1] != "alone")

    @property
    def checkpoints(self) -> list[int]:
        """The numbers of models at which merges were asked."""
        return sorted({c for _, rule, c, read in self.rows if rule not in ("base", "own") and read != "alone"})

    def asked(self, rule: str, count: int, read: str) -> list[int]:
        """The orders in which this merge was asked."""
        return [order for order in self.orders if (order, rule, count, read) in self.rows]

    def counts(self, rule: str, read: str = "default") -> list[int]:
        return sorted({c for _, name, c, way in self.rows if (name, way) == (rule, read)})

    def answers(self, order: int, rule: str, count: int, read: str) -> Answers | None:
        """Right (1) and wrong (0) answers by task. What no order changes was asked in the first order alone; base and
        own are cut to the order's tasks."""
        row = self.rows.get((order, rule, count, read)) or (
            self.rows.get((0, rule, count, read)) if count == self.most else None
        )
        if rule in ("base", "own"):
            whole = self.rows.get((0, rule, self.most, "paper"))
            tasks = self.tasks(order, count)
            return None if tasks is None or whole is None else {task: whole["test"][task] for task in tasks}
        return None if row is None else row["test"]

    def tasks(self, order: int, count: int) -> list[str] | None:
        """Which tasks are merged at this point of the order."""
        if count == self.most:
            return list(self.rows[0, "base", count, "paper"]["test"])
        found = next(
            (
                row
                for (o, name, c, _), row in self.rows.items()
                if (o, c) == (order, count) and name not in ("base", "own")
            ),
            None,
        )
        return None if found is None else list(found["test"])

    def accuracy(self, rule: str, count: int, read: str = "default") -> tuple[float, float] | None:
        """Mean over tasks of the accuracy in per cent: its mean and standard deviation over the orders."""
        found = [mean(a) for order in self.orders if (a := self.answers(order, rule, count, read))]
        if not found:
            return None
        centre = sum(found) / len(found)
        return centre, math.sqrt(sum((x - centre) ** 2 for x in found) / max(1, len(found) - 1))

    @property
    def tuned(self) -> bool:
        """Whether scales were chosen by validation rows too."""
        return any(read == "tuned" for *_, read in self.rows)

    @property
    def watches(self) -> bool:
        """Whether the suite says what a merge must not break."""
        return "watched" in self.rows[0, "base", self.most, "paper"]

    def watched(self, rule: str, count: int, read: str, what: str) -> float | None:
        """A figure of what must not break: mean over the orders, for `own` over the fine-tunes."""
        if rule == "own":
            each = self.rows.get((0, "own", self.most, "paper"), {"each": {}})["each"]
            found = [each[task]["watched"][what] for task in each]
        elif rule == "base":
            found = [self.rows[0, "base", self.most, "paper"]["watched"][what]]
        else:
            found = [
                row["watched"][what]
                for (_, name, c, way), row in self.rows.items()
                if (name, c, way) == (rule, count, read) and "watched" in row
            ]
        return sum(found) / len(found) if found else None

    def allowed(self) -> float | None:
        """The neutral perplexity that a merge must not exceed: 5 % above the worse of the base and the fine-tunes. None
        as long as these were not asked."""
        own, base = (
            self.rows.get((0, "own", self.most, "paper")),
            self.watched("base", self.most, "paper", "perplexity"),
        )
        if own is None or base is None:
            return None
        return 1.05 * max(base, *(float(one["watched"]["perplexity"]) for one in own["each"].values()))

    def transfer(self, rule: str, read: str = "default") -> float | None:
        """Backward transfer: what a task gains (loses, below 0) from the first checkpoint that has it to the last one,
        mean over tasks and orders."""
        gains = []
        for order in self.orders:
            first: dict[str, float] = {}
            last = self.answers(order, rule, self.most, read)
            for count in self.counts(rule, read)[:-1]:
                for task, answers in (self.answers(order, rule, count, read) or {}).items():
                    first.setdefault(task, share(answers))
            if last and first:
                gains.append(sum(share(last[task]) - value for task, value in first.items()) / len(first))
        return sum(gains) / len(gains) if gains else None

    def cost(self, rule: str, what: str) -> list[float]:
        """A figure of every fold of the first order."""
        rows = [
            row for (o, name, c, way), row in self.rows.items() if (o, name, c, way) == (0, rule, self.most, "default")
        ]
        return [fold[what] for fold in rows[0]["costs"]] if rows else []

    def scales(self, rule: str, count: int, read: str) -> list[float]:
        """What X was multiplied by, by order."""
        return [
            row["factor"]
            for (_, name, c, way), row in sorted(self.rows.items())
            if (name, c, way) == (rule, count, read)
        ]

    def difference(self, one: tuple[str, str], other: tuple[str, str], count: int) -> tuple[float, float, float] | None:
        """Accuracy of `one` = (rule, read) less that of `other`, in points: mean over tasks and orders, and its 95 %
        interval.

        Paired bootstrap: the test rows of each task are drawn anew, the same rows for both and in all orders. Tasks and
        orders are as they are.
        """
        by_task: dict[str, list[np.ndarray]] = {}
        used = 0
        for order in self.orders:
            a, b = self.answers(order, *_at(one, count)), self.answers(order, *_at(other, count))
            if a is None or b is None:
                continue
            used += 1
            for task in a:
                by_task.setdefault(task, []).append(_vector(a[task]) - _vector(b[task]))
        if not used:
            return None
        random = np.random.default_rng(0)
        centre, draws = 0.0, np.zeros(DRAWS)
        for task in sorted(by_task):
            summed = np.sum(by_task[task], axis=0) / (used * count)
            centre += float(summed.mean())
            picked = random.integers(0, len(summed), (DRAWS, len(summed)))
            draws += summed[picked].mean(1)
        low, high = np.percentile(draws, (2.5, 97.5))
        return 100 * centre, 100 * float(low), 100 * float(high)


def _at(what: tuple[str, str], count: int) -> tuple[str, int, str]:
    return what[0], count, what[1]


def _vector(answers: str) -> np.ndarray:
    return np.frombuffer(answers.encode(), dtype=np.uint8).astype(np.float64) - 48.0


def share(answers: str) -> float:
    """Accuracy on one task, in per cent."""
    return 100.0 * answers.count("1") / len(answers)


def mean(found: Answers) -> float:
    """Mean of the accuracies over tasks, in per cent."""
    return sum(share(answers) for answers in found.values()) / len(found)
