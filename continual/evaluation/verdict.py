"""Whether a merge with one more model is worse than others, by metrics of the same rows: pass, fail, or not to be told.

The rows are compared in pairs, so that what they share does not count: of n differences the mean d, and its standard
error s. Where rows are right or wrong (0 and 1) few of them differ, and the three that were not seen and could have
been count as if they had: of 100 rows that are answered alike the error is 1.7 points, not 0, so that at 1 of 20 a fall
of 2.9 points could hide in them (exactly: 3.0, the rule of three). Where they are real numbers (the probability that
the right answer was given, or a loss) most of them move a little, and s is a half or a third.

A metric may fall by `most`. It has *failed* where d is more than that, and more than chance makes of a merge that is
no worse: more than z·s, z being the one-sided quantile of Student's t, shared out among all metrics and looks
(Bonferroni). It has *passed* where a fall of twice `most` would have shown: where d + z′·s is less than that, z′ being
the quantile of `miss`, of one metric. In between the rows do not tell.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

from continual.config.evaluating import EvaluationSettings
from continual.evaluation.scores import Metric, mean

DROP = 0.01
"""What a metric may fall by that a table does not name."""


_NOW, _BASE, _LIMIT = "the merge in force", "the base", "the limit"
_SETTING = {_NOW: "evaluation.max_drop", _BASE: "evaluation.max_drop_base", _LIMIT: "evaluation.min"}


class Answers(NamedTuple):
    """What was said of one model: its metrics, and of which of them less is better."""

    metrics: Mapping[str, Metric]
    lower: frozenset[str] = frozenset()


class Drop(NamedTuple):
    """By how much a metric is worse than that of `beside` (in the metric's unit), by how much it may be, and the
    standard error of the difference; None where rows are not known. `rows`: how many were compared."""

    name: str
    beside: str
    drop: float
    most: float
    error: float | None
    rows: int = 0

    def __str__(self) -> str:
        if self.drop == math.inf:
            return f"{self.name} is missing"
        error = "" if self.error is None else f" ± {self.error:.2g} over {self.rows} rows"
        limit = f"{_SETTING[self.beside]} = {self.most:g}"
        return f"{self.name} is worse by {self.drop:.4g}{error} than {self.beside} ({limit})"


class Verdict(NamedTuple):
    """Every comparison that was made, those that failed, and those of which the rows do not tell."""

    drops: tuple[Drop, ...]
    failed: tuple[Drop, ...] = ()
    unclear: tuple[Drop, ...] = ()

    @property
    def word(self) -> str:
        """pass, fail or inconclusive."""
        return "fail" if self.failed else "inconclusive" if self.unclear else "pass"


def decide(
    after: Answers, now: Answers | None, base: Answers | None, settings: EvaluationSettings, looks: int = 1
) -> Verdict:
    """Compares what is said of a merge with what is said of the merge in force and of the base, where they were asked,
    and with the absolute limits. `looks`: how often more rows may be asked, this time included."""
    lower = {name for known in (after, now, base) if known for name in known.lower}
    drops: list[Drop] = []
    for beside, other, limits in ((_NOW, now, settings.max_drop), (_BASE, base, None)):
        for name, before in other.metrics.items() if other is not None else ():
            most = allowed(settings.max_drop_base, name) if limits is None else allowed(limits, name, DROP)
            if most is not None:
                drops.append(_paired(name, beside, before, after.metrics.get(name), most, less=name in lower))
    for name, value in after.metrics.items():
        if (least := allowed(settings.min, name)) is not None:
            drops.append(_absolute(name, value, least, less=name in lower))
    if isinstance(settings.min, dict):
        known = {drop.name for drop in drops}
        lost = (name for name in settings.min if name not in known and not set("*?[") & set(name))
        drops += [Drop(name, _LIMIT, math.inf, 0.0, None) for name in lost]
    share = settings.chance / max(1, sum(drop.error is not None for drop in drops)) / looks
    failed = tuple(drop for drop in drops if _has_failed(drop, share))
    unclear = tuple(drop for drop in drops if drop not in failed and not _has_passed(drop, settings.miss))
    return Verdict(tuple(drops), failed, unclear)


def allowed(limits: float | Mapping[str, float] | None, name: str, other: float | None = None) -> float | None:
    """The limit of the metric `name`: the number, or that of its name or of the first glob that it matches."""
    if limits is None or isinstance(limits, int | float):
        return limits
    if name in limits:
        return limits[name]
    return next((value for glob, value in limits.items() if fnmatch.fnmatchcase(name, glob)), other)


def _has_failed(drop: Drop, chance: float) -> bool:
    if drop.error is None or drop.drop == math.inf:
        return drop.drop > drop.most
    return drop.drop > max(drop.most, quantile(chance, drop.rows) * drop.error)


def _has_passed(drop: Drop, miss: float) -> bool:
    if drop.error is None or drop.most == 0.0:
        return drop.drop <= drop.most
    return drop.drop + quantile(miss, drop.rows) * drop.error <= 2 * drop.most


def quantile(chance: float, rows: int) -> float:
    """What Student's t of `rows` - 1 degrees exceeds with a probability of `chance` (Cornish and Fisher's expansion,
    Abramowitz and Stegun 26.7.5; within 1 % from 10 rows on)."""
    z, degrees = NormalDist().inv_cdf(1.0 - chance), max(1, rows - 1)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _paired(name: str, beside: str, before: Metric, after: Metric | None, most: float, *, less: bool) -> Drop:
    if after is None:
        return Drop(name, beside, math.inf, most, None)
    sign = -1.0 if less else 1.0
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after) > 1:
        apart = [sign * (one - other) for one, other in zip(before, after, strict=True)]
        exact = _is_right_or_wrong(before) and _is_right_or_wrong(after)
        return Drop(name, beside, math.fsum(apart) / len(apart), most, _error(apart, exact=exact), len(apart))
    return Drop(name, beside, sign * (mean(before) - mean(after)), most, None)


def _absolute(name: str, value: Metric, least: float, *, less: bool) -> Drop:
    """Beside a limit there is nothing that a metric may fall by: below it is below it, and what chance does to rows
    that were drawn anew is not asked."""
    return Drop(name, _LIMIT, (mean(value) - least) if less else (least - mean(value)), 0.0, None)


def _is_right_or_wrong(values: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)


def _error(apart: Sequence[float], *, exact: bool) -> float:
    """The standard error of the mean of differences; of answers that are right or wrong with three rows more
    that differ."""
    count = len(apart)
    middle = math.fsum(apart) / count
    spread = math.fsum((one - middle) ** 2 for one in apart)
    if exact:
        return math.sqrt(spread + 3.0) / count
    return math.sqrt(spread / (count - 1) / count)
