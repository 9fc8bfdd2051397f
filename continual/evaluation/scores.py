"""The metrics that a command prints of a model, and whether one model is worse than another by them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from continual import outside

Metric = float | tuple[float, ...]
"""One number, or one for each row."""


_METRICS = 1000
"""Metrics at most: each is in the record of every fold."""
_NUMBERS = 1_000_000
"""Numbers at most, over all metrics and rows."""
_LONGEST = 200
_LARGEST = 1e100
"""What is larger would overflow in the sums of squares."""


def parse(line: str) -> dict[str, Metric]:
    """The metrics in the last line of an output: a JSON object of numbers, of lists of numbers (one for each row), or
    of such objects, whose keys are joined by dots. Raises ValueError saying what is there instead."""
    if not line:
        raise ValueError("it printed nothing")
    try:
        found = outside.parse_fields(line.encode(), values=_NUMBERS)
    except outside.Malformed as error:
        raise ValueError(f"its last line is no JSON object of metrics ({error}): {line[:200]!r}") from None
    metrics: dict[str, Metric] = {}
    for name, value in _flat(found, ""):
        if name in metrics:
            raise ValueError(f"two of its metrics are called {name}")
        metrics[name] = value
    if not metrics:
        raise ValueError("its last line has no metric")
    if len(metrics) > _METRICS:
        raise ValueError(f"its last line has {len(metrics)} metrics, and {_METRICS} are the most: put rows into lists")
    return metrics


def _flat(body: Mapping[str, object], before: str) -> Iterator[tuple[str, Metric]]:
    for key, value in body.items():
        name = f"{before}{key}"
        if not key or not name.isprintable() or len(name) > _LONGEST:
            raise ValueError(f"{outside.shown(name)!r} is no name of a metric: up to {_LONGEST} letters that print")
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list):
            if not value:
                raise ValueError(f"{name} has no row")
            yield name, tuple(_number(name, one) for one in value)
        else:
            yield name, _number(name, value)


def _number(name: str, value: object) -> float:
    try:
        found = float(value) if isinstance(value, bool | int | float) else math.nan
    except OverflowError:  # an integer that no float holds
        found = math.inf
    if not abs(found) <= _LARGEST:
        raise ValueError(f"{name} is no finite number up to {_LARGEST:g} but {outside.shown(value)}")
    return found


def mean(metric: Metric) -> float:
    """The number, or the mean over the rows."""
    return metric if isinstance(metric, float) else math.fsum(metric) / len(metric)


class Drop(NamedTuple):
    """By how much a metric is worse than before, and the standard error of that; 0 where rows are not known."""

    name: str
    drop: float
    error: float


class Verdict(NamedTuple):
    """`worse`: the metrics that fell by more than they may; `unclear`: those of them where that may be chance."""

    worse: tuple[Drop, ...]
    unclear: tuple[Drop, ...]


def compare(
    before: Mapping[str, Metric],
    after: Mapping[str, Metric],
    most: float,
    *,
    lower: Collection[str] = (),
    sigmas: float = 1.0,
) -> Verdict:
    """Whether `after` is worse than `before` in any metric by more than `most`: each is compared row by row where both
    have as many rows. `lower`: metrics of which less is better. What falls by more than `most`, and by less than
    `sigmas` standard errors, is unclear. A metric that is missing afterwards is worse by infinity."""
    worse: list[Drop] = []
    unclear: list[Drop] = []
    for name, known in before.items():
        sign = -1.0 if name in lower else 1.0
        if name not in after:
            worse.append(Drop(name, math.inf, 0.0))
            continue
        drop, error = _paired(known, after[name])
        if sign * drop > most:
            found = Drop(name, sign * drop, error)
            (worse if sign * drop > sigmas * error else unclear).append(found)
    return Verdict(tuple(worse), tuple(unclear))


def _paired(before: Metric, after: Metric) -> tuple[float, float]:
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after) > 1:
        apart: Sequence[float] = [one - other for one, other in zip(before, after, strict=True)]
        middle = math.fsum(apart) / len(apart)
        spread = math.fsum((one - middle) ** 2 for one in apart) / (len(apart) - 1)
        return middle, math.sqrt(spread / len(apart))
    return mean(before) - mean(after), 0.0
