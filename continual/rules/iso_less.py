"""Iso-C without one of its models, from the decomposition with all: what explaining a merge asks for each model and
layer. Lengths and inner products alone; the merged task vector without the model is not made.

With S = Στ, H = SᵀS = ZΛZᵀ and P = S·H^{-1/2} its polar factor, taking out a thin τ = ABᵀ changes H by C·J·Cᵀ of twice
its rank, C = [SᵀA, B]. The inverse root is an integral of resolvents, H^{-1/2} = 2/π ∫ (t² + H)^{-1} dt, by the
quadrature of Hale, Higham and Trefethen 2008, "Computing A^α, log(A), and Related Matrix Functions by Contour
Integrals", section 4, and each resolvent follows by Woodbury's identity from that of Λ. So a model costs products with
its few columns at some twenty points, where another decomposition would cost ten times that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from continual import linalg

ERROR = 2.5e-6
"""Of the quadrature, about: the number of its points follows from that and from the range of the singular values."""
LEAST = 48
"""Columns below which a decomposition is as quick."""


class Without(NamedTuple):
    """X₋, the reading without a model: ‖X₋‖² and ⟨X, X₋⟩."""

    square: float
    inner: float


class Less(NamedTuple):
    """X, the reading with all models, and what is known without each; None where it has to be read."""

    whole: Tensor | None
    rests: Sequence[Without | None]


def without(total: Tensor, terms: Sequence[tuple[Tensor, Tensor]]) -> Less:
    """X, and X₋ for each thin term A·Bᵀ of the sum `total`, by itself; None where that is better decomposed: for small
    matrices, terms with many columns, and where a singular value is about to count as null. `terms` are all there
    are."""
    same = total.shape[0] >= total.shape[1]
    if not same:
        total, terms = total.mT, [(b, a) for a, b in terms]
    n = total.shape[1]
    if n < LEAST or not bool(total.any()):
        return Less(None, [None] * len(terms))
    values, z = torch.linalg.eigh(total.mT @ total)
    values = values.clamp(min=0)
    top = max([float(values[-1]), *(float((a.norm() * b.norm()).square()) for a, b in terms)])
    least = max(linalg.NULL**2 * top, _least(terms) ** 2)
    whole = _Resolved(values, total @ z, z, *quadrature(least, 4 * top))
    unit = (whole.turned * (whole.inverse * whole.mean)) @ z.mT
    return Less(unit if same else unit.mT, [whole.less(a, b) if 4 * a.shape[1] < n else None for a, b in terms])


def _least(terms: Sequence[tuple[Tensor, Tensor]]) -> float:
    """A bound from below on the singular values that are not null, of S and of S without any of the terms; 0 where none
    is known. It is the product of those of all A and of all B side by side, where these are square and not singular:
    fewer columns have no smaller ones."""
    found = 1.0
    for side in zip(*terms, strict=True):
        columns = torch.cat(side, 1)
        if columns.shape[0] != columns.shape[1]:
            return 0.0
        inverse, failed = torch.linalg.inv_ex(columns)
        length = math.inf if int(failed) else float(inverse.norm())
        found *= 1.0 / length if math.isfinite(length) else 0.0
    return found


def quadrature(least: float, most: float) -> tuple[Tensor, Tensor]:
    """The squares t² of the points and the weights w with x^{-1/2} = Σ w/(t² + x) for x in [least, most]."""
    modulus = math.sqrt(least / most)  # the complementary one
    a, b, steps = [1.0], modulus, [math.sqrt(1.0 - modulus**2)]
    while steps[-1] > 1e-16 * a[-1] and len(a) < 12:
        steps.append((a[-1] - b) / 2)
        a.append((a[-1] + b) / 2)
        b = math.sqrt(b * (2 * a[-1] - b))
    quarter = math.pi / (2 * a[-1])
    count = math.ceil((math.log(most / least) + 3.0) * math.log(1.0 / ERROR) / (2 * math.pi**2))
    places = (torch.arange(count, dtype=torch.float64) + 0.5) * (quarter / count)
    # Jacobi's functions by descending Landen transformations
    angle = before = places * (a[-1] * 2 ** (len(a) - 1))
    for step, mean in zip(steps[:0:-1], a[:0:-1], strict=True):
        before, angle = angle, (angle + torch.asin(step * torch.sin(angle) / mean)) / 2
    cosine = torch.cos(angle)
    slope = 1.0 / torch.cos(before - angle)  # dn / cn
    points = least * torch.tan(angle).square()
    return points, (2 * quarter * math.sqrt(least) / (math.pi * count)) * slope / cosine


class _Resolved:
    """S by its decomposition, and the points with the resolvents of Λ there."""

    def __init__(self, values: Tensor, turned: Tensor, z: Tensor, points: Tensor, weights: Tensor) -> None:
        held = values > linalg.NULL**2 * values[-1]
        self.sigma = torch.where(held, values.sqrt(), 0.0)
        self.inverse = torch.where(held, 1.0 / self.sigma, 0.0)
        self.mean = float(self.sigma.sum()) / int(held.sum())
        self.turned, self.z = turned, z  # S·Z
        # one point more, of no weight: what is left there tells null directions from others
        self.points = torch.cat([points, linalg.NULL**2 * values[-1:].cpu()]).to(values.device)
        self.weights = torch.cat([weights, torch.zeros(1, dtype=torch.float64)]).to(values.device)
        self.at = 1.0 / (self.points[:, None] + values)
        square = self.at.square()
        self.kinds = torch.cat([self.at, square * self.sigma, self.at * self.inverse, square])

    def less(self, a: Tensor, b: Tensor) -> Without | None:
        """Without A·Bᵀ."""
        k, n, count = a.shape[1], len(self.sigma), len(self.points)
        first, second = self.turned.mT @ a, self.z.mT @ b
        c = torch.cat([first, second], 1)
        grams = (self.kinds @ (c[:, :, None] * c[:, None, :]).view(n, -1)).view(4, count, 2 * k, 2 * k)
        plain, rooted, divided, squared = grams
        inverse = torch.zeros(2 * k, 2 * k, dtype=torch.float64, device=a.device)  # of J = [[0, −I], [−I, AᵀA]]
        unit = torch.eye(k, dtype=torch.float64, device=a.device)
        inverse[:k, :k], inverse[:k, k:], inverse[k:, :k] = -(a.mT @ a), -unit, -unit
        # F = PᵀS₋ = Σ − D·(ZᵀB)ᵀ with D = Σ⁻¹·ZᵀSᵀA
        inside = rooted - divided[:, :, :k] @ plain[:, k:, :]
        solved = torch.linalg.solve(inverse + plain, torch.cat([inside, squared], 2))
        traces = solved.view(count, 2 * k, 2, 2 * k).diagonal(dim1=1, dim2=3).sum(2)
        diagonal = self.sigma - (self.inverse[:, None] * first * second).sum(1)
        along = (self.at * diagonal).sum(1) - traces[:, 0]  # tr F(t² + H₋)⁻¹
        share = n - self.points * (self.at.sum(1) - traces[:, 1])  # tr H₋(t² + H₋)⁻¹
        rank = float(share[-1])
        if not (math.isfinite(rank) and abs(rank - round(rank)) < 0.05 and round(rank) > 0):
            return None
        mean = float(self.weights @ share) / round(rank)
        return Without(mean * mean * round(rank), self.mean * mean * float(self.weights @ along))
