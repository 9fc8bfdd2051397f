"""MagMax: of all fine-tunes, each parameter takes the change of the largest magnitude.

Marczak et al. 2024, "MagMax: Leveraging Model Merging for Seamless Continual Learning", section 4; there merged = θ₀ +
0.5·τ. At equal magnitudes the positive change wins, so that the order of the fine-tunes does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from continual import linalg
from continual.rules import matrices, sums
from continual.rules.contract import Accumulators, Folded, Inputs, Row, Rule, Totals
from continual.rules.scale import ReadOptions


def fold(accumulators: Accumulators, tau: torch.Tensor, inputs: Inputs, totals: Totals) -> Folded:  # noqa: ARG001 - the contract's signature
    """X = τ where |τ| > |X|, or where they are equal and τ is the positive one."""
    matrices.whole("magmax", inputs)
    kept = accumulators[sums.SLOT]
    tau_sq, dot = linalg.inners((tau, tau), (tau, kept))
    ours, theirs = kept.abs(), tau.abs()
    torch.where((theirs > ours) | ((theirs == ours) & (tau > kept)), tau, kept, out=kept)
    return Folded({sums.SLOT: kept}, {"tau_sq": tau_sq, "dot": dot, "merged_sq": linalg.inner(kept, kept)}, {})


def _make(options: Mapping[str, Any]) -> Rule:
    row = MAGMAX
    return Rule(
        row.name,
        row.summary,
        options,
        sums.slots,
        sums.elementwise,
        fold,
        sums.settle,
        sums.read_sum,
        sums.size,
        sums.workspace,
        sums.no_gauges,
    )


MAGMAX = Row(
    name="magmax",
    summary="each parameter takes the change of the largest magnitude",
    paper="Marczak et al. 2024, MagMax",
    options={},
    read=ReadOptions("number", 0.5),
    bytes_per_parameter="4",
    make=_make,
)
