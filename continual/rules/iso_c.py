"""Iso-C: the sum of the task vectors with its singular values made equal.

Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", section
4.1. With S = Στ = U Σ Vᵀ a matrix reads c·σ̄·U_kV_kᵀ over the k singular values that are not null, σ̄ their mean: a
polar factor over all p directions would put most of a rank-deficient sum's length into arbitrary ones. Everything else
reads as the mean. All the work is at reading; a fold is an addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from continual import linalg
from continual.records import TensorSpec
from continual.rules import matrices, sums
from continual.rules.contract import Accumulators, Folded, Inputs, Row, Rule, Totals
from continual.rules.scale import ReadOptions


def flat(total: torch.Tensor) -> torch.Tensor:
    """σ̄·U_kV_kᵀ of an m×n float32 matrix, float32; zeros for zeros. In float64 by blocks of rows."""
    if not bool(total.any()):
        return torch.zeros_like(total)
    rows = linalg.tall(total)
    sigma, v = linalg.right_singular(rows, linalg.NULL)
    rank = int((sigma > 0).sum())
    v = v[:, :rank].contiguous()
    back = (v * (sigma[:rank].mean() / sigma[:rank])).mT  # S·V·diag(σ̄/σ)·Vᵀ
    result = torch.empty_like(total)
    out = linalg.tall(result)
    for block in linalg.row_blocks(*rows.shape):
        out[block] = (rows[block].double() @ v @ back).float()
    return result


def _make(options: Mapping[str, Any]) -> Rule:
    row, is_matrix = ISO_C, matrices.is_matrix(options)

    def fold(accumulators: Accumulators, tau: torch.Tensor, inputs: Inputs, totals: Totals) -> Folded:
        figures = matrices.figures(tau.flatten(1)) if is_matrix(inputs.spec) else {}
        return matrices.noted(sums.fold(accumulators, tau, inputs, totals), figures)

    def read(spec: TensorSpec, accumulators: Accumulators, totals: Totals) -> torch.Tensor:
        if not is_matrix(spec):
            return sums.read_mean(spec, accumulators, totals)
        return flat(accumulators[sums.SLOT].flatten(1)).view(spec.shape)

    return Rule(
        row.name,
        row.summary,
        options,
        sums.slots,
        lambda spec: not is_matrix(spec),
        fold,
        sums.settle,
        read,
        sums.unknown,
        lambda spec: sums.workspace(spec) + (matrices.workspace(spec) if is_matrix(spec) else 0),
        sums.no_gauges,
        sums.combine,
        weighted=True,
        matrix=is_matrix,
    )


ISO_C = Row(
    name="iso-c",
    summary="the sum of the task vectors with equal singular values",
    paper="Marczak et al. 2025, No Task Left Behind (Iso-C)",
    options={"include": matrices.INCLUDE},
    read=ReadOptions("spread", 1.15),
    published=ReadOptions("number", 1.0),
    bytes_per_parameter="4",
    make=_make,
    spectral=True,
)
