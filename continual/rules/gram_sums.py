"""The sums that `gram` and `flow` read: of every matrix A = Σ wτᵀτ/‖τ‖² (right), A′ = Σ wττᵀ/‖τ‖² (left) and B = Σ
wττᵀτ/‖τ‖² (cross), in float64, and S = Σ wτ (sum) where it is asked for. No rule lives here.

They are the terms of the objective of WUDI-Merging (Cheng et al. 2025, "Whoever Started the Interference Should End
It", equation 6), which is quadratic in the merged task vector: Σ ‖(X − τ_i)τ_iᵀ‖²/‖τ_i‖² = tr XAXᵀ − 2 tr XBᵀ + const,
and on the other side Σ ‖τ_iᵀ(X − τ_i)‖²/‖τ_i‖² = tr XᵀA′X − 2 tr XᵀB + const. Everything that is no matrix is a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from continual import linalg
from continual.records import SlotSpec, Totals
from continual.rules import sums
from continual.rules.contract import Accumulators, Apart, CoreFunctions, Factored, Folded, Inputs, Laws, LeftOut, Sums
from continual.rules.matrices import OnMatrices

Side = Literal["both", "right", "left"]
SIDES: tuple[Side, ...] = ("both", "right", "left")
CROSS, RIGHT, LEFT, SUM = "cross", "right", "left", "sum"
CoreRead = Callable[[Accumulators, tuple[int, int] | None], Tensor]
"""What is read of a matrix; where the accumulators are those of a core, the second are rows and columns of the whole.
"""


def slots(side: Side, total: bool) -> Callable[[int, int], dict[str, SlotSpec]]:
    """What is kept of an m×n matrix, S as well where `total`."""

    def found(m: int, n: int) -> dict[str, SlotSpec]:
        kept = {CROSS: SlotSpec((m, n), "float64")}
        if side != "left":
            kept[RIGHT] = SlotSpec((n, n), "float64")
        if side != "right":
            kept[LEFT] = SlotSpec((m, m), "float64")
        return kept | ({SUM: SlotSpec((m, n))} if total else {})

    return found


def laws(side: Side, total: bool) -> Laws:
    """Folding is adding; a state of one of the rules is read by the other where it has all that this one keeps."""
    kept = ({"B"}, {"A"} if side != "left" else set(), {"A′"} if side != "right" else set(), {"S"} if total else set())
    return Laws(weighted=True, combine=combine, keeps=frozenset().union(*kept))


def on_matrices(side: Side, total: bool, read: CoreRead, without: Callable[[Apart], LeftOut] | None) -> OnMatrices:
    """The form for matrices of a rule that reads these sums by `read`."""

    kept = slots(side, total)
    mine = tuple(kept(1, 1))  # a state of another rule can have more

    def read_whole(accumulators: Accumulators, totals: Totals) -> Tensor:
        return read({slot: accumulators[slot] for slot in mine}, None)

    def read_core(accumulators: Accumulators, totals: Totals, sides: tuple[int, int]) -> Tensor:
        return read(accumulators, sides)

    return OnMatrices(
        fold, read_whole, workspace, kept, Factored(cores=CoreFunctions(kept, fold, read_core), without=without)
    )


def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
    """One matrix of a fine-tune. Where the last model is taken out all sums become exact zeros."""
    folded = fold_matrix(accumulators, tau.flatten(1), inputs.weight)
    if not sums.last_out(totals, inputs.weight):
        return folded
    for value in accumulators.values():
        value.zero_()
    return folded._replace(sums=folded.sums._replace(merged_sq=0.0))


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


def workspace(m: int, n: int) -> int:
    """The task vector and a product of it in float64, and two Grams."""
    return 8 * (2 * m * n + 2 * max(m, n) ** 2)


def mean_diagonal(gram: Tensor, whole: int | None) -> float:
    """The mean of a Gram's diagonal; of a core, that of the whole matrix, which has `whole` rows there."""
    found = float(gram.diagonal().mean())
    return found if whole is None else found * (len(gram) / whole)
