"""TSV-M, on both sides or on one, without one of its models, from the Grams of all triplets that stay: what explaining
a merge asks for each model and layer. Lengths and inner products alone.

P = A·G^{-1/2} is the polar factor of columns A with the Gram G. Without some of the columns it is that of a submatrix
of G, whose inverse root is an integral of resolvents (`rules.quadrature`); where Y = (t² + G)⁻¹, the inverse of a
submatrix of t² + G is that of Y less Y_iY_ii⁻¹Y_iᵀ, of the rank of the columns that are gone. So is PᵀP₋ the unit
matrix less a thin product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from continual.lazily import Tensor, torch
from continual.rules.apart import Apart, LeftOut, SideVectors, WholeRead, Without
from continual.rules.quadrature import quadrature

SAFE = 1e-8
"""Down to this share of the largest eigenvalue of a Gram nothing counts as null, nor in a part of it."""
Polar = Callable[[Tensor], Tensor]
"""The polar factor of a matrix."""
Choose = Callable[[Sequence[int], float], list[int]]
"""Which triplets stay, by the number of each one's model (0: that is gone), and how many models there are."""


class _PolarThin(NamedTuple):
    """P₋, the polar factor without some of the c columns, several times; where no direction is null. P₋ᵀP₋ is the unit
    matrix but for what is gone, and PᵀP₋ that less leftᵀ·right, both …×p×c; its columns that are gone mean nothing."""

    left: Tensor
    right: Tensor

    def one(self, index: int) -> _PolarLess:
        """One of them as whole matrices."""
        inner = self.left[index].mT @ self.right[index].neg()
        inner.diagonal().add_(1.0)
        return _PolarLess(None, inner)


class _PolarLess(NamedTuple):
    """P₋ once: P₋ᵀP₋ (`own`; None where it is the unit matrix but for what is gone), and PᵀP₋ (`inner`), c×c."""

    own: Tensor | None
    inner: Tensor


class _PlainSide:
    """The chosen c vectors of one side as they are. `own`: their Gram; `inner`: what all K vectors are in them, K×c."""

    def __init__(self, vectors: SideVectors, chosen: Sequence[int]) -> None:
        self.inner = vectors.gram[:, chosen]
        self.own: Tensor | None = self.inner[chosen]

    def less(self, gone: Tensor) -> _PolarLess:
        """Without some of the columns; what stands there for them means nothing."""
        assert self.own is not None
        return _PolarLess(self.own, self.own)


class _PolarSide:
    """The chosen c vectors of one side, and P, their polar factor. `inner`: what all K vectors are in P, K×c; `quick`:
    no direction is about to be null, and all follows from the Gram."""

    def __init__(self, vectors: SideVectors, chosen: Sequence[int], polar: Polar) -> None:
        self._polar = polar
        self.own: Tensor | None = None
        across = gram = vectors.gram
        if len(chosen) < len(gram):
            across = gram[:, chosen]
            gram = across[chosen]
        values, z = torch.linalg.eigh(gram)
        self.quick = float(values[0]) > SAFE * float(values[-1])
        if not self.quick:
            self._columns = vectors.columns[:, chosen]
            self._factor = polar(self._columns)
            self.inner, self.own = vectors.columns.mT @ self._factor, self._factor.mT @ self._factor
            return
        points, weights = quadrature(float(values[0]), float(values[-1]))
        points, self._weights = points.to(z.device), weights.sqrt().to(z.device)
        roots = values.sqrt()
        self._root, self._inverse = (z * roots) @ z.mT, (z / roots) @ z.mT
        self._resolved = (z / (points[:, None, None] + values)) @ z.mT
        self.inner = self._root if across is gram else across @ self._inverse

    def thin(self, gone: Tensor) -> _PolarThin:
        """Without some of the columns, as many each time (M×r places): where it is `quick`."""
        rows = self._resolved[:, gone]  # of Y: points × M × r × c
        corners = rows.take_along_dim(gone[None, :, None, :], 3)
        found = torch.linalg.solve_triangular(torch.linalg.cholesky(corners), rows, upper=False)
        found = (found * self._weights[:, None, None, None]).transpose(0, 1).flatten(1, 2)
        found.scatter_(2, gone[:, None, :].expand(-1, found.shape[1], -1), 0.0)
        left = torch.cat([found @ self._root, self._root[gone]], 1)
        return _PolarThin(left, torch.cat([found, self._inverse[gone]], 1))

    def less(self, gone: Tensor) -> _PolarLess:
        """Without some of the columns, by another decomposition or, where it is `quick`, as `thin`."""
        if self.quick:
            return self.thin(gone[None]).one(0)
        kept = self._columns.clone()
        kept[:, gone] = 0.0
        rest = self._polar(kept)
        return _PolarLess(rest.mT @ rest, self._factor.mT @ rest)


