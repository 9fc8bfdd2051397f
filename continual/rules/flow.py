"""Flow: the least squares of `gram` by gradient flow that is stopped early, in closed form from the same sums.

Wei et al. 2026, "Closed-Form Spectral Regularization for Multi-Task Model Merging" (SWUDI): the steps of gradient
descent that WUDI-Merging takes do not only minimise, they also leave directions of small eigenvalues alone, where the
objective says little. Right: the flow dX/ds = B − XA from X₀ stands at time s, with A = QΛQᵀ, at

    X = B·Q·diag((1 − e^{−sλ})/λ)·Qᵀ + X₀·Q·diag(e^{−sλ})·Qᵀ,

all but the K largest λ being cut off. X₀ is zero, or S = Στ_i. Left: the same on transposes, with A′. Two-sided, ours:
the mean of both, as `gram` has it. The time is in units of one over the mean of all n eigenvalues, so that weights, or
how many fine-tunes there are, do not change what it means; K is a share of n. Everything that is no matrix reads as the
mean. A state of `gram` can be read by this, and the other way about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from continual.lazily import Tensor, torch
from continual.rules import gram_less, gram_sums
from continual.rules.contract import Accumulators, Rule, RuleRow
from continual.rules.gram_sums import CROSS, EARLIER, GRAMS, LEFT, RIGHT, SIDES, SUM, Grams, GramSlots, Side
from continual.rules.matrices import Include
from continual.rules.options import Choice, Number
from continual.rules.scale import ReadOptions

Start = Literal["zero", "sum"]
STARTS: tuple[Start, ...] = ("zero", "sum")


@dataclass(frozen=True)
class FlowOptions:
    """The options of `flow`."""

    side: Annotated[Side, Choice(SIDES), "which side the task vectors act on"] = "both"
    time: Annotated[float, Number(above=0.0), "when the flow stops, in units of one over the mean eigenvalue"] = 5.0
    top: Annotated[float, Number(above=0.0, most=1.0), "K, the largest eigenvalues that count, as a share of all"] = 1.0
    start: Annotated[Start, Choice(STARTS), "where the flow starts: zero, or the sum of the task vectors"] = "zero"
    grams: Annotated[Grams, Choice(GRAMS), "how the Grams are kept: float32, packed, or float64, whole"] = "float32"
    include: Include = ()


def flowed(accumulators: Accumulators, options: FlowOptions, sides: tuple[int, int] | None = None) -> Tensor:
    """The merged m×n task vector, float64: of the right side, the left side, or the mean of both. Where these are the
    accumulators of a core, `sides` are m and n: the mean and the share of the eigenvalues are those of the whole."""
    found = []
    for side in (RIGHT, LEFT):
        if side not in accumulators:
            continue
        gram, cross = accumulators[side], accumulators[CROSS]
        start = accumulators[SUM].double() if options.start == "sum" else None
        whole = len(gram) if sides is None else sides[side == RIGHT]
        if side == RIGHT:
            found.append(_flow(gram, cross, start, options, whole))
        else:
            found.append(_flow(gram, cross.mT, None if start is None else start.mT, options, whole).mT)
    return found[0] if len(found) == 1 else (found[0] + found[1]) / 2


def _flow(gram: Tensor, cross: Tensor, start: Tensor | None, options: FlowOptions, whole: int) -> Tensor:
    """X of the right side; `whole` is how many eigenvalues there are of the whole matrix."""
    mean = gram_sums.mean_diagonal(gram, whole)
    if mean <= 0.0:
        return torch.zeros_like(cross)
    values, vectors = torch.linalg.eigh(gram)
    least = max(0, len(values) - math.ceil(options.top * whole))
    values, vectors = values[least:].clamp(min=0), vectors[:, least:]
    gone = values * (options.time / mean)
    held = gone > 0
    rate = torch.where(held, -torch.expm1(-gone) / torch.where(held, values, 1.0), options.time / mean)
    turned = (cross @ vectors) * rate
    if start is not None:
        turned.addcmul_(start @ vectors, torch.exp(-gone))
    found: Tensor = turned @ vectors.mT
    return found


def _make(options: FlowOptions) -> Rule:
    def read(accumulators: Accumulators, sides: tuple[int, int] | None) -> Tensor:
        return flowed(accumulators, options, sides)

    kept = GramSlots(options.side, options.start == "sum", options.grams)
    quick = options.start == "zero" and options.top == 1.0
    return kept.rule("flow", options.include, read, gram_less.flow(options.time) if quick else None)


FLOW = RuleRow(
    name="flow",
    summary="the least squares of gram by gradient flow, stopped early",
    paper="Wei et al. 2026, SWUDI, in closed form; two-sided is ours",
    bytes_per_parameter="12 of a square matrix, 2·(m²+n²)/mn + 8 of any",
    read=ReadOptions("spread", 0.85),
    published=ReadOptions("number", 1.0),
    options=FlowOptions,
    make=_make,
    earlier=EARLIER,
)
