"""TIES: trim each task vector, elect a sign per parameter, average those that agree with it.

Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", section 4. The elected sign is that of Σ⁺ + Σ⁻, the sums of the positive and of
the negative trimmed changes, and the mean is that of the side that won: four accumulators give the batch's result at every step. |Σ⁺ + Σ⁻| at most 2⁻²⁰ of
Σ⁺ − Σ⁻ is a draw and reads 0, so that rounding elects nobody. Trimming keeps the ⌊density·N⌋ changes (at least one) of largest magnitude, and those equal to
the smallest kept; never a zero. Over the whole model the threshold is exact, from two counts of the bit patterns of |τ|, which are ordered like the magnitudes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from continual import linalg
from continual.errors import Misconfigured
from continual.records import SlotSpec, TensorSpec
from continual.rules import sums
from continual.rules.contract import Accumulators, Folded, Inputs, Measure, Measured, Option, ReadOptions, Row, Rule, Totals

PLUS, MINUS, COUNT_PLUS, COUNT_MINUS = "plus", "minus", "count_plus", "count_minus"
DRAW = 2.0**-20
TRIMS = ("model", "tensor")
_LOW = 16
_MOST = (1 << 16) - 1
"""Fine-tunes that a count of 16 bits can tell."""


def keep(density: float, numel: int) -> int:
    """How many of `numel` changes are kept."""
    return max(1, int(density * numel))


def tally(number: int, tau: Tensor, measured: Measured) -> Tensor:
    """Pass 0: how many |τ| share each upper half of the float's bits. Pass 1: each lower half, of those in the half that was found."""
    bits = tau.view(torch.int32) & 0x7FFFFFFF
    if number == 0:
        return torch.bincount(bits.bitwise_right_shift_(_LOW), minlength=1 << 15)
    # what lies outside goes into one place at either end
    inside = bits.sub_(int(measured["upper"]) << _LOW).clamp_(-1, 1 << _LOW).add_(1)
    return torch.bincount(inside, minlength=(1 << _LOW) + 2)[1:-1]


def conclude(density: float, number: int, counts: Tensor, numel: int, measured: Measured) -> dict[str, float]:
    """The half that holds the threshold, and how many lie above it; then the threshold."""
    wanted = keep(density, numel) - int(measured.get("above", 0.0))
    at_least = counts.flip(0).cumsum(0).flip(0)  # of each half, how many are in it or above
    reached = int((at_least >= wanted).sum()) - 1
    if reached < 0:  # fewer changes than are to be kept: all the rest are zeros of tensors that were left alone
        return {"upper": 0.0, "above": float(at_least[0]), "threshold": 0.0}
    if number == 0:
        return {"upper": float(reached), "above": float(at_least[reached] - counts[reached])}
    bits = torch.tensor([(int(measured["upper"]) << _LOW) | reached], dtype=torch.int32)
    return {**measured, "threshold": float(bits.view(torch.float32))}


def trimmed(tau: Tensor, threshold: float) -> Tensor:
    """τ where |τ| ≥ threshold, else 0."""
    below = torch.tensor(threshold).nextafter(torch.tensor(0.0))  # hardshrink keeps what is above, and costs a twentieth of a where
    return torch.nn.functional.hardshrink(tau, float(below))


def own_threshold(tau: Tensor, density: float) -> float:
    """The smallest magnitude that is kept of one tensor alone."""
    numel = tau.numel()
    return float(tau.abs().flatten().kthvalue(numel - keep(density, numel) + 1).values) if numel else 0.0


def add(accumulators: Accumulators, tau: Tensor, kept: Tensor, weight: float) -> Folded:
    """Adds the trimmed changes (or takes them out) on the side of their sign; where no model is left the sums are exact zeros."""
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
        if totals.get("count", 0.0) >= _MOST:
            raise Misconfigured(f"ties: {_MOST} fine-tunes are the most that its state can count")
        threshold = inputs.measured["threshold"] if measuring else own_threshold(tau, density) if density < 1.0 else 0.0
        return add(accumulators, tau, trimmed(tau, threshold), inputs.weight)

    def read(spec: TensorSpec, accumulators: Accumulators, totals: Totals, read_options: ReadOptions) -> Tensor:  # noqa: ARG001
        return elect(accumulators).mul_(read_options.value)

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
        workspace,
        sums.no_gauges,
        group=True,
        measure=Measure(2, tally, lambda *given: conclude(density, *given)) if measuring else None,
    )


def _density(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ValueError("a number above 0 and at most 1")
    return float(value)


def _trim(value: Any) -> str:
    if value not in TRIMS:
        raise ValueError(f"one of {', '.join(TRIMS)}")
    return str(value)


TIES = Row(
    name="ties",
    summary="trim, elect a sign per parameter, average what agrees with it",
    paper="Yadav et al. 2023, TIES-Merging",
    options={
        "density": Option(0.2, "share of the changes that is kept, the largest by magnitude, in (0, 1]", _density),
        "trim": Option("model", f"over what the share is taken: {', '.join(TRIMS)}", _trim),
    },
    read=ReadOptions("number", 1.0),
    bytes_per_parameter="12",
    make=_make,
    policies=("number",),
)
