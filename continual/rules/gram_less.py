"""Gram, or flow, without one of its models, from the decompositions of the Grams with all: what explaining a merge asks
for each model and layer.

Without τ_i = UΣVᵀ the right Gram A loses VGVᵀ with G = wΣ²/‖τ_i‖², and its ε changes. By Woodbury's identity
(A − VGVᵀ + ε)⁻¹ = D + DV(G⁻¹ − VᵀDV)⁻¹VᵀD with D = (A + ε)⁻¹, which is diagonal in the eigenvectors of A, whatever ε
is; the left Gram alike. In the eigenvectors of both, what is read is a matrix times quotients, and a thin product. So
it is with every function of A that is a sum of resolvents: `gram` is one of them, and the flow is four, nearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from continual.lazily import Tensor, torch
from continual.rules.apart import Apart, LeftOut, Without

Poles = Sequence[tuple[complex, complex]]
"""Pairs p and w of a function Σ Re(w/(λ + p·λ̄)) of an eigenvalue, λ̄ being the mean of all."""
_FLOW: Poles = (
    (3.2209452450543408 + 1.1936196054193322j, 1.4635680382785157 + 2.415188439505102j),
    (2.2922491478210563 + 3.6007714960771353j, -1.0409130794602688 + 0.013827504701752561j),
    (0.2694909873674965 + 6.082032592700096j, 0.07740953907258645 - 0.1006031864418418j),
    (-3.4085395014618016 + 8.773034564408094j, -6.450467763627884e-05 + 0.003237994502655241j),
)
"""(1 − e^{−x})/x = 2·Σ Re(w/(x + p)) to 4e-7, relative, for x ≥ 0. The poles are those of the best approximation of
e^{−x} of this degree (Trefethen, Weideman and Schmelzer 2006, "Talbot Quadratures and Rational Approximations", section
4); each w was fitted."""


def ridge(ratio: float) -> Poles:
    """1/(λ + ratio·λ̄)."""
    return ((ratio, 1.0),)


def flow(time: float) -> Poles:
    """(1 − e^{−sλ})/λ with s = time/λ̄."""
    return tuple((pole / time, 2 * weight) for pole, weight in _FLOW)


class _GramSide(NamedTuple):
    """The Gram of one side by its eigenvalues and eigenvectors; of all triplets the vectors V there, in these
    eigenvectors (`columns`), and V·√G (`heavy`). `length`: how many rows or columns the tensor has on this side."""

    values: Tensor
    vectors: Tensor
    columns: Tensor
    heavy: Tensor
    length: int


def without(given: Apart, poles: Poles, *, left: bool, right: bool) -> LeftOut:
    """X, and of X without each model the square of its length, and its inner product with X, where X is B·f(A) and f
    the sum of `poles`. `left`, `right`: which sides there are."""
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
            rows, near, solved = _solved(one, where, weight / one.length, poles)
            thin.append((solved.mT, near.mT @ target))
        if right:
            columns, near, solved = _solved(other, where, weight / other.length, poles)
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


def _solved(side: _GramSide, where: slice, mean: float, poles: Poles) -> tuple[Tensor, Tensor, Tensor]:
    """f(Λ), when the eigenvalues that are left have this `mean`; and two thin factors of what f of the Gram without
    these triplets has besides."""
    heavy = side.heavy[:, where]
    unit = torch.eye(heavy.shape[1], dtype=heavy.dtype, device=heavy.device)
    quotients, ahead, behind = torch.zeros_like(side.values), list[Tensor](), list[Tensor]()
    for pole, weight in poles:
        shift = pole * mean
        resolved = 1.0 / (side.values + (shift if isinstance(shift, complex) else float(shift)))
        near = resolved[:, None] * heavy
        solved = weight * torch.linalg.solve(unit - heavy.to(near.dtype).mT @ near, near.mT)
        resolved = weight * resolved
        if near.is_complex():
            ahead += [near.real, near.imag]
            behind += [solved.real, -solved.imag]
            quotients += resolved.real
        else:
            ahead.append(near)
            behind.append(solved)
            quotients += resolved
    return quotients, torch.cat(ahead, 1), torch.cat(behind)
