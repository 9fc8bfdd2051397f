"""Gram: least squares between the merged task vector and each fine-tune's own, in closed form from sums of constant
size.

The objective is that of WUDI-Merging (Cheng et al. 2025, "Whoever Started the Interference Should End It", equation 6),
solved as RegMean (Jin et al. 2023, "Dataless Knowledge Fusion", equation 2) solves its own, with the task vector in
place of the data. Right: minimise Σ ‖(τ − τ_i)τ_iᵀ‖²/‖τ_i‖² + ε‖τ − cS‖², τ_R = (B + εcS)(A + εI)⁻¹ with A = Σ
τ_iᵀτ_i/‖τ_i‖², B = Σ τ_iτ_iᵀτ_i/‖τ_i‖², S = Στ_i. Left: the same on transposes, with A′ = Σ τ_iτ_iᵀ/‖τ_i‖² and the same
B. Two-sided, ours: the mean of both. ε is relative to the mean of A's diagonal. Statistics in float64. Everything that
is no matrix reads as the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from continual import linalg
from continual.records import SlotSpec, Totals
from continual.rules import gram_less, matrices, sums
from continual.rules.contract import (
    Accumulators,
    Apart,
    CoreFunctions,
    Factored,
    Folded,
    Inputs,
    Laws,
    LeftOut,
    Rule,
    RuleRow,
    Sums,
)
from continual.rules.matrices import Include, OnMatrices
from continual.rules.options import Choice, Number
from continual.rules.scale import ReadOptions

Side = Literal["both", "right", "left"]
SIDES: tuple[Side, ...] = ("both", "right", "left")
CROSS, RIGHT, LEFT, SUM = "cross", "right", "left", "sum"


@dataclass(frozen=True)
class GramOptions:
    """The options of `gram`."""

    side: Annotated[Side, Choice(SIDES), "which side the task vectors act on"] = "both"
    ridge: Annotated[float, Number(least=1e-3), "ε relative to the mean diagonal of the Gram"] = 0.1
    pull: Annotated[float, Number(least=0.0), "c, what the ridge pulls to: c times the sum of the task vectors"] = 0.0
    include: Include = ()


def fold_matrix(accumulators: Accumulators, tau: Tensor, weight: float) -> Folded:
    """Adds weight·τᵀτ/‖τ‖², weight·ττᵀ/‖τ‖², weight·ττᵀτ/‖τ‖² and weight·τ to what is kept of an m×n matrix."""
    cross, exact = accumulators[CROSS], tau.double()
    tau_sq, dot = linalg.dot(tau, tau), float((exact * cross).sum())
    if tau_sq > 0.0:
        scale = weight / tau_sq
        wide = tau.shape[0] <= tau.shape[1]
        inner = exact @ exact.mT if wide else exact.mT @ exact
        cross.add_(inner @ exact if wide else exact @ inner, alpha=scale)
        for side in {RIGHT, LEFT} & accumulators.keys():
            mine = (side == LEFT) == wide
            accumulators[side].add_(inner if mine else (exact.mT @ exact if wide else exact @ exact.mT), alpha=scale)
        if SUM in accumulators:
            accumulators[SUM].add_(tau, alpha=weight)
        # Each Gram's trace is Σ weight of the models that changed this tensor: none left is exact zeros, not what
        # rounding left.
        gram = accumulators[RIGHT if RIGHT in accumulators else LEFT]
        if weight < 0 and float(gram.trace()) < -1e-6 * weight:
            for value in accumulators.values():
                value.zero_()
    return Folded(accumulators, Sums(tau_sq, dot, float(cross.square().sum())))


def combine(accumulators: Accumulators, others: Accumulators, totals: Totals) -> float:
    """Adds every statistic; ‖B‖² after, or ‖Στ‖² of what is no matrix."""
    for slot, value in accumulators.items():
        value.add_(others[slot])
    found = accumulators[CROSS if CROSS in accumulators else SUM]
    return linalg.inner(found, found) if found.dtype == torch.float32 else float(found.square().sum())


def solve(accumulators: Accumulators, ridge: float, pull: float, sides: tuple[int, int] | None = None) -> Tensor:
    """The merged m×n task vector, float64: of the right side, the left side, or the mean of both, as there are
    accumulators for. Where these are the accumulators of a core, `sides` are m and n: the mean of a Gram's diagonal is
    that of the whole."""
    cross, found = accumulators[CROSS], []
    for side in (RIGHT, LEFT):
        if side not in accumulators:
            continue
        gram = accumulators[side]
        epsilon = ridge * float(gram.diagonal().mean())
        if sides is not None:
            epsilon *= len(gram) / sides[side == RIGHT]
        if epsilon == 0.0:
            return torch.zeros_like(cross)
        target = cross + (epsilon * pull) * accumulators[SUM] if SUM in accumulators else cross
        factor = torch.linalg.cholesky(gram + epsilon * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        found.append(
            torch.cholesky_solve(target.mT, factor).mT if side == RIGHT else torch.cholesky_solve(target, factor)
        )
    return found[0] if len(found) == 1 else (found[0] + found[1]) / 2


def workspace(m: int, n: int) -> int:
    """The task vector and a product of it in float64, and two Grams."""
    return 8 * (2 * m * n + 2 * max(m, n) ** 2)


def _make(options: GramOptions) -> Rule:
    def slots(m: int, n: int) -> dict[str, SlotSpec]:
        kept = {CROSS: SlotSpec((m, n), "float64")}
        if options.side != "left":
            kept[RIGHT] = SlotSpec((n, n), "float64")
        if options.side != "right":
            kept[LEFT] = SlotSpec((m, m), "float64")
        return kept | ({SUM: SlotSpec((m, n))} if options.pull else {})

    def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
        folded = fold_matrix(accumulators, tau.flatten(1), inputs.weight)
        if not sums.last_out(totals, inputs.weight):
            return folded
        for value in accumulators.values():
            value.zero_()
        return folded._replace(sums=folded.sums._replace(merged_sq=0.0))

    def read(accumulators: Accumulators, totals: Totals) -> Tensor:
        return solve(accumulators, options.ridge, options.pull)

    def read_core(accumulators: Accumulators, totals: Totals, sides: tuple[int, int]) -> Tensor:
        return solve(accumulators, options.ridge, options.pull, sides)

    def without(given: Apart) -> LeftOut:
        left, right = options.side != "right", options.side != "left"
        return gram_less.without(given, options.ridge, left=left, right=right)

    laws = Laws(weighted=True, combine=combine)
    # the ridge pulls either side to a multiple of the sum of its own
    quick = None if options.pull else without
    on = OnMatrices(fold, read, workspace, slots, Factored(cores=CoreFunctions(slots, fold, read_core), without=quick))
    return matrices.rule("gram", options.include, on, laws)


GRAM = RuleRow(
    name="gram",
    summary="least squares between the merged task vector and each fine-tune's own",
    paper="Cheng et al. 2025, WUDI-Merging, in closed form; two-sided is ours",
    bytes_per_parameter="24 of a square matrix, up to 8·(m+n)²/mn + 8",
    read=ReadOptions("spread", 0.85),
    published=ReadOptions("number", 1.0),
    options=GramOptions,
    make=_make,
)
