"""OPCM: each new task vector is freed of what lies in the leading singular subspaces of the merged one, then added.

Tang et al. 2025, "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model
Merging"; released code in fusion_bench. The paper keeps merged = θ₀ + (λ_{t−1}D + C)/λ_t. Singular subspaces do not
change with scale, so we keep R_t = R_{t−1} + C_t, never rescaled, and λ_t = ‖R_t‖/n̄ enters when the result is read:
one pass a fold. How R's subspaces are computed is `continual.linalg`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from continual import linalg
from continual.lazily import Tensor, torch
from continual.records import Totals
from continual.rules import matrices, opcm_less, sums
from continual.rules.apart import Apart, LeftOut
from continual.rules.contract import Accumulators, Folded, Inputs, Laws, Needs, ReadFunctions, Rule, RuleRow, Sums
from continual.rules.matrices import Include, OnMatrices
from continual.rules.options import Choice, Number
from continual.rules.scale import ReadOptions

Variant = Literal["block", "block+radial", "block+diagonal", "rows+columns", "rows", "columns"]
VARIANTS: tuple[Variant, ...] = ("block", "block+radial", "block+diagonal", "rows+columns", "rows", "columns")


@dataclass(frozen=True)
class OpcmOptions:
    """The options of `opcm`."""

    alpha: Annotated[float, Number(least=0.0, below=1.0), "share of Σσ whose directions are protected"] = 0.5
    variant: Annotated[Variant, Choice(VARIANTS), "what is projected out"] = "block"
    include: Include = ()


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
    # Y = R V is kept for the second pass where it fits into what the eigenproblem has just freed, else computed again.
    kept: list[Tensor] | None = [] if m * k <= 2 * n * n else None
    cross = torch.zeros(k, n if wide else k, dtype=torch.float64, device=tau.device)
    for (rows, before), (_, t) in zip(linalg.in_float64(total), linalg.in_float64(tau), strict=True):
        if variant == "columns":
            tau[rows].copy_(t.addmm_(t @ v, v.mT, alpha=-1.0))
            continue
        y = before @ v
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
    for index, (rows, t) in enumerate(linalg.in_float64(tau)):
        if radial:
            t.sub_(total[rows].double(), alpha=radial)
        t.addmm_(kept[index] if kept is not None else total[rows].double() @ v, back, alpha=-1.0)
        if variant == "rows+columns":
            t.addmm_(t @ v, v.mT, alpha=-1.0)
        tau[rows].copy_(t)
    return r, rank


def project_thin(total: Tensor, tau: Tensor, alpha: float, rank: int) -> tuple[int, int] | None:
    """`project` with the variant `block` where R has few directions: `rank` says how many at most. None where it has
    more, and τ is as it was.

    R = L·C with thin L; of C's singular vectors U_r = L·U_C and V_r are R's, and no Gram of R is needed.
    """
    found = linalg.span(total, rank)
    if found is None:
        return None
    left, core = found
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    sigma = torch.where(sigma > linalg.NULL * sigma[0], sigma, 0.0)
    r = cut(sigma, alpha)
    u, v = left @ u[:, :r], vh[:r].mT.contiguous()
    z = torch.zeros(r, r, dtype=torch.float64, device=tau.device)
    for rows, t in linalg.in_float64(tau):
        z.addmm_(u[rows].mT, t @ v)
    back = z @ v.mT
    for rows, t in linalg.in_float64(tau):
        tau[rows].copy_(t.addmm_(u[rows], back, alpha=-1.0))
    return r, int((sigma > 0).sum())


def fold_matrix(total: Tensor, tau: Tensor, alpha: float, variant: Variant, known: int | None = None) -> Folded:
    """One matrix: τ is projected in place and added to R in place; both contiguous float32 of one shape, at least 2-D,
    not empty. `known`: how many directions R has at most, where that is known."""
    tau_sq, dot = linalg.inners((tau, tau), (tau, total))
    r, rank = 0, 0
    if tau_sq > 0.0 and bool(total.any()):
        flat, found = total.flatten(1), None
        across: Mapping[Variant, Variant] = (
            {"rows": "columns", "columns": "rows"} if flat.shape[0] < flat.shape[1] else {}
        )
        rows, columns = linalg.tall(flat), linalg.tall(tau.flatten(1))
        m, n = rows.shape
        if variant == "block" and known is not None and linalg.spans_cheaply(m, n, known):
            found = project_thin(rows, columns, alpha, known)
        r, rank = found or project(rows, columns, alpha, across.get(variant, variant))
    added = linalg.add(total, tau, 1.0)
    notes = {"r": float(r), "kept": added.term_sq / tau_sq, "rank": float(rank)} if tau_sq > 0.0 else {}
    return Folded({sums.SLOT: total}, Sums(tau_sq, dot, added.total_sq), notes)


def gauges(totals: Totals) -> dict[str, float]:
    """λ_t = ‖R_t‖/n̄, n̄ the plain mean of ‖τ_1‖ … ‖τ_t‖ over the whole model."""
    if not totals.norm_sum:
        return {}
    return {"lambda": math.sqrt(totals.merged_sq) * totals.count / totals.norm_sum}


def read(accumulators: Accumulators, totals: Totals) -> Tensor:
    """R."""
    return accumulators[sums.SLOT].clone()


FREED: Mapping[Variant, opcm_less.Freed] = {
    "block": lambda tau, led: [tau, (-led[0], led[1])],
    "rows+columns": lambda tau, led: [tau, (-led[0], tau[1]), (tau[0], -led[1]), led],
    "rows": lambda tau, led: [tau, (-led[0], tau[1])],
    "columns": lambda tau, led: [tau, (tau[0], -led[1])],
}
"""C of a thin τ = UVᵀ by `project`, as products that are added up, from PU and QV: the variants that only project."""


def _make(options: OpcmOptions) -> Rule:
    def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
        return fold_matrix(accumulators[sums.SLOT], tau.contiguous(), options.alpha, options.variant, inputs.rank)

    def step(total: Tensor, tau: Tensor) -> Tensor:
        return fold_matrix(total, tau, options.alpha, options.variant).accumulators[sums.SLOT]

    def leads(sigma: Tensor) -> int:
        return cut(sigma, options.alpha)

    def freed(given: Apart) -> opcm_less.Freed | None:
        # the same bound as in `project`: below it singular values ask for more than one Gram
        safe = (1.0 - options.alpha) / max(1, len(given.u), len(given.v)) >= linalg.STEEP
        return FREED.get(options.variant) if safe else None

    def without(given: Apart) -> LeftOut:
        found = freed(given)
        return opcm_less.without(given, step) if found is None else opcm_less.projected(given, leads, found)

    def whole(given: Apart) -> Tensor | None:
        found = freed(given)
        return None if found is None else opcm_less.whole(given, leads, found)

    factored = matrices.turned(fold, read)._replace(without=without, whole=whole)
    made = matrices.rule(
        "opcm",
        options.include,
        OnMatrices(fold, read, linalg.workspace, factored=factored),
        Laws(order_free=False),
        plain=ReadFunctions(sums.read_sum, sums.size, gauges=gauges, square=sums.square_of_sum, goes_by=sums.nothing),
    )
    by_elements = ReadFunctions(
        sums.read_sum, sums.size, made.read.matrix, gauges, square=sums.square_of_sum, goes_by=sums.nothing
    )
    return made._replace(needs=Needs(ranks=options.variant == "block"), read=by_elements)


OPCM = RuleRow(
    name="opcm",
    summary="task vectors projected away from the leading singular subspaces of the merged one, then added",
    paper="Tang et al. 2025, Merging Models on the Fly Without Retraining (OPCM)",
    bytes_per_parameter="4",
    read=ReadOptions("spread", 0.5),
    published=ReadOptions("norm", 1.0),
    options=OpcmOptions,
    make=_make,
)
