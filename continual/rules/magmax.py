"""MagMax: of all fine-tunes, each parameter takes the change of the largest magnitude.

Marczak et al. 2024, "MagMax: Leveraging Model Merging for Seamless Continual Learning", section 4; there merged = θ₀ +
0.5·τ. At equal magnitudes the positive change wins, so that the order of the fine-tunes does not matter.
"""

from __future__ import annotations

from continual import linalg
from continual.lazily import Tensor, torch
from continual.records import Totals
from continual.rules import sums
from continual.rules.contract import Accumulators, Folded, FoldFunctions, Inputs, ReadFunctions, Rule, RuleRow, Sums
from continual.rules.options import NoOptions
from continual.rules.scale import ReadOptions


def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
    """X = τ where |τ| > |X|, or where they are equal and τ is the positive one."""
    sums.whole("magmax", inputs)
    kept = accumulators[sums.SLOT]
    tau_sq, dot = linalg.inners((tau, tau), (tau, kept))
    ours, theirs = kept.abs(), tau.abs()
    torch.where((theirs > ours) | ((theirs == ours) & (tau > kept)), tau, kept, out=kept)
    return Folded({sums.SLOT: kept}, Sums(tau_sq, dot, linalg.inner(kept, kept)))


def _make(_: NoOptions) -> Rule:
    return Rule(
        fold=FoldFunctions(fold, sums.workspace),
        read=ReadFunctions(sums.read_sum, sums.size, square=sums.square_of_sum, goes_by=sums.nothing),
    )


MAGMAX = RuleRow(
    name="magmax",
    summary="each parameter takes the change of the largest magnitude",
    paper="Marczak et al. 2024, MagMax",
    bytes_per_parameter="4",
    read=ReadOptions("number", 0.5),
    options=NoOptions,
    make=_make,
)
