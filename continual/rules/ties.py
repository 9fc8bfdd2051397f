"""TIES: trim each task vector, elect a sign per parameter, average those that agree with it.

Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", section 4. The elected sign is that of Σ⁺
+ Σ⁻, the sums of the positive and of the negative trimmed changes, and the mean is that of the side that won: four
accumulators give the batch's result at every step. |Σ⁺ + Σ⁻| at most 2⁻²⁰ of Σ⁺ − Σ⁻ is a draw and reads 0, so that
rounding elects nobody. What is trimmed is told in `trimming`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from continual import linalg
from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.lazily import numpy as np
from continual.records import SlotSpec, TensorSpec, Totals
from continual.rules import sums, trimming
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
from continual.rules.options import Choice, Number
from continual.rules.scale import ReadOptions

PLUS, MINUS, COUNT_PLUS, COUNT_MINUS = "plus", "minus", "count_plus", "count_minus"
DRAW = 2.0**-20
_MOST = (1 << 16) - 1
"""Fine-tunes that a count of 16 bits can tell."""


@dataclass(frozen=True)
class TiesOptions:
    """The options of `ties`."""

    density: Annotated[
        float, Number(above=0.0, most=1.0), "share of the changes that is kept, the largest by magnitude"
    ] = 0.2
    trim: Annotated[str, Choice(trimming.SCOPES), "over what the share is taken"] = "model"


def add_sides(accumulators: Accumulators, tau: Tensor, threshold: float, weight: float) -> Folded:
    """Adds the changes of at least that magnitude (or takes them out) on the side of their sign; where no model is left
    the sums are exact zeros."""
    if tau.is_cpu and tau.numel() > linalg.SMALL:
        return _add_by_pieces(accumulators, tau, threshold, weight)
    plus, minus = accumulators[PLUS], accumulators[MINUS]
    tau_sq, dot = linalg.inners((tau, tau), (tau, plus + minus))
    sign = 1 if weight > 0 else -1
    kept = trimming.trimmed(tau, threshold)
    upper = torch.relu(kept)
    for total, slot, side in ((plus, COUNT_PLUS, upper), (minus, COUNT_MINUS, kept - upper)):
        total.add_(side, alpha=sign)
        counts = accumulators[slot].view(torch.int16)  # the same bits: torch adds no uint16
        counts.add_(side.sign().abs_().to(torch.int16), alpha=sign)
        if sign < 0:
            total.masked_fill_(counts == 0, 0.0)
    both = plus + minus
    return Folded(accumulators, Sums(tau_sq, dot, linalg.inner(both, both)))


def _add_by_pieces(accumulators: Accumulators, tau: Tensor, threshold: float, weight: float) -> Folded:
    """`add_sides` in one pass over pieces that stay in the cache, with the same bits in the accumulators."""
    arrays = {slot: value.view(-1).numpy() for slot, value in accumulators.items()}
    step = np.add if weight > 0 else np.subtract
    flat, rows = tau.view(-1), linalg.RowSums(3, tau.numel())
    both, lower = np.empty((2, linalg.PIECE), np.float32)
    upper, chosen = torch.empty(linalg.PIECE), np.empty(linalg.PIECE, np.bool_)
    with rows:
        for i, j in linalg.pieces(len(flat), linalg.PIECE):
            length, change = j - i, flat[i:j].numpy()
            rows.take(0, i, change, change)
            plus, minus = arrays[PLUS][i:j], arrays[MINUS][i:j]
            rows.take(1, i, change, np.add(plus, minus, out=both[:length]))
            kept = trimming.trimmed(flat[i:j], threshold)
            above = torch.clamp_min(kept, 0.0, out=upper[:length]).numpy()
            below = np.subtract(kept.numpy(), above, out=lower[:length])
            for total, slot, side in ((plus, COUNT_PLUS, above), (minus, COUNT_MINUS, below)):
                counts = arrays[slot][i:j]
                step(total, side, out=total)
                step(counts, np.not_equal(side, 0.0, out=chosen[:length]), out=counts)
                if weight < 0:
                    total[counts == 0] = 0.0
            np.add(plus, minus, out=both[:length])
            rows.take(2, i, both[:length], both[:length])
    return Folded(accumulators, Sums(*rows.totals()))


def combine(accumulators: Accumulators, others: Accumulators, totals: Totals) -> float:
    """Adds sums and counts of each side; ‖Σ⁺ + Σ⁻‖² after. Raises Misconfigured beyond what a count can hold."""
    _countable(totals.count)
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


def read(spec: TensorSpec, accumulators: Accumulators, totals: Totals) -> Tensor:
    """The elected mean."""
    return elect(accumulators)


def _make(options: TiesOptions) -> Rule:
    whole, density = options.density == 1.0, options.density
    measuring = options.trim == "model" and not whole

    def threshold(tau: Tensor, inputs: Inputs) -> float:
        if measuring or inputs.measured is not None:
            return trimming.found_threshold(inputs)
        return 0.0 if whole else trimming.own_threshold(tau, density)

    def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
        if abs(inputs.weight) != 1.0:
            raise Misconfigured(f"ties folds every model with weight 1, or -1 to take it out, not {inputs.weight:g}")
        _countable(totals.count + 1)
        return add_sides(accumulators, tau, threshold(tau, inputs), inputs.weight)

    def elementwise(spec: TensorSpec) -> bool:
        return options.trim == "model" or whole

    def workspace(spec: TensorSpec) -> int:
        return sums.workspace(spec) if measuring else 24 * spec.numel

    return Rule(
        slots=slots,
        fold=FoldFunctions(fold, workspace, elementwise),
        read=ReadFunctions(read, sums.unknown, goes_by=sums.nothing),
        needs=Needs(
            measure=trimming.Sampled(density) if measuring else None,
            own=None if measuring or whole else trimming.Sampled(density),
        ),
        laws=Laws(combine=combine),
    )


TIES = RuleRow(
    name="ties",
    summary="trim, elect a sign per parameter, average what agrees with it",
    paper="Yadav et al. 2023, TIES-Merging",
    bytes_per_parameter="12",
    read=ReadOptions("number", 1.0),
    options=TiesOptions,
    make=_make,
)
