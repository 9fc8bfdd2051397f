"""Gram without one of its models, from the decompositions of the Grams with all: what explaining a merge asks for each
model and layer.

Without τ_i = UΣVᵀ the right Gram A loses VGVᵀ with G = wΣ²/‖τ_i‖², and its ε changes. By Woodbury's identity
(A − VGVᵀ + ε)⁻¹ = D + DV(G⁻¹ − VᵀDV)⁻¹VᵀD with D = (A + ε)⁻¹, which is diagonal in the eigenvectors of A, whatever ε
is; the left Gram alike. In the eigenvectors of both, what is read is a matrix times quotients, and a thin product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from continual.rules.contract import Apart, LeftOut, Without


class _GramSide(NamedTuple):
    """The Gram of one side by its eigenvalues and eigenvectors; of all triplets the vectors V there, in these
    eigenvectors (`columns`), and V·√G (`heavy`). `length`: how many rows or columns the tensor has on this side."""

    values: Tensor
    vectors: Tensor
    columns: Tensor
    heavy: Tensor
    length: int


def without(given: Apart, ridge: float, *, left: bool, right: bool) -> LeftOut:
    """X, and of X without each model the square of its length, and its inner product with X. `left`, `right`: which
    sides there are."""
    share, weights = torch.zeros_like(given.sigma), [0.0] * len(given.weights)
    for index, where in given.rows.items():
        length = float(given.sigma[where].square().sum())
        if length > 0.0:
            weights[index] = given.weights[index]
            share[where] = weights[index] / length
    root = share.sqrt() * given.sigma
    one, other = _side(given.u, root, given.sides[0]), _side(given.v, root, given.sides[1])
    cubes = one.columns * (share * given.sigma**3)
    cross = cubes @ other.columns.mT

    def read(where: slice, weight: float) -> Tensor:
        """X in the eigenvectors, without the triplets `where`, when models of this `weight` in sum are left."""
        target = cross if where == NOBODY else cross.addmm(cubes[:, where], other.columns[:, where].mT, alpha=-1.0)
        if not weight > 1e-12 * sum(weights):
            return torch.zeros_like(cross)
        factor = 1.0 / (left + right)
        rows, columns, thin = cross.new_zeros(1), cross.new_zeros(1), []
        if left:
            rows, near, solved = _solved(one, where, ridge * weight / one.length)
            thin.append((solved.mT, near.mT @ target))
        if right:
            columns, near, solved = _solved(other, where, ridge * weight / other.length)
            thin.append((target @ near, solved))
        sides = [torch.cat(side, dim) for side, dim in zip(zip(*thin, strict=True), (1, 0), strict=True)]
        return (target * (rows[:, None] + columns)).addmm_(*sides).mul_(factor)

    whole = read(NOBODY, sum(weights))
    rests = []
    for index, weight in enumerate(weights):
        rest = read(given.rows.get(index, NOBODY), sum(weights) - weight) if weight else whole
        rests.append(Without(float(rest.square().sum()), float((rest * whole).sum())))
    return LeftOut(one.vectors @ whole @ other.vectors.mT, rests)


NOBODY = slice(0, 0)


def _side(columns: Tensor, root: Tensor, length: int) -> _GramSide:
    heavy = columns * root
    values, vectors = torch.linalg.eigh(heavy @ heavy.mT)
    turned = vectors.mT @ columns
    return _GramSide(values.clamp(min=0), vectors, turned, turned * root, length)


def _solved(side: _GramSide, where: slice, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """1/(Λ + ε); DV√G; and what the inverse without these triplets has besides D is that times the third."""
    quotients = 1.0 / (side.values + epsilon)
    heavy = side.heavy[:, where]
    near = quotients[:, None] * heavy
    middle = torch.eye(near.shape[1], dtype=near.dtype, device=near.device) - heavy.mT @ near
    return quotients, near, torch.linalg.solve(middle, near.mT)
