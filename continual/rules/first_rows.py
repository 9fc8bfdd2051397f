"""The first elements of the merge that accumulators hold, where that is at most one product away: what a candidate is
compared with before it is folded. It is no reading: nothing is scaled, and no directions are made orthogonal."""

from __future__ import annotations

from continual.lazily import Tensor
from continual.rules import sums, tsv_m
from continual.rules.contract import Accumulators


def first_of(accumulators: Accumulators, count: int) -> Tensor | None:
    """The first `count` elements of X (fewer where there are not as many), flat: of a sum that, of triplets U diag(σ)
    Vᵀ. None where a rule keeps something else."""
    if accumulators.keys() == {sums.SLOT}:
        return accumulators[sums.SLOT].reshape(-1)[:count]
    if {tsv_m.U, tsv_m.SIGMA, tsv_m.V} <= accumulators.keys():
        u, v = accumulators[tsv_m.U], accumulators[tsv_m.V]
        held = int((accumulators[tsv_m.SIGMA] != 0).sum())
        rows = -(-count // max(1, len(v)))
        left = u[:rows, :held] * accumulators[tsv_m.SIGMA][:held]
        return (left @ v[:, :held].mT).reshape(-1)[:count]
    return None
