"""Which weights to try where the slopes of a loss are known: quasi-Newton steps over the logarithms of factors. Pure:
what factors are worth, and the slopes there, the caller says.

BFGS with the projections of Bertsekas 1982, "Projected Newton Methods for Optimization Problems with Simple
Constraints": at a bound, what leads beyond it is left out. The first step changes the factor with the steepest slope by
as much as it is told; a step that does not lower the loss is shortened.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from continual.lazily import Tensor, torch

FIRST = 2.0
"""By what the first step changes a factor, unless told otherwise; no later step by more than the square of it."""
ENOUGH = 1e-4
"""The share of what the slopes promise that a step has to keep (Armijo)."""
SETTLED = 1e-5
"""Where what a step promises is less, relative to the loss, there is nothing left to find."""


class Here(NamedTuple):
    """The loss at some factors, and its slope along the logarithm of each of them."""

    loss: float
    slopes: tuple[float, ...]


class Bend(NamedTuple):
    """A step, over which the slopes changed so, and the inner product of both."""

    step: Tensor
    change: Tensor
    along: float


def descend(
    evaluate: Callable[[tuple[float, ...]], Here],
    count: int,
    candidates: int,
    most: float,
    first: float = FIRST,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Asks for at most `candidates` points of `count` factors, the first of them all 1, each lower than those before
    where that can be; no factor is over `most` or under 1/`most`. Returns where nothing is left to find, or as soon as
    `enough` says so.

    A loss that is no finite number is taken for a high one.
    """
    bound, short = math.log(most), math.log(first)
    at = torch.zeros(count, dtype=torch.float64)
    here = _asked(evaluate, at)
    left = candidates - 1
    bends: list[Bend] = []  # what is known of the Hessian
    while left and here is not None and not enough():
        loss, slopes = here
        free = ~(((at >= bound) & (slopes < 0)) | ((at <= -bound) & (slopes > 0)))
        steep = torch.where(free, slopes, 0.0)
        if not bool(steep.any()):
            return
        way = torch.where(free, -_bent(bends, steep), 0.0) if bends else -short * steep / steep.abs().max()
        if not float(way @ steep) < 0:
            way, bends = -short * steep / steep.abs().max(), []
        way = way * min(1.0, 2 * short / float(way.abs().max()))
        length, there = 1.0, None
        while left and not enough():
            target = (at + length * way).clamp(-bound, bound)
            step = target - at
            promised = float(step @ slopes)
            if -promised <= SETTLED * abs(loss):
                return
            there = _asked(evaluate, target)
            left -= 1
            if there is not None and there[0] <= loss + ENOUGH * promised:
                break
            curved = math.inf if there is None else there[0] - loss - promised
            length *= min(0.5, max(0.1, -promised / (2 * curved) if curved > 0 else 0.5))
            there = None
        if there is None:
            return
        change = there[1] - slopes
        if (along := float(step @ change)) > 1e-10 * float(step.norm() * change.norm()):  # else it is not convex there
            bends.append(Bend(step, change, along))
        at, here = target, there


def _asked(evaluate: Callable[[tuple[float, ...]], Here], at: Tensor) -> tuple[float, Tensor] | None:
    """The loss and its slopes; None where one of them is no finite number."""
    found = evaluate(tuple(float(f"{factor:.6g}") for factor in at.exp().tolist()))
    slopes = torch.tensor(found.slopes, dtype=torch.float64)
    return (found.loss, slopes) if math.isfinite(found.loss) and bool(slopes.isfinite().all()) else None


def _bent(bends: list[Bend], slopes: Tensor) -> Tensor:
    """The inverse Hessian times some slopes, from all the steps (Nocedal and Wright 2006, algorithm 7.4), so that no
    matrix of as many rows as there are factors is made."""
    found, shares = slopes.clone(), []
    for step, change, along in reversed(bends):
        shares.append(float(step @ found) / along)
        found -= shares[-1] * change
    first = bends[0]
    found *= first.along / float(first.change @ first.change)
    for (step, change, along), share in zip(bends, reversed(shares), strict=True):
        found += (share - float(change @ found) / along) * step
    return found
