"""Which scales to try, one after the other, and which of those tried is best. Pure: what a scale is worth is asked of
the caller.

One dimension at a time: first a grid, then the middle of the wider of the two gaps beside the best, or beyond an end
where the best is there. Of a function with one peak the gap around it halves with every second evaluation once the peak
lies between two points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from continual.errors import Misconfigured
from continual.rules import ReadOptions
from continual.rules.scale import Policy

LEAST = 3
"""Evaluations below which there is nothing to search."""
REACH = 4.0
"""The grid goes from 1/REACH of the scale in force to REACH times it."""
SLOPES = (-1.0, 2.0)
"""The slopes of LiNeS that are tried: mean 1 over depth, so that at 2 the first layer stays as it is in the base."""


class Trial(NamedTuple):
    """How the merge was read, and what that was worth, higher being better."""

    options: ReadOptions
    score: float


@dataclass(frozen=True, slots=True)
class Space:
    """Where to look: `count` evaluations, the first of them of `start`, which is how the merge is read now; over the
    value of `policy` around `around`, and over LiNeS' slope where `lines`. Beyond `most` a value reads as `most` does.
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
            raise Misconfigured(
                f"around = {self.around:g}: the search multiplies and divides it; name a number {'other than' if self.policy == 'number' else 'above'} 0"
            )


def search(evaluate: Callable[[ReadOptions], float], space: Space) -> list[Trial]:
    """Every trial in order. `evaluate` says what a way of reading is worth; none is asked twice. Raises Misconfigured
    for a score that is no finite number."""
    trials: list[Trial] = []
    asking = candidates(space)
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
    """The highest score; of equal ones the nearest to the first trial."""
    start = trials[0].options
    return max(trials, key=lambda trial: (trial.score, -_distance(trial.options, start)))


def candidates(space: Space) -> Generator[ReadOptions, float, None]:
    """Ways of reading; what each is worth is sent in. `count` of them, fewer only where the next would be one of those
    before."""
    start = space.start
    trials = [Trial(start, (yield start))]
    slopes = space.count // 3 if space.lines else 0
    sign = math.copysign(1.0, space.around)
    known: dict[float, float] = {}
    if start.policy == space.policy and sign * start.value > 0:
        known[min(abs(start.value), space.most)] = trials[0].score
    near = next(iter(known), min(abs(space.around), space.most))
    axis = Axis(0.0, space.most, near, geometric=True)
    climbing = climb(axis, _grid(abs(space.around), space.count - slopes), known, space.count - slopes - 1)
    value = next(climbing, None)
    while value is not None:
        options = ReadOptions(space.policy, sign * value, start.lines)
        trials.append(Trial(options, (yield options)))
        value = _send(climbing, trials[-1].score)
    if not slopes:
        return
    top = best(trials)
    now = slope(top.options.lines)
    known = {} if now is None else {now: top.score}
    axis = Axis(*SLOPES, near=now or 0.0, geometric=False)
    climbing = climb(axis, (0.0, 1.0, -0.5, 2.0, -1.0)[: max(2, slopes // 2 + 1)], known, slopes)
    value = next(climbing, None)
    while value is not None:
        options = ReadOptions(top.options.policy, top.options.value, lines_of(value))
        trials.append(Trial(options, (yield options)))
        value = _send(climbing, trials[-1].score)


def lines_of(b: float) -> tuple[float, float] | None:
    """(α, β) of LiNeS with mean 1 over depth: 1 − b/2 and b."""
    return (1.0 - b / 2.0, b) if b else None


def slope(lines: tuple[float, float] | None) -> float | None:
    """The b of which `lines` is made; None where its mean is not 1 or its slope is not one that is tried."""
    b = lines[1] if lines else 0.0
    return b if (lines is None or math.isclose(lines[0], 1.0 - b / 2.0)) and SLOPES[0] <= b <= SLOPES[1] else None


class Axis(NamedTuple):
    """A line of numbers from `low` to `high`, measured by ratios where `geometric`; of equal scores the one nearest to
    `near` is better."""

    low: float
    high: float
    near: float
    geometric: bool

    def place(self, value: float) -> float:
        return math.log(value) if self.geometric else value

    def at(self, place: float) -> float:
        """The number there, to six figures, within the ends."""
        value = float(f"{math.exp(min(max(place, -690.0), 690.0)) if self.geometric else place:.6g}")
        return min(max(value, self.low), self.high)

    def top(self, found: Mapping[float, float]) -> float:
        """The best number so far."""
        return max(found, key=lambda value: (found[value], -abs(self.place(value) - self.place(self.near))))

    def following(self, found: Mapping[float, float]) -> float | None:
        """What to try after `found`; None where every number left is one of those."""
        if len(found) == 1:
            return next(
                (v for p in (1.0, -1.0) if (v := self.at(self.place(next(iter(found))) + p)) not in found), None
            )
        ordered = sorted(found)
        at = ordered.index(self.top(found))
        places = [self.place(value) for value in ordered]
        left = places[at] - places[at - 1] if at > 0 else None
        right = places[at + 1] - places[at] if at + 1 < len(places) else None
        tries = []  # (how wide the gap is, what to try in it): beyond an end goes first
        if left is None and right is not None:
            tries.append((math.inf, self.at(places[at] - 2.0 * right)))
        elif left is not None:
            tries.append((left, self.at(places[at] - left / 2.0)))
        if right is None and left is not None:
            tries.append((math.inf, self.at(places[at] + 2.0 * left)))
        elif right is not None:
            tries.append((right, self.at(places[at] + right / 2.0)))
        return next((value for _, value in sorted(tries, reverse=True) if value not in found), None)


def climb(axis: Axis, grid: Sequence[float], known: Mapping[float, float], count: int) -> Generator[float, float, None]:
    """At most `count` numbers on `axis`: those of `grid`, then where the best of them and of `known` leads."""
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
    try:
        return climbing.send(score)
    except StopIteration:
        return None


def _distance(options: ReadOptions, start: ReadOptions) -> float:
    """How far a way of reading is from `start`: by the ratio of the scales and the difference of the slopes."""
    if options == start:
        return 0.0
    ratio = options.value / start.value if start.value and options.policy == start.policy else 0.0
    (alpha, beta), (alpha0, beta0) = options.lines or (1.0, 0.0), start.lines or (1.0, 0.0)
    return (abs(math.log(ratio)) if ratio > 0 else 1e6) + abs(alpha - alpha0) + abs(beta - beta0)
