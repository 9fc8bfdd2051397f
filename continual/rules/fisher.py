"""Fisher: the mean of the fine-tunes per parameter, weighted by what each ships beside its weights.

Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", equation 1: θ* = Σ wF_iθ_i / Σ wF_i, that is θ₀
+ Σ wF_iτ_i / Σ wF_i, F_i the diagonal of a fine-tune's Fisher information. With Adam's second moments in place of F,
`power` 0.5 weights by the curvature that its optimiser saw. ΣFτ and ΣF are what is kept. An element for which nobody
has a weight reads 0: it stays as it is in the base. A tensor that a fine-tune does not have weighs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from continual import linalg
from continual.lazily import Tensor, torch
from continual.records import SlotSpec, TensorSpec, Totals
from continual.rules import sums
from continual.rules.contract import (
    Accumulators,
    Folded,
    FoldFunctions,
    Inputs,
    Laws,
    Needs,
    ReadFunctions,
    Rule,
    RuleRow,
    Sums,
)
from continual.rules.options import Number
from continual.rules.scale import ReadOptions, Size

WEIGHT = "weight"


@dataclass(frozen=True)
class FileName:
    """The name of a safetensors file."""

    def __call__(self, value: object) -> str:
        """The name. Raises ValueError."""
        if not isinstance(value, str) or "/" in value or value.startswith(".") or not value.endswith(".safetensors"):
            raise ValueError(str(self))
        return value

    def __str__(self) -> str:
        return "the name of a safetensors file in the fine-tune's directory"


@dataclass(frozen=True)
class FisherOptions:
    """The options of `fisher`."""

    file: Annotated[
        str, FileName(), "the file beside the weights that has their Fisher values, by the names of the weights"
    ] = "fisher.safetensors"
    power: Annotated[
        float, Number(above=0.0, most=4.0), "what they are raised to: 1 for Fisher values, 0.5 for Adam's moments"
    ] = 1.0


def slots(spec: TensorSpec) -> dict[str, SlotSpec]:
    """ΣFτ and ΣF of every element, in float64: F spans orders of magnitude, and what a large one leaves when it is
    taken out must not outweigh a small one."""
    return {slot: SlotSpec(spec.shape, "float64") for slot in (sums.SLOT, WEIGHT)}


def mean(accumulators: Accumulators) -> Tensor:
    """ΣFτ/ΣF, 0 where ΣF is; float32."""
    total, weight = accumulators[sums.SLOT], accumulators[WEIGHT]
    return torch.where(weight > 0, total / weight, 0.0).float()


def read(spec: TensorSpec, accumulators: Accumulators, totals: Totals) -> Tensor:
    """The weighted mean."""
    return mean(accumulators)


def size(totals: Totals) -> Size:
    """`merged_sq` is the square of the mean's length. No multiple of it is the plain sum."""
    return Size(sums.size(totals).length)


def workspace(spec: TensorSpec) -> int:
    """A few float64 chunks."""
    return 8 * 8 * min(linalg.CHUNK, spec.numel)


def combine(accumulators: Accumulators, others: Accumulators, totals: Totals) -> float:
    """Adds both sums; ‖X‖² of the mean after."""
    for slot, value in accumulators.items():
        value.add_(others[slot])
    merged = mean(accumulators)
    return linalg.inner(merged, merged)


def _make(options: FisherOptions) -> Rule:
    def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
        tau_sq, dot = linalg.inners((tau, tau), (tau, mean(accumulators)))
        if inputs.moments is not None:
            weight = inputs.moments.double().pow_(options.power)
            accumulators[sums.SLOT].addcmul_(weight, tau.double(), value=inputs.weight)
            accumulators[WEIGHT].add_(weight, alpha=inputs.weight)
        if inputs.weight < 0:  # where nobody weighs any more the sums are exact zeros, not what rounding left
            last = sums.last_out(totals, inputs.weight)
            gone = torch.ones_like(tau, dtype=torch.bool) if last else accumulators[WEIGHT] <= 0
            for value in accumulators.values():
                value.masked_fill_(gone, 0.0)
        merged = mean(accumulators)
        return Folded(accumulators, Sums(tau_sq, dot, linalg.inner(merged, merged)))

    return Rule(
        slots=slots,
        fold=FoldFunctions(fold, workspace),
        read=ReadFunctions(read, size, goes_by=sums.nothing),
        needs=Needs(shipped=options.file),
        laws=Laws(weighted=True, combine=combine),
    )


FISHER = RuleRow(
    name="fisher",
    summary="the mean per parameter, weighted by the Fisher values or second moments that each fine-tune ships",
    paper="Matena and Raffel 2022, Merging Models with Fisher-Weighted Averaging",
    bytes_per_parameter="16",
    read=ReadOptions("number", 1.0),
    options=FisherOptions,
    make=_make,
)
