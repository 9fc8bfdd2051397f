"""Which scales to try, one after the other, and which of those tried is best. Pure: what a scale is worth, the caller
says.

One dimension at a time: first a grid; then the middle of the wider of the two gaps beside the best, or beyond an end
where the best is there. Of a function with one peak the gap around it halves with every second evaluation, once the
peak lies between two points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from continual.errors import Misconfigured
from continual.rules import ReadOptions
from continual.rules.scale import Policy

LEAST = 3
"""With fewer evaluations there is nothing to search."""
REACH = 4.0
"""The grid goes from 1/REACH of the scale in force to REACH times it."""
SLOPES = (-1.0, 2.0)
"""The slopes of LiNeS that are tried. The mean over depth is 1, so at 2 the first layer stays as it is in the base."""
TRIED = (0.0, 1.0, -0.5, 2.0, -1.0)
"""Slopes that are tried first, as many as there is room for."""


class Trial(NamedTuple):
    """A way to read the merged model, and what that is worth, higher being better; `loss` is what it was found by,
    where that is something else. `drift`: how far what must stay went, in nats a token, where anything must; of one
    that went `too_far` it does not matter what it is worth."""

    options: ReadOptions
    score: float
    loss: float | None = None
    drift: float | None = None
    too_far: bool = False


@dataclass(frozen=True, slots=True)
class Range:
    """Where to look. There are `count` evaluations, the first of `start`, the way in which the merged model is read
    now; the others over the value of `policy` around `around`, and over LiNeS' slope where `lines`. A value beyond
    `most` reads as `most` does.

    Raises Misconfigured where there is nothing to search.
    """

    start: ReadOptions
    count: int
    policy: Policy
    around: float
    most: float = math.inf
    lines: bool = False

    def __post_init__(self) -> None:
        if self.count < LEAST:
            raise Misconfigured(f"candidates = {self.count}: a search takes at least {LEAST}")
        if not math.isfinite(self.around) or self.around == 0 or (self.policy != "number" and self.around < 0):
            allowed = "other than" if self.policy == "number" else "above"
            raise Misconfigured(
                f"around = {self.around:g}: the search multiplies and divides it; name a number {allowed} 0"
            )


def search(evaluate: Callable[[ReadOptions], float], where: Range) -> list[Trial]:
    """Tries ways of reading; returns every trial in order. `evaluate` says what one is worth; none is tried twice.
    Raises Misconfigured for a score that is no finite number."""
    trials: list[Trial] = []
    asking = candidates(where)
    try:
        options = next(asking)
        while True:
            score = evaluate(options)
            if not math.isfinite(score):
                raise Misconfigured(
                    f"candidate {options}: its score is {score}; an evaluation has to end in a finite number"
                )
            trials.append(Trial(options, score))
            options = asking.send(score)
    except StopIteration:
        return trials


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest score of those that did not go too far; of several the nearest to the first trial."""
    start = trials[0].options
    return max(
        (trial for trial in trials if not trial.too_far),
        key=lambda trial: (trial.score, -_distance(trial.options, start)),
    )


def candidates(where: Range) -> Generator[ReadOptions, float, None]:
    """Yields ways of reading, and is sent what each is worth. There are `count` of them, fewer only where the next
    would be one of those before."""
    start = where.start
    first = Trial(start, (yield start))
    slopes = where.count // 3 if where.lines else 0
    trials = yield from _values(where, first, where.count - slopes)
    if slopes:
        yield from _slopes(best(trials), slopes)


def _values(where: Range, first: Trial, count: int) -> Generator[ReadOptions, float, list[Trial]]:
    """Values of the policy that is searched; `first` counts as one of `count`. Returns the trials."""
    start = where.start
    trials = [first]
    sign = math.copysign(1.0, where.around)
    known: dict[float, float] = {}
    if start.policy == where.policy and sign * start.value > 0:
        known[min(abs(start.value), where.most)] = first.score
    near = next(iter(known), min(abs(where.around), where.most))
    axis = Axis(0.0, where.most, near, geometric=True)
    climbing = climb(axis, _grid(abs(where.around), count), known, count - 1)
    value = next(climbing, None)
    while value is not None:
        options = replace(start, policy=where.policy, value=sign * value)
        trials.append(Trial(options, (yield options)))
        value = _send(climbing, trials[-1].score)
    return trials


