"""Whether a merge with one more model is worse than others, by metrics of the same rows: pass, fail, or not to be told.

The rows are compared in pairs, so that what they share does not count: of n differences the mean d, and its standard
error s. Where rows are right or wrong (0 and 1) few of them differ, and the three that were not seen and could have
been count as if they had: of 100 rows that are answered alike the error is 1.7 points, not 0, so that at 1 of 20 a fall
of 2.9 points could hide in them (exactly: 3.0, the rule of three). Other numbers of which rows have few (percents, 0
and 100; marks from 0 to 5) are taken so too, in units of their range. Where they are real numbers (the probability that
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
from continual.state.parts import Evaluated

DROP = 0.01
"""What a metric may fall by that a table does not name."""


_NOW, _BASE, _LIMIT, _BEST = "the merge in force", "the base", "the limit", "the best of the merges before"
_SETTING = {
    _NOW: "evaluation.max_drop",
    _BASE: "evaluation.max_drop_base",
    _LIMIT: "evaluation.min",
    _BEST: "evaluation.max_drop_best",
}


class Answers(NamedTuple):
    """What was said of one model: its metrics, and of which of them less is better."""

    metrics: Mapping[str, Metric]
    lower: frozenset[str] = frozenset()


class Drop(NamedTuple):
    """By how much a metric is worse than that of `beside` (in the metric's unit), by how much it may be, and the
    standard error of the difference; None where rows are not known. `rows`: how many were compared. `said`: why it
    cannot be compared, where `drop` is infinite."""

    name: str
    beside: str
    drop: float
    most: float
    error: float | None
    rows: int = 0
    said: str = "is missing"

    def __str__(self) -> str:
        if self.drop == math.inf:
            return f"{self.name} {self.said}"
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
    after: Answers,
    now: Answers | None,
    base: Answers | None,
    settings: EvaluationSettings,
    looks: int = 1,
    past: Sequence[Evaluated] = (),
) -> Verdict:
    """Compares what is said of a merge with what is said of the merge in force and of the base, where they were asked,
    and with the absolute limits. `looks`: how often more rows may be asked, this time included. `past`: what was found
    at the folds in force, the oldest first."""
    lower = {name for known in (after, now, base) if known for name in known.lower}
    drops: list[Drop] = []
    for beside, other, limits in ((_NOW, now, settings.max_drop), (_BASE, base, None)):
        for name, before in other.metrics.items() if other is not None else ():
            most = allowed(settings.max_drop_base, name) if limits is None else allowed(limits, name, DROP)
            if most is not None:
                drops.append(_paired(name, beside, before, after.metrics.get(name), most, less=name in lower))
    for drop in [one for one in drops if one.beside == _NOW and 0.0 < one.drop < math.inf]:
        if (most := allowed(settings.max_drop_best, drop.name)) is not None:
            drops.append(_below_best(drop, most, past, less=drop.name in lower))
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
    counts = [len(one) if isinstance(one, tuple) else None for one in (before, after)]
    if counts[0] != counts[1]:
        theirs, ours = ("no rows" if count is None else f"{count} rows" for count in counts)
        return Drop(name, beside, math.inf, most, None, said=f"has {ours}, and that of {beside} has {theirs}")
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) > 1:
        apart = [sign * (one - other) for one, other in zip(before, after, strict=True)]
        error = _error(apart, _step((*before, *after)))
        return Drop(name, beside, math.fsum(apart) / len(apart), most, error, len(apart))
    return Drop(name, beside, sign * (mean(before) - mean(after)), most, None)


def _below_best(drop: Drop, most: float, past: Sequence[Evaluated], *, less: bool) -> Drop:
    """By how much a metric that falls now is below the best that it had, by what each fold did to it: a fold that was
    let in though it failed is where somebody wanted it to be."""
    best = level = 0.0
    for one in past:
        before, after = (one.before or {}).get(drop.name), one.after.get(drop.name)
        if before is not None and after is not None:
            level += before - after if less else after - before
            best = level if one.verdict == "fail" else max(best, level)
    return Drop(drop.name, _BEST, best - level + drop.drop, most, None)


def _absolute(name: str, value: Metric, least: float, *, less: bool) -> Drop:
    """Beside a limit there is nothing that a metric may fall by: below it is below it, and what chance does to rows
    that were drawn anew is not asked."""
    return Drop(name, _LIMIT, (mean(value) - least) if less else (least - mean(value)), 0.0, None)


def _step(values: Sequence[float]) -> float:
    """By how much a row can change at once, where rows have few different numbers, so that some that change were not
    seen: 1 of right and wrong answers, the range of others. 0 of real numbers."""
    different = {*values}
    if different <= {0.0, 1.0}:
        return 1.0
    if len(different - {0.0}) == 1:
        return abs(max(different, key=abs))
    return max(different) - min(different) if len(different) <= max(2, math.isqrt(len(values) // 2)) else 0.0


def _error(apart: Sequence[float], step: float) -> float:
    """The standard error of the mean of differences; of rows that change by a `step` with three more that do."""
    count = len(apart)
    middle = math.fsum(apart) / count
    spread = math.fsum((one - middle) ** 2 for one in apart)
    if step:
        return math.sqrt(spread + 3.0 * step * step) / count
    return math.sqrt(spread / (count - 1) / count)
