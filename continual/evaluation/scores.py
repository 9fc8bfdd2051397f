"""The metrics that a command prints of a model."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterator, Mapping

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


def lower_of(metrics: Collection[str], globs: Collection[str]) -> frozenset[str]:
    """The metrics of which less is better. Raises ValueError for a name that none of them has: it may be another's."""
    unknown = [one for one in globs if not any(fnmatch.fnmatchcase(name, one) for name in metrics)]
    if unknown:
        raise ValueError(f"evaluation.lower: there is no metric {', '.join(unknown)}; there is {outside.few(metrics)}")
    return frozenset(name for name in metrics if any(fnmatch.fnmatchcase(name, glob) for glob in globs))