def _slopes(top: Trial, count: int) -> Generator[ReadOptions, float, None]:
    """At most `count` slopes of LiNeS, with the scale of the best trial so far."""
    now = slope(top.options.lines)
    known = {} if now is None else {now: top.score}
    axis = Axis(*SLOPES, near=now or 0.0, geometric=False)
    climbing = climb(axis, TRIED[: max(2, count // 2 + 1)], known, count)
    value = next(climbing, None)
    while value is not None:
        score = yield replace(top.options, lines=lines_of(value))
        value = _send(climbing, score)


def lines_of(b: float) -> tuple[float, float] | None:
    """(α, β) of LiNeS whose mean over depth is 1: 1 − b/2 and b. None for a slope of 0."""
    return (1.0 - b / 2.0, b) if b else None


def slope(lines: tuple[float, float] | None) -> float | None:
    """The slope b of `lines` (α, β); None where their mean over depth is not 1, or the slope is not one that is
    tried."""
    b = lines[1] if lines else 0.0
    return b if (lines is None or math.isclose(lines[0], 1.0 - b / 2.0)) and SLOPES[0] <= b <= SLOPES[1] else None


class Axis(NamedTuple):
    """A line of numbers from `low` to `high`; where `geometric`, distances are of logarithms. Of equal scores the
    number nearest to `near` is better."""

    low: float
    high: float
    near: float
    geometric: bool

    def position(self, value: float) -> float:
        """Where a number is on the line."""
        return math.log(value) if self.geometric else value

    def at(self, position: float) -> float:
        """The number at a position, to six figures, within the ends."""
        value = float(f"{math.exp(min(max(position, -690.0), 690.0)) if self.geometric else position:.6g}")
        return min(max(value, self.low), self.high)

    def top(self, found: Mapping[float, float]) -> float:
        """The number with the best score; `found` has the score of each number."""
        return max(found, key=lambda value: (found[value], -abs(self.position(value) - self.position(self.near))))

    def following(self, found: Mapping[float, float]) -> float | None:
        """What to try after `found`; None where every number that is left was tried."""
        if len(found) == 1:
            only = self.position(next(iter(found)))
            return next((value for by in (1.0, -1.0) if (value := self.at(only + by)) not in found), None)
        ordered = sorted(found)
        index = ordered.index(self.top(found))
        positions = [self.position(value) for value in ordered]
        left = positions[index] - positions[index - 1] if index > 0 else None
        right = positions[index + 1] - positions[index] if index + 1 < len(positions) else None
        tries: list[tuple[float, float]] = []  # how wide the gap is, and what to try in it; beyond an end goes first
        if left is not None:
            tries.append((left, self.at(positions[index] - left / 2.0)))
        elif right is not None:
            tries.append((math.inf, self.at(positions[index] - 2.0 * right)))
        if right is not None:
            tries.append((right, self.at(positions[index] + right / 2.0)))
        elif left is not None:
            tries.append((math.inf, self.at(positions[index] + 2.0 * left)))
        return next((value for _, value in sorted(tries, reverse=True) if value not in found), None)


def climb(axis: Axis, grid: Sequence[float], known: Mapping[float, float], count: int) -> Generator[float, float, None]:
    """Yields at most `count` numbers on `axis`, and is sent the score of each: those of `grid`, then where the best of
    them and of `known` leads."""
    found = dict(known)
    for value in dict.fromkeys(min(max(point, axis.low), axis.high) for point in grid):
        if count and value not in found:
            found[value] = yield value
            count -= 1
    while count:
        following = axis.following(found)
        if following is None:
            return
        found[following] = yield following
        count -= 1


def _grid(around: float, count: int) -> list[float]:
    """About half of `count` numbers, from around/REACH to around·REACH, the middle first."""
    half = max(1, count // 4)
    powers = sorted((k / half for k in range(-half, half + 1)), key=abs)
    return [around if power == 0 else float(f"{around * REACH**power:.6g}") for power in powers]


def _send(climbing: Generator[float, float, None], score: float) -> float | None:
    """The next number; None where there is none."""
    try:
        return climbing.send(score)
    except StopIteration:
        return None


def _distance(options: ReadOptions, start: ReadOptions) -> float:
    """How far a way of reading is from `start`: the logarithm of the ratio of their scales, and the difference of their
    slopes."""
    if options == start:
        return 0.0
    ratio = options.value / start.value if start.value and options.policy == start.policy else 0.0
    alpha, beta = options.lines or (1.0, 0.0)
    alpha0, beta0 = start.lines or (1.0, 0.0)
    return (abs(math.log(ratio)) if ratio > 0 else 1e6) + abs(alpha - alpha0) + abs(beta - beta0)
