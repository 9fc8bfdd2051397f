"""The weights that Frank-Wolfe may choose, and the duality gap over them. Pure maths; how steps are made is in `steps`.

Minimised is ℓ(Σ_i w_i τ_i) over 𝓜 = ρ·conv({0} ∪ {τ_i}) ("FW-Merging: Scaling Model Merging with Frank-Wolfe
Optimization", 2025). A vertex is a task vector. Weights are an m × L tensor, float64: one row for each of m vertices,
one column where models are weighed whole, or one for each of L layers. Weights are feasible where 0 <= weights <= caps
and each column sums to at most ρ.

Departures from the paper: the zero vertex belongs to the hull, and a vertex may have a cap, so that it can shrink and
not grow beyond it.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from continual.errors import Misconfigured
from continual.lazily import Tensor, torch

GONE = 1e-9
"""Weights up to this share of ρ are taken for 0."""


class Problem(Protocol):
    """ℓ as a function of the weights (m × L, float64)."""

    def loss(self, weights: Tensor) -> float:
        """ℓ at these weights."""
        ...

    def gradient(self, weights: Tensor, of: Tensor | None = None) -> tuple[float, Tensor]:
        """The loss and the slopes, m × L: slopes[i, l] = ⟨g_l, τ_{i,l}⟩.

        `of` (m, bool) marks the vertices whose slopes are needed; nobody looks at the slopes of the others. The caller
        may ask for one point twice in a row: for some vertices, then for all.
        """
        ...


def oracle(slopes: Tensor, rho: float, allowed: Tensor, caps: Tensor) -> Tensor:
    """The feasible weights, m × L, with the least ⟨slopes, weights⟩ among the `allowed` vertices (m, bool).

    In each column the most negative slopes get weight, each up to its cap, until ρ is used up.
    """
    order = slopes.argsort(dim=0, stable=True)
    room = torch.where(allowed[:, None] & (slopes < 0), caps.clamp(max=rho), 0.0).gather(0, order)
    before = room.cumsum(0) - room  # what the better vertices of the column can take
    return torch.zeros_like(slopes).scatter(0, order, room.minimum((rho - before).clamp(min=0.0)))


def gap(weights: Tensor, slopes: Tensor, rho: float, allowed: Tensor, caps: Tensor | None = None) -> float:
    """The duality gap ⟨slopes, weights⟩ − min ⟨slopes, w⟩, the minimum over feasible w of the `allowed` vertices.

    Without caps it is Σ_l ⟨g_l, τ_l⟩ − min(0, ρ·min_i slopes[i, l]). Of a convex ℓ it is at least ℓ − ℓ*.
    """
    target = oracle(slopes, rho, allowed, torch.full_like(slopes, math.inf) if caps is None else caps)
    return float((slopes * (weights - target)).sum())


def project(values: Tensor, total: float, caps: Tensor) -> Tensor:
    """The point of {0 <= u <= caps, Σu <= total} that is nearest to `values` (1-D).

    It is clip(values − θ, 0, caps) with the least θ >= 0 whose sum fits.
    """
    fits = values.clamp(min=0.0).minimum(caps)
    if float(fits.sum()) <= total:
        return fits
    # Between two neighbours of these breaks the sum Σ(θ) is linear.
    breaks = torch.cat([values.new_zeros(1), values, values - caps]).clamp(min=0.0).sort().values
    sums = (values - breaks[:, None]).clamp(min=0.0).minimum(caps).sum(1)
    low = int((sums > total).sum()) - 1  # Σ(breaks[low]) > total >= Σ(breaks[low + 1])
    over = values - (breaks[low] + breaks[low + 1]) / 2
    full = over >= caps
    free = (over > 0) & (over < caps)
    theta = breaks[low] if not bool(free.any()) else (values[free].sum() + caps[full].sum() - total) / free.sum()
    return (values - theta).clamp(min=0.0).minimum(caps)


class Point(NamedTuple):
    """Feasible weights, and the loss and the slopes there (m × L)."""

    weights: Tensor
    loss: float
    slopes: Tensor


class Hull(NamedTuple):
    """A problem, and the weights over which it is minimised: `caps` (m × L, float64, inf for no cap) and ρ."""

    problem: Problem
    caps: Tensor
    rho: float

    def feasible(self, weights: Tensor) -> Tensor:
        """The weights brought into the hull: exactly 0 where a vertex has left.

        Rounding can leave the hull, and so can weights that were chosen under another ρ or another cap.
        """
        weights = weights.clamp(min=0.0).minimum(self.caps)
        weights = torch.where((weights <= GONE * self.rho).all(1, keepdim=True), 0.0, weights)
        for column in (weights.sum(0) > self.rho * (1 + 1e-12)).nonzero().flatten().tolist():
            weights[:, column] = project(weights[:, column], self.rho, self.caps[:, column])
        return weights

    def loss(self, weights: Tensor) -> float:
        """The loss at the nearest feasible weights."""
        return self.problem.loss(self.feasible(weights))

    def at(self, weights: Tensor, of: Tensor | None = None) -> Point:
        """The point at the nearest feasible weights; slopes of the vertices that `of` marks, by default of all.

        Raises Misconfigured where the loss or a slope is not finite.
        """
        weights = self.feasible(weights)
        point = Point(weights, *self.problem.gradient(weights, of))
        if not (math.isfinite(point.loss) and bool(point.slopes.isfinite().all())):
            raise Misconfigured(
                f"the objective: its loss ({point.loss}) and every slope have to be finite; "
                "look at its rows and its dtype"
            )
        return point

    def gap(self, point: Point, allowed: Tensor) -> float:
        """The duality gap at `point` over the `allowed` vertices (m, bool)."""
        return gap(point.weights, point.slopes, self.rho, allowed, self.caps)

    def oracle(self, point: Point, allowed: Tensor) -> Tensor:
        """The feasible weights (m × L) that the slopes at `point` promise most of."""
        return oracle(point.slopes, self.rho, allowed, self.caps)
