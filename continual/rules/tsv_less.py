"""TSV-M without one of its models, from the Grams of all triplets that stay: what explaining a merge asks for each
model and layer. Lengths and inner products alone.

P = A·G^{-1/2} is the polar factor of columns A with the Gram G. Without some of the columns it is that of a submatrix
of G, whose inverse root is an integral of resolvents (`linalg.quadrature`); where Y = (t² + G)⁻¹, the inverse of a
submatrix of t² + G is that of Y less Y_iY_ii⁻¹Y_iᵀ, of the rank of the columns that are gone. So is PᵀP₋ the unit
matrix less a thin product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from continual import linalg
from continual.rules.contract import Apart, LeftOut, Without

SAFE = 1e-8
"""Down to this share of the largest eigenvalue of a Gram nothing counts as null, nor in a part of it."""
Polar = Callable[[Tensor], Tensor]
"""The polar factor of a matrix."""
Choose = Callable[[Sequence[int], float], list[int]]
"""Which triplets stay, by the number of each one's model (0: that is gone), and how many models there are."""


class _PolarLess(NamedTuple):
    """P₋, the polar factor without some of the c columns. Where no direction is null, P₋ᵀP₋ is the unit matrix but for
    what is gone, and PᵀP₋ that less leftᵀ·right, both p×c (`thin`); else P₋ᵀP₋ (`own`), and PᵀP₋ (`inner`), c×c."""

    thin: tuple[Tensor, Tensor] | None = None
    own: Tensor | None = None
    whole: Tensor | None = None

    @property
    def inner(self) -> Tensor:
        """PᵀP₋; its columns that are gone mean nothing."""
        if self.whole is not None:
            return self.whole
        assert self.thin is not None
        found = self.thin[0].mT @ self.thin[1].neg()
        found.diagonal().add_(1.0)
        return found


class _PolarSide:
    """The columns of one side, k×c, and P, their polar factor (`factor`)."""

    def __init__(self, columns: Tensor, polar: Polar) -> None:
        self.columns, self._polar = columns, polar
        values, z = torch.linalg.eigh(linalg.gram(columns.mT))
        self._quick = float(values[0]) > SAFE * float(values[-1])
        if not self._quick:
            self.factor = polar(columns)
            return
        points, weights = linalg.quadrature(float(values[0]), float(values[-1]))
        roots = values.sqrt()
        self._root, self._inverse = linalg.gram(z * roots.sqrt()), linalg.gram(z / roots.sqrt())
        self._resolved = torch.stack([linalg.gram(z / (point + values).sqrt()) for point in points.tolist()])
        self._weights = weights.sqrt().to(z.device)
        self.factor = columns @ self._inverse

    def less(self, gone: slice) -> _PolarLess:
        """Without some of the columns."""
        if not self._quick:
            kept = self.columns.clone()
            kept[:, gone] = 0.0
            rest = self._polar(kept)
            return _PolarLess(own=rest.mT @ rest, whole=self.factor.mT @ rest)
        rows = self._resolved[:, gone]  # of Y: points × r × c
        lower = torch.linalg.cholesky(rows[:, :, gone])
        thin = torch.linalg.solve_triangular(lower, rows, upper=False) * self._weights[:, None, None]
        thin = thin.flatten(0, 1)
        thin[:, gone] = 0.0
        left = torch.cat([thin @ self._root, self._root[gone]])
        return _PolarLess((left, torch.cat([thin, self._inverse[gone]])))


def without(given: Apart, polar: Polar, choose: Choose) -> LeftOut:
    """X, and of X without each model the square of its length, and its inner product with X; None where more triplets
    of the others stay without it."""
    owner = [0] * len(given.sigma)
    for index, where in given.rows.items():
        owner[where] = [index + 1] * (where.stop - where.start)
    chosen = choose(owner, given.totals.count)
    if not chosen:
        zeros = given.u.new_zeros(len(given.u), len(given.v))
        return LeftOut(zeros, [Without(0.0, 0.0)] * len(given.weights))
    sigma = given.sigma[chosen]
    left, right = _PolarSide(given.u[:, chosen], polar), _PolarSide(given.v[:, chosen], polar)
    whole = (left.factor * sigma) @ right.factor.mT
    rests = list[Without | None]()
    for number, totals in enumerate(given.rests, 1):
        others = [0 if one == number else one for one in owner]
        mine = [place for place, column in enumerate(chosen) if owner[column] == number]
        if choose(others, totals.count) != [column for column in chosen if owner[column] != number]:
            rests.append(None)
        elif not mine:
            rests.append(Without(*2 * [float(whole.square().sum())]))
        else:
            kept, gone = sigma.clone(), slice(mine[0], mine[-1] + 1)
            kept[gone] = 0.0
            rests.append(_without(left.less(gone), right.less(gone), sigma, kept))
    return LeftOut(whole, rests)


def _without(left: _PolarLess, right: _PolarLess, sigma: Tensor, kept: Tensor) -> Without:
    """Of X = PΣQᵀ and X₋ = P₋Σ₋Q₋ᵀ."""
    if left.thin is not None and right.thin is not None:
        (one, two), (three, four) = left.thin, right.thin
        both = sigma * kept
        straight = both.sum() - ((one * two).sum(0) + (three * four).sum(0)) @ both
        inner = straight + (((one * sigma) @ three.mT) * ((two * kept) @ four.mT)).sum()
        return Without(float(kept.square().sum()), float(inner))
    own = [one for one in (left.own, right.own) if one is not None]
    square = kept.square() * own[0].diagonal() if len(own) == 1 else kept @ (own[0] * own[1]) * kept
    return Without(float(square.sum()), float(sigma @ (left.inner * right.inner) @ kept))
