"""Iso-C without one of its models, from the decomposition with all: what explaining a merge asks for each model and
layer. Lengths and inner products alone; the merged task vector without the model is not made.

With S = Στ = ÛΣZᵀ and P = ÛZᵀ its polar factor, taking out a thin τ = ABᵀ changes H = SᵀS by C·J·Cᵀ of twice its rank,
C = Z[Σ·ÛᵀA, ZᵀB]. The inverse root is an integral of resolvents, H^{-1/2} = 2/π ∫ (t² + H)^{-1} dt, by the quadrature
of Hale, Higham and Trefethen 2008, "Computing A^α, log(A), and Related Matrix Functions by Contour Integrals", section
4, and each resolvent follows by Woodbury's identity from that of Λ = Σ². So a model costs products with its few columns
at some twenty points, where another decomposition would cost ten times that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from continual import linalg
from continual.lazily import Tensor, torch
from continual.rules.apart import LeftOut, Without
from continual.rules.quadrature import quadrature

LEAST = 48
"""Columns below which a decomposition is as quick."""


def without(total: Tensor, terms: Sequence[tuple[Tensor, Tensor]]) -> LeftOut:
    """X, and X₋ for each thin term A·Bᵀ of the sum `total`, by itself; None where that is better decomposed: for small
    matrices, terms with many columns, and where a singular value is about to count as null. `terms` are all there
    are."""
    same = total.shape[0] >= total.shape[1]
    if not same:
        total, terms = total.mT, [(b, a) for a, b in terms]
    n = total.shape[1]
    if n < LEAST or not bool(total.any()):
        return LeftOut(None, [None] * len(terms))
    values, z = torch.linalg.eigh(total.mT @ total)
    values = values.clamp(min=0)
    length = float(values[-1]) ** 0.5
    ranks: dict[int, list[int]] = {}
    for index, (a, _) in enumerate(terms):
        ranks.setdefault(a.shape[1], []).append(index)
    most = length + max((_longest([terms[index] for index in alike]) for alike in ranks.values()), default=0.0)
    least = max(linalg.NULL * length, _least(terms))
    whole = _Resolved(values, total @ z, z, *quadrature(least**2, most**2))
    unit = (whole.left * whole.mean) @ z.mT
    rests: list[Without | None] = [None] * len(terms)
    for rank, alike in ranks.items():
        if rank == 0:
            found: list[Without | None] = [Without(*2 * [whole.mean**2 * whole.rank])] * len(alike)
        elif 4 * rank < n:
            found = whole.less([terms[index] for index in alike])
        else:
            continue
        for index, one in zip(alike, found, strict=True):
            rests[index] = one
    return LeftOut(unit if same else unit.mT, rests)


def _longest(terms: Sequence[tuple[Tensor, Tensor]]) -> float:
    """A bound from above on the singular values of some terms of one rank."""
    one, other = (linalg.longest(torch.stack(side)) for side in zip(*terms, strict=True))
    return float((one * other).max())


def _least(terms: Sequence[tuple[Tensor, Tensor]]) -> float:
    """A bound from below on the singular values that are not null, of S and of S without any of the terms; 0 where none
    is known. It is the product of those of all A and of all B side by side, where these are square and not singular:
    fewer columns have no smaller ones."""
    found = 1.0
    for side in zip(*terms, strict=True):
        columns = torch.cat(side, 1)
        if columns.shape[0] != columns.shape[1]:
            return 0.0
        length = linalg.longest_inverse(columns)
        found *= 1.0 / length if math.isfinite(length) else 0.0
    return found


class _Resolved:
    """S by its decomposition, and the points with the resolvents R = (t² + Λ)⁻¹ there."""

    def __init__(self, values: Tensor, turned: Tensor, z: Tensor, points: Tensor, weights: Tensor) -> None:
        held = values > linalg.NULL**2 * values[-1]
        self.sigma = torch.where(held, values.sqrt(), 0.0)
        self.rank = int(held.sum())
        self.mean = float(self.sigma.sum()) / self.rank
        self.left, self.z = turned * torch.where(held, 1.0 / self.sigma, 0.0), z  # Û and Z
        self.all_held = self.rank == len(turned)
        # one point more, of no weight: what is left there tells null directions from others
        self.points = torch.cat([points, linalg.NULL**2 * values[-1:].cpu()]).to(values.device)
        self.weights = torch.cat([weights, torch.zeros(1, dtype=torch.float64)]).to(values.device)
        self.at = 1.0 / (self.points[:, None] + values)
        square = self.at.square()
        self.kinds = torch.cat([self.at, square, self.at * self.sigma, square * self.sigma])

    def less(self, terms: Sequence[tuple[Tensor, Tensor]]) -> list[Without | None]:
        """Without each of some terms A·Bᵀ of one rank k. A and B in the singular vectors of S are written a and b.

        Woodbury's matrix J⁻¹ + CᵀRC is [[−α, −E], [−Eᵀ, γ]] with α = Aᵀ(I − ÛÛᵀ)A + t²·aᵀRa, γ = bᵀRb and
        E = I − aᵀΣRb: two positive definite corners, so its inverse is had by two factors of Cholesky.
        """
        k = terms[0][0].shape[1]
        outer = torch.cat([a for a, _ in terms], 1)
        first = self.left.mT @ outer  # n × all columns
        missed = torch.zeros(0) if self.all_held else outer - self.left @ first
        second = self.z.mT @ torch.cat([b for _, b in terms], 1)
        aa, bb, ab = self._products(first, second, k)
        t = self.points[:, None, None]
        alpha, gamma = t * aa[:, 0], bb[:, 0]
        if not self.all_held:
            columns = missed.mT.reshape(len(terms), k, -1)
            alpha = alpha + (columns @ columns.mT)[:, None]
        unit = torch.eye(k, dtype=torch.float64, device=outer.device)
        e = unit - ab[:, 2]
        lower, failed = torch.linalg.cholesky_ex(alpha)
        q = torch.cholesky_solve(e, lower)
        corner, failed_too = torch.linalg.cholesky_ex(gamma + e.mT @ q)
        low = torch.cholesky_inverse(corner)
        across = -q @ low
        high = -torch.cholesky_inverse(lower) - across @ q.mT

        def trace(one: Tensor, two: Tensor, three: Tensor, four: Tensor) -> Tensor:
            """Of the inverse times [[one, two], [three, four]]; `one` and `four` transposed."""
            return (high * one + across * (two + three.mT) + low * four).sum((2, 3))

        resolved = self.at.sum(1) - trace(aa[:, 0] - t * aa[:, 1], ab[:, 3], ab[:, 3].mT, bb[:, 1])
        share = len(self.sigma) - self.points * resolved  # tr H₋(t² + H₋)⁻¹
        # F = PᵀS₋ = Σ − a·bᵀ
        inside = trace(
            (aa[:, 2] - t * aa[:, 3] - aa[:, 2] @ ab[:, 2].mT).mT,
            ab[:, 0] - t * ab[:, 1] - aa[:, 2] @ bb[:, 0],
            (ab[:, 0] - t * ab[:, 1]).mT - ab[:, 0].mT @ ab[:, 2].mT,
            (bb[:, 3] - ab[:, 0].mT @ bb[:, 0]).mT,
        )
        diagonal = self.sigma[:, None] - (first * second).view(len(first), -1, k).sum(2)
        along = (self.at @ diagonal).mT - inside  # tr F(t² + H₋)⁻¹
        broken = (failed + failed_too).sum(1) > 0
        return [
            None if lost else self._found(*found)
            for lost, *found in zip(
                broken.tolist(),
                share[:, -1].tolist(),
                (share @ self.weights).tolist(),
                (along @ self.weights).tolist(),
                strict=True,
            )
        ]

    def _found(self, rank: float, length: float, along: float) -> Without | None:
        if not (math.isfinite(rank) and abs(rank - round(rank)) < 0.05 and round(rank) > 0):
            return None
        mean = length / round(rank)
        return Without(mean * mean * round(rank), self.mean * mean * along)

    def _products(self, first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """aᵀDa, bᵀDb and aᵀDb for each of the terms, each of the four kinds of D (R, R², ΣR, ΣR²) and each point:
        terms × 4 × points × k × k."""
        n, many = first.shape[0], first.shape[1] // k
        found = torch.empty(many, len(self.kinds), 3 * k * k, dtype=torch.float64, device=first.device)
        pairs = torch.empty(3, k, k, n, dtype=torch.float64, device=first.device)
        for index in range(many):
            a, b = (side[:, index * k : (index + 1) * k].mT.contiguous() for side in (first, second))
            for place, (one, other) in enumerate(((a, a), (b, b), (a, b))):
                torch.mul(one[:, None], other[None], out=pairs[place])
            torch.mm(self.kinds, pairs.view(-1, n).mT, out=found[index])
        aa, bb, ab = found.view(many, 4, -1, 3, k, k).unbind(3)
        return aa, bb, ab