def without(given: Apart, polars: tuple[Polar, Polar | None], choose: Choose) -> LeftOut:
    """X, and of X without each model the square of its length, and its inner product with X; None where more triplets
    of the others stay without it. `polars`: of the left side and the right one; None: its columns stay as they are."""
    owner = [0] * len(given.sigma)
    for index, where in given.rows.items():
        owner[where] = [index + 1] * (where.stop - where.start)
    chosen = choose(owner, given.totals.count)
    if not chosen:
        return LeftOut(WholeRead(0.0, torch.zeros_like(given.sigma)), [Without(0.0, 0.0)] * len(given.weights))
    sigma = given.sigma[chosen]
    if given.times is not None:
        each = [given.times[owner[column] - 1] for column in chosen]
        sigma = sigma * torch.tensor(each, dtype=sigma.dtype, device=sigma.device)
    left = _PolarSide(given.left, chosen, polars[0])
    right = _PolarSide(given.right, chosen, polars[1]) if polars[1] else _PlainSide(given.right, chosen)
    whole = WholeRead(_square(sigma, left, right), ((left.inner * sigma) * right.inner).sum(1))
    rests: list[Without | None] = [None] * len(given.weights)
    places: dict[int, list[int]] = {}
    for place, column in enumerate(chosen):
        places.setdefault(owner[column] - 1, []).append(place)
    alike: dict[int, list[int]] = {}
    for index, totals in enumerate(given.rests):
        others = [0 if one == index + 1 else one for one in owner]
        if choose(others, totals.count) != [column for column in chosen if others[column]]:
            continue
        if index not in places:
            rests[index] = Without(whole.square, whole.square)
        else:
            alike.setdefault(len(places[index]), []).append(index)
    for indices in alike.values():
        gone = torch.tensor([places[index] for index in indices], device=sigma.device)
        kept = sigma.repeat(len(indices), 1).scatter_(1, gone, 0.0)
        for index, found in zip(indices, _without(left, right, sigma, kept, gone), strict=True):
            rests[index] = found
    return LeftOut(whole, rests)


def _square(kept: Tensor, *sides: _PolarSide | _PlainSide | _PolarLess) -> float:
    """‖PΣQᵀ‖², of two sides; the unit matrix of one keeps the diagonal of the other alone."""
    own = [side.own for side in sides if side.own is not None]
    if len(own) == 2:
        return float(kept @ (own[0] * own[1]) @ kept)
    square = kept.square()
    return float((square * own[0].diagonal() if own else square).sum())


def _without(
    left: _PolarSide, right: _PolarSide | _PlainSide, sigma: Tensor, kept: Tensor, gone: Tensor
) -> list[Without]:
    """Of X = PΣQᵀ and each X₋ = P₋Σ₋Q₋ᵀ. `kept`: the diagonal of Σ₋, a row each time."""
    if isinstance(right, _PlainSide) or not (left.quick and right.quick):
        found = []
        for rest, where in zip(kept, gone, strict=True):
            near, far = left.less(where), right.less(where)
            found.append(Without(_square(rest, near, far), float(((near.inner * far.inner) * rest).sum(1) @ sigma)))
        return found
    (one, two), (three, four) = left.thin(gone), right.thin(gone)
    both = sigma * kept
    straight = both.sum(1) - (((one * two).sum(1) + (three * four).sum(1)) * both).sum(1)
    across = ((one * sigma) @ three.mT).mul_((two * kept[:, None]) @ four.mT)
    return [
        Without(*figures)
        for figures in zip(kept.square().sum(1).tolist(), (straight + across.sum((1, 2))).tolist(), strict=True)
    ]
