"""Fisher: the mean of the fine-tunes per parameter, weighted by what each ships beside its weights.

Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", equation 1: θ* = Σ wF_iθ_i / Σ wF_i, that is θ₀
+ Σ wF_iτ_i / Σ wF_i, F_i the diagonal of a fine-tune's Fisher information. With Adam's second moments in place of F,
`power` 0.5 weights by the curvature that its optimiser saw. ΣFτ and ΣF are what is kept. An element for which nobody
has a weight reads 0: it stays as it is in the base. A tensor that a fine-tune does not have weighs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from continual import linalg
from continual.records import SlotSpec, TensorSpec
from continual.rules import sums
from continual.rules.contract import Accumulators, Folded, Inputs, Option, Row, Rule, Totals
from continual.rules.scale import ReadOptions, Size

WEIGHT = "weight"


def slots(spec: TensorSpec) -> dict[str, SlotSpec]:
    """ΣFτ and ΣF of every element, in float64: F spans orders of magnitude, and what a large one leaves when it is
    taken out must not outweigh a small one."""
    return {slot: SlotSpec(spec.shape, "float64") for slot in (sums.SLOT, WEIGHT)}


def mean(accumulators: Accumulators) -> torch.Tensor:
    """ΣFτ/ΣF, 0 where ΣF is; float32."""
    total, weight = accumulators[sums.SLOT], accumulators[WEIGHT]
    return torch.where(weight > 0, total / weight, 0.0).float()


def combine(accumulators: Accumulators, others: Accumulators, totals: Totals) -> float:  # noqa: ARG001 - the contract's signature
    """Adds both sums; ‖X‖² of the mean after."""
    for slot, value in accumulators.items():
        value.add_(others[slot])
    merged = mean(accumulators)
    return linalg.inner(merged, merged)


def _make(options: Mapping[str, Any]) -> Rule:
    power: float = options["power"]

    def fold(accumulators: Accumulators, tau: torch.Tensor, inputs: Inputs, totals: Totals) -> Folded:
        tau_sq, dot = linalg.inners((tau, tau), (tau, mean(accumulators)))
        if inputs.moments is not None:
            weight = inputs.moments.double().pow_(power)
            accumulators[sums.SLOT].addcmul_(weight, tau.double(), value=inputs.weight)
            accumulators[WEIGHT].add_(weight, alpha=inputs.weight)
        if inputs.weight < 0:  # where nobody weighs any more the sums are exact zeros, not what rounding left
            gone = (
                accumulators[WEIGHT] <= 0
                if not sums.last_out(totals, inputs.weight)
                else torch.ones_like(tau, dtype=torch.bool)
            )
            for value in accumulators.values():
                value.masked_fill_(gone, 0.0)
        merged = mean(accumulators)
        return Folded(accumulators, {"tau_sq": tau_sq, "dot": dot, "merged_sq": linalg.inner(merged, merged)}, {})

    def workspace(spec: TensorSpec) -> int:
        return 8 * 8 * min(linalg.CHUNK, spec.numel)

    def read(spec: TensorSpec, accumulators: Accumulators, totals: Totals) -> torch.Tensor:  # noqa: ARG001
        return mean(accumulators)

    return Rule(
        FISHER.name,
        FISHER.summary,
        options,
        slots,
        sums.elementwise,
        fold,
        sums.settle,
        read,
        lambda totals: Size(sums.size(totals).length),
        workspace,
        sums.no_gauges,
        combine,
        weighted=True,
        shipped=options["file"],
    )


def _file(value: Any) -> str:
    if not isinstance(value, str) or "/" in value or value.startswith(".") or not value.endswith(".safetensors"):
        raise ValueError("the name of a safetensors file in the fine-tune's directory")
    return value


def _power(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 4.0:
        raise ValueError("a number above 0 and at most 4")
    return float(value)


FISHER = Row(
    name="fisher",
    summary="the mean per parameter, weighted by the Fisher values or second moments that each fine-tune ships",
    paper="Matena and Raffel 2022, Merging Models with Fisher-Weighted Averaging",
    options={
        "file": Option(
            "fisher.safetensors", "the file beside the weights that has them, by the names of the weights", _file
        ),
        "power": Option(1.0, "what they are raised to: 1 for Fisher values, 0.5 for Adam's second moments", _power),
    },
    read=ReadOptions("number", 1.0),
    bytes_per_parameter="16",
    make=_make,
)
