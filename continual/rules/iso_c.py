"""Iso-C: the sum of the task vectors with its singular values made equal.

Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", section
4.1. With S = Στ = U Σ Vᵀ a matrix reads c·σ̄·U_kV_kᵀ over the k singular values that are not null, σ̄ their mean: a
polar factor over all p directions would put most of a rank-deficient sum's length into arbitrary ones. One model alone
reads as it is: it has no other to make room for (ops/decisions/0050). Everything else reads as the mean. All the work
is at reading; a fold is an addition.
"""

from __future__ import annotations

from continual import linalg
from continual.lazily import Tensor, torch
from continual.records import Totals
from continual.rules import iso_less, matrices, sums
from continual.rules.apart import Apart, LeftOut
from continual.rules.contract import Accumulators, Folded, Inputs, Rule, RuleRow, Sums
from continual.rules.matrices import MatrixOptions, OnMatrices
from continual.rules.scale import ReadOptions


def flat(total: Tensor) -> Tensor:
    """σ̄·U_kV_kᵀ of an m×n float32 matrix, float32; zeros for zeros. In float64 by blocks of rows, but for a
    last product that float32 does not harm."""
    if not bool(total.any()):
        return torch.zeros_like(total)
    rows = linalg.tall(total)
    sigma, v = linalg.right_singular(rows, linalg.NULL)
    rank = int((sigma > 0).sum())
    sigma, v = sigma[:rank], v[:, :rank].contiguous()
    back, single = (v * (sigma.mean() / sigma)).mT, linalg.mild(sigma)
    turned = linalg.together(rows.shape, *((v.float(), back.float()) if single else (v, back)))  # S·V·diag(σ̄/σ)·Vᵀ
    result = torch.empty_like(total)
    linalg.through(rows, turned, linalg.tall(result), single=single)
    return result


def read(accumulators: Accumulators, totals: Totals) -> Tensor:
    """The flat spectrum of S; S itself of one model."""
    total = accumulators[sums.SLOT].flatten(1)
    return total.clone() if totals.count == 1 else flat(total)


def add(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
    """The fold of a core, of which nobody asks for figures."""
    accumulators[sums.SLOT].add_(tau, alpha=inputs.weight)
    return Folded(accumulators, Sums())


def without(given: Apart) -> LeftOut:
    """X, and of X without each of the terms of S: the square of its length, and its inner product with X. Of two models
    nothing, since what is left of them is read as it is."""
    if given.totals.count <= 2:
        return LeftOut(None, [None] * len(given.weights))
    terms = []
    for index, weight in enumerate(given.weights):
        left, right = given.term(index)
        terms.append((left * weight, right))
    total = torch.cat([left for left, _ in terms], 1) @ torch.cat([right for _, right in terms], 1).mT
    return iso_less.without(total, terms)


def workspace(m: int, n: int) -> int:
    """A few float64 chunks for the sum, and the figures of τ."""
    return 8 * 6 * min(linalg.CHUNK, m * n) + matrices.workspace(m, n)


def _make(options: MatrixOptions) -> Rule:
    factored = matrices.turned(add, read)._replace(without=without)
    on = OnMatrices(sums.fold, read, workspace, factored=factored, goes_by=lambda totals: totals.count == 1)
    return matrices.rule("iso-c", options.include, on, sums.GROUP)


ISO_C = RuleRow(
    name="iso-c",
    summary="the sum of the task vectors with equal singular values",
    paper="Marczak et al. 2025, No Task Left Behind (Iso-C)",
    bytes_per_parameter="4",
    read=ReadOptions("spread", 1.15),
    published=ReadOptions("number", 1.0),
    options=MatrixOptions,
    make=_make,
)
