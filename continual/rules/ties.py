"""TIES: trim each task vector, elect a sign per parameter, average those that agree with it.

Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", section 4. The elected sign is that of Σ⁺
+ Σ⁻, the sums of the positive and of the negative trimmed changes, and the mean is that of the side that won: four
accumulators give the batch's result at every step. |Σ⁺ + Σ⁻| at most 2⁻²⁰ of Σ⁺ − Σ⁻ is a draw and reads 0, so that
rounding elects nobody. What is trimmed is told in `trimming`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from continual import linalg
from continual.errors import Misconfigured
from continual.records import SlotSpec, TensorSpec
from continual.rules import sums, trimming
from continual.rules.contract import Accumulators, Folded, Inputs, Option, Row, Rule, Totals
from continual.rules.scale import ReadOptions

PLUS, MINUS, COUNT_PLUS, COUNT_MINUS = "plus", "minus", "count_plus", "count_minus"
DRAW = 2.0**-20
_MOST = (1 << 16) - 1
"""Fine-tunes that a count of 16 bits can tell."""


def add(accumulators: Accumulators, tau: Tensor, kept: Tensor, weight: float) -> Folded:
    """Adds the trimmed changes (or takes them out) on the side of their sign; where no model is left the sums are exact
    zeros."""
    plus, minus = accumulators[PLUS], accumulators[MINUS]
    tau_sq, dot = linalg.inners((tau, tau), (tau, plus + minus))
    sign = 1 if weight > 0 else -1
    upper = torch.relu(kept)
    for total, slot, side in ((plus, COUNT_PLUS, upper), (minus, COUNT_MINUS, kept - upper)):
        total.add_(side, alpha=sign)
        counts = accumulators[slot].view(torch.int16)  # the same bits: torch adds no uint16
        counts.add_(side.sign().abs_().to(torch.int16), alpha=sign)
        if sign < 0:
            total.masked_fill_(counts == 0, 0.0)
    both = plus + minus
    return Folded(accumulators, {"tau_sq": tau_sq, "dot": dot, "merged_sq": linalg.inner(both, both)}, {})


def combine(accumulators: Accumulators, others: Accumulators, totals: Totals) -> float:
    """Adds sums and counts of each side; ‖Σ⁺ + Σ⁻‖² after. Raises Misconfigured beyond what a count can hold."""
    _countable(totals["count"])
    for slot in (PLUS, MINUS):
        accumulators[slot].add_(others[slot])
    for slot in (COUNT_PLUS, COUNT_MINUS):
        accumulators[slot].view(torch.int16).add_(others[slot].view(torch.int16))
    both = accumulators[PLUS] + accumulators[MINUS]
    return linalg.inner(both, both)


def _countable(count: float) -> None:
    if count > _MOST:
        raise Misconfigured(f"ties: {_MOST} fine-tunes are the most that its state can count")


def elect(accumulators: Accumulators) -> Tensor:
    """The mean of the side that won, 0 for a draw; float32."""
    plus, minus = accumulators[PLUS], accumulators[MINUS]
    total = plus + minus
    draw = total.abs() <= DRAW * (plus - minus)
    counts = [accumulators[slot].to(torch.int32).clamp_(min=1) for slot in (COUNT_PLUS, COUNT_MINUS)]
    return torch.where(total > 0, plus / counts[0], minus / counts[1]).masked_fill_(draw, 0.0)


def slots(spec: TensorSpec) -> dict[str, SlotSpec]:
    """Σ⁺, Σ⁻ and how many models went into each, of every element."""
    sides = {slot: SlotSpec(spec.shape) for slot in (PLUS, MINUS)}
    return sides | {slot: SlotSpec(spec.shape, "uint16") for slot in (COUNT_PLUS, COUNT_MINUS)}


def _make(options: Mapping[str, Any]) -> Rule:
    density, trim = options["density"], options["trim"]
    measuring = trim == "model" and density < 1.0

    def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
        if abs(inputs.weight) != 1.0:
            raise Misconfigured(f"ties folds every model with weight 1, or -1 to take it out, not {inputs.weight:g}")
        _countable(totals.get("count", 0.0) + 1)
        threshold = (
            inputs.measured["threshold"]
            if measuring
            else trimming.own_threshold(tau, density)
            if density < 1.0
            else 0.0
        )
        return add(accumulators, tau, trimming.trimmed(tau, threshold), inputs.weight)

    def read(spec: TensorSpec, accumulators: Accumulators, totals: Totals) -> Tensor:  # noqa: ARG001
        return elect(accumulators)

    def workspace(spec: TensorSpec) -> int:
        return sums.workspace(spec) if measuring else 24 * spec.numel

    row = TIES
    return Rule(
        row.name,
        row.summary,
        options,
        slots,
        lambda _spec: trim == "model" or density == 1.0,
        fold,
        sums.settle,
        read,
        sums.unknown,
        workspace,
        sums.no_gauges,
        combine,
        measure=trimming.counted(density) if measuring else None,
    )


TIES = Row(
    name="ties",
    summary="trim, elect a sign per parameter, average what agrees with it",
    paper="Yadav et al. 2023, TIES-Merging",
    options={
        "density": Option(
            0.2, "share of the changes that is kept, the largest by magnitude, in (0, 1]", trimming.share
        ),
        "trim": Option("model", f"over what the share is taken: {', '.join(trimming.SCOPES)}", trimming.scope),
    },
    read=ReadOptions("number", 1.0),
    bytes_per_parameter="12",
    make=_make,
)
