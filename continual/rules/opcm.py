"""OPCM: each new task vector is freed of what lies in the leading singular subspaces of the merged one, then added.

Tang et al. 2025, "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model
Merging"; released code in fusion_bench. The paper keeps merged = θ₀ + (λ_{t−1}D + C)/λ_t. Singular subspaces do not
change with scale, so we keep R_t = R_{t−1} + C_t, never rescaled, and λ_t = ‖R_t‖/n̄ enters when the result is read:
one pass a fold. How R's subspaces are computed is `continual.linalg`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from continual import linalg
from continual.records import TensorSpec
from continual.rules import matrices, sums
from continual.rules.contract import Accumulators, Folded, Inputs, Option, Row, Rule, Totals
from continual.rules.scale import ReadOptions

Variant = Literal["block", "block+radial", "block+diagonal", "rows+columns", "rows", "columns"]
VARIANTS: tuple[Variant, ...] = ("block", "block+radial", "block+diagonal", "rows+columns", "rows", "columns")


def cut(sigma: Tensor, alpha: float) -> int:
    """r, the 0-based index of the first k with cumsum(σ)_k / Σσ > α (the crossing one stays out), at most the numerical
    rank. σ descending, null ones 0."""
    share = sigma.cumsum(0)
    first = int((share <= alpha * share[-1]).sum())
    return min(first, int((sigma > 0).sum()))


def project(total: Tensor, tau: Tensor, alpha: float, variant: Variant) -> tuple[int, int]:
    """τ becomes C in place, given R (`total`), both m×n float32 with m ≥ n, R not zero; returns r and the numerical
    rank of R.

    With U = R V/σ, Z = Uᵀ τ V and R′ = R − U_r Σ_r V_rᵀ, per variant:
    block           C = τ − U_r Z_r V_rᵀ (the released code)
    block+radial    C −= (⟨C, R′⟩/‖R′‖²)·R′, after block: C ⟂ R
    block+diagonal  C −= Σ_{i≥r} Z_ii u_i v_iᵀ over non-null i, after block (the released code since March 2025)
    rows+columns    C = (I − U_rU_rᵀ) τ (I − V_rV_rᵀ) (the paper's text)
    rows            C = (I − U_rU_rᵀ) τ: nothing more is written to what R writes to
    columns         C = τ (I − V_rV_rᵀ): the null-space projector, R's leading inputs are answered as before
    Everything in float64 by blocks of rows, rounded once into τ.
    """
    m, n = total.shape
    # As Σ_{i≥r} σ_i ≥ (1−α)Σσ, the smallest σ of the block is at least (1−α)/n of σ₁: the Gram is refined only where
    # that bound is too little.
    sigma, v = linalg.right_singular(total, linalg.NULL if variant == "block+diagonal" else (1.0 - alpha) / n)
    r, rank = cut(sigma, alpha), int((sigma > 0).sum())
    k = rank if variant == "block+diagonal" else r
    rest_sq = float(sigma[r:].square().sum())  # ‖R′‖²; the crossing σ is in it, so it is never 0
    sigma, v = sigma[:k], v[:, :k].contiguous()
    wide, radial = "rows" in variant, 0.0
    inner = linalg.dot(tau, total) if variant == "block+radial" else 0.0
    blocks = linalg.row_blocks(m, n)
    # Y = R V is kept for the second pass where it fits into what the eigenproblem has just freed, else computed again.
    kept: list[Tensor] | None = [] if m * k <= 2 * n * n else None
    cross = torch.zeros(k, n if wide else k, dtype=torch.float64, device=tau.device)
    for rows in blocks:
        y, t = total[rows].double() @ v, tau[rows].double()
        if variant == "columns":
            tau[rows].copy_(t.addmm_(t @ v, v.mT, alpha=-1.0))
            continue
        cross.addmm_(y.mT, t if wide else t @ v)
        if kept is not None:
            kept.append(y)
    if variant == "columns":
        return r, rank
    z = cross.div_(sigma[:, None])  # k×k: Z; for rows+columns k×n: Uᵀτ
    if variant == "block+radial":
        # C after block has nothing in the block, so ⟨C, R′⟩ = ⟨C, R⟩ = ⟨τ, R⟩ − tr Z_rΣ_r; and C −= ρR′ is C −= ρR, Z_r
        # −= ρΣ_r.
        radial = (inner - float((z.diagonal() * sigma).sum())) / rest_sq
        z.diagonal().sub_(radial * sigma)
    elif variant == "block+diagonal":
        diagonal = z.diagonal()[r:].clone()
        z[r:] = 0.0
        z[:, r:] = 0.0
        z.diagonal()[r:] = diagonal
    z.div_(sigma[:, None])
    back = z if wide else z @ v.mT  # k×n, and U·… = Y·back
    for index, rows in enumerate(blocks):
        t = tau[rows].double()
        if radial:
            t.sub_(total[rows].double(), alpha=radial)
        t.addmm_(kept[index] if kept is not None else total[rows].double() @ v, back, alpha=-1.0)
        if variant == "rows+columns":
            t.addmm_(t @ v, v.mT, alpha=-1.0)
        tau[rows].copy_(t)
    return r, rank


def fold_matrix(total: Tensor, tau: Tensor, alpha: float, variant: Variant) -> Folded:
    """One matrix: τ is projected in place and added to R in place; both contiguous float32 of one shape, at least 2-D,
    not empty."""
    tau_sq, dot = linalg.inners((tau, tau), (tau, total))
    r, rank = 0, 0
    if tau_sq > 0.0 and bool(total.any()):
        flat = total.flatten(1)
        across: Mapping[Variant, Variant] = (
            {"rows": "columns", "columns": "rows"} if flat.shape[0] < flat.shape[1] else {}
        )
        r, rank = project(linalg.tall(flat), linalg.tall(tau.flatten(1)), alpha, across.get(variant, variant))
    added = linalg.add(total, tau, 1.0)
    notes = {"r": float(r), "kept": added["tau_sq"] / tau_sq, "rank": float(rank)} if tau_sq > 0.0 else {}
    return Folded({sums.SLOT: total}, {"tau_sq": tau_sq, "dot": dot, "merged_sq": added["merged_sq"]}, notes)


def gauges(totals: Totals) -> dict[str, float]:
    """λ_t = ‖R_t‖/n̄, n̄ the plain mean of ‖τ_1‖ … ‖τ_t‖ over the whole model."""
    count, norm_sum = totals.get("count", 0.0), totals.get("norm_sum", 0.0)
    return {"lambda": math.sqrt(totals["merged_sq"]) * count / norm_sum} if norm_sum else {}


def _make(options: Mapping[str, Any]) -> Rule:
    alpha, variant, is_matrix = options["alpha"], options["variant"], matrices.is_matrix(options)

    def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
        matrices.whole("opcm", inputs)
        if not is_matrix(inputs.spec):
            return sums.fold(accumulators, tau, inputs, totals)
        figures = matrices.figures(tau.flatten(1))  # first: the fold overwrites τ
        return matrices.noted(fold_matrix(accumulators[sums.SLOT], tau.contiguous(), alpha, variant), figures)

    def workspace(spec: TensorSpec) -> int:
        if not is_matrix(spec):
            return sums.workspace(spec)
        return linalg.workspace(*matrices.sides(spec))

    return Rule(
        OPCM.name,
        OPCM.summary,
        options,
        sums.slots,
        lambda spec: not is_matrix(spec),
        fold,
        sums.settle,
        sums.read_sum,
        sums.size,
        workspace,
        gauges,
        matrix=is_matrix,
    )


def _alpha(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError("a number at least 0 and below 1")
    return float(value)


def _variant(value: Any) -> str:
    if value not in VARIANTS:
        raise ValueError(f"one of {', '.join(VARIANTS)}")
    return str(value)


OPCM = Row(
    name="opcm",
    summary="task vectors projected away from the leading singular subspaces of the merged one, then added",
    paper="Tang et al. 2025, Merging Models on the Fly Without Retraining (OPCM)",
    options={
        "alpha": Option(0.5, "share of Σσ whose directions are protected, in [0, 1)", _alpha),
        "variant": Option("block", f"what is projected out: {', '.join(VARIANTS)}", _variant),
        "include": matrices.INCLUDE,
    },
    read=ReadOptions("spread", 0.5),
    published=ReadOptions("norm", 1.0),
    bytes_per_parameter="4",
    make=_make,
    order_free=False,
    spectral=True,
)
