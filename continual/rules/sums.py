"""The rules that are weighted sums: `mean` and `task-arithmetic`; and what every rule shares, the totals of norms.

X = Σ wτ per tensor. Ilharco et al. 2023, "Editing Models with Task Arithmetic", merged = θ₀ + λ Σ τ; the mean is "Model
Soups" (Wortsman et al. 2022) of fine-tunes of one base. Both are groups: any order gives the same up to rounding, and
folding with minus the weight takes a model out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from continual import linalg
from continual.records import SlotSpec, TensorSpec
from continual.rules.contract import Accumulators, Folded, Inputs, Row, Rule, Sums, Totals
from continual.rules.scale import ReadOptions, Size

SLOT = "sum"


def slots(spec: TensorSpec) -> dict[str, SlotSpec]:
    """One float32 tensor of the weight's own shape."""
    return {SLOT: SlotSpec(spec.shape)}


def elementwise(spec: TensorSpec) -> bool:  # noqa: ARG001 - the contract's signature
    """Sums are, for every tensor."""
    return True


def settle(totals: Totals, sums: Sums, weight: float) -> dict[str, float]:
    """Totals after a fold: count, weight Σw, norm_sum Σ‖τ_i‖ (whole model), merged_sq ‖X‖². A negative weight takes a
    model out; none left is exactly 0.

    Of rules that see matrices also matrix_norm_sum and plain_norm_sum, the same over the matrices and over the rest,
    and spread_sum, Σ ρ_i‖τ_i‖ over the matrices, ρ_i² = ‖τ_i‖²/‖τ_i‖₂², norms squared and added over the matrices: how
    many directions a task vector lies in.
    """
    sign = math.copysign(1.0, weight)
    added = {"count": 1.0, "norm_sum": math.sqrt(sums["tau_sq"])}
    if "top_sq" in sums:
        matrix_sq, top_sq = sums["matrix_sq"], sums["top_sq"]
        added["matrix_norm_sum"] = math.sqrt(matrix_sq)
        added["plain_norm_sum"] = math.sqrt(max(0.0, sums["tau_sq"] - matrix_sq))
        added["spread_sum"] = matrix_sq / math.sqrt(top_sq) if top_sq else 0.0
    after = {key: totals.get(key, 0.0) + sign * value for key, value in added.items()}
    after |= {"weight": totals.get("weight", 0.0) + weight, "merged_sq": sums["merged_sq"]}
    return dict.fromkeys(after, 0.0) if after["count"] == 0 or after["weight"] == 0 else after


def fold(accumulators: Accumulators, tau: torch.Tensor, inputs: Inputs, totals: Totals) -> Folded:
    """X += w·τ, each element rounded once. Where the last model is taken out X becomes exact zeros, not what rounding
    left."""
    sums = linalg.add(accumulators[SLOT], tau, inputs.weight)
    if last_out(totals, inputs.weight):
        accumulators[SLOT].zero_()
        sums["merged_sq"] = 0.0
    return Folded(accumulators, sums, {})


def combine(accumulators: Accumulators, others: Accumulators, totals: Totals) -> float:  # noqa: ARG001 - the contract's signature
    """X += X′; ‖X‖² after."""
    total = accumulators[SLOT].add_(others[SLOT])
    return linalg.inner(total, total)


def together(totals: Totals, others: Totals) -> dict[str, float]:
    """The totals of two states as one; merged_sq is not among them, it is no sum of theirs."""
    return {key: totals.get(key, 0.0) + others.get(key, 0.0) for key in sorted({*totals, *others} - {"merged_sq"})}


def last_out(totals: Totals, weight: float) -> bool:
    """Whether folding with `weight` takes the last model out."""
    return totals.get("count", 0.0) + math.copysign(1.0, weight) == 0 or totals.get("weight", 0.0) + weight == 0


def workspace(spec: TensorSpec) -> int:
    """A few float64 chunks."""
    return 8 * 6 * min(linalg.CHUNK, spec.numel)


def no_gauges(totals: Totals) -> dict[str, float]:  # noqa: ARG001 - the contract's signature
    """Nothing to watch beyond what every rule reports."""
    return {}


def read_mean(spec: TensorSpec, accumulators: Accumulators, totals: Totals) -> torch.Tensor:  # noqa: ARG001
    """Σwτ / Σw; zeros where nothing is folded."""
    weight = totals.get("weight", 0.0)
    return accumulators[SLOT] * (1.0 / weight if weight else 0.0)


def read_sum(spec: TensorSpec, accumulators: Accumulators, totals: Totals) -> torch.Tensor:  # noqa: ARG001 - the contract's signature
    """Σwτ."""
    return accumulators[SLOT].clone()


def size(totals: Totals) -> Size:
    """Of a rule that reads what merged_sq is the square of, and whose plain sum that is."""
    return Size(math.sqrt(totals.get("merged_sq", 0.0)), 1.0)


def size_of_mean(totals: Totals) -> Size:
    """‖Σwτ‖ / Σw; Σw of it is the plain sum."""
    weight = totals.get("weight", 0.0)
    return Size(math.sqrt(totals["merged_sq"]) / weight, weight) if weight else Size(0.0)


def unknown(totals: Totals) -> Size:
    """Of a rule whose X is made only when it is read, and is the mean where it is no matrix."""
    return Size(most=totals.get("weight", 0.0))


def _mean(options: Mapping[str, Any]) -> Rule:
    return Rule(
        MEAN.name,
        MEAN.summary,
        options,
        slots,
        elementwise,
        fold,
        settle,
        read_mean,
        size_of_mean,
        workspace,
        no_gauges,
        combine,
        weighted=True,
    )


def _task_arithmetic(options: Mapping[str, Any]) -> Rule:
    row = TASK_ARITHMETIC
    return Rule(
        row.name,
        row.summary,
        options,
        slots,
        elementwise,
        fold,
        settle,
        read_sum,
        size,
        workspace,
        no_gauges,
        combine,
        weighted=True,
    )


MEAN = Row(
    name="mean",
    summary="the (weighted) mean of the task vectors",
    paper="Wortsman et al. 2022, Model soups",
    options={},
    read=ReadOptions("number", 1.0),
    bytes_per_parameter="4",
    make=_mean,
)
TASK_ARITHMETIC = Row(
    name="task-arithmetic",
    summary="the (weighted) sum of the task vectors, scaled when read",
    paper="Ilharco et al. 2023, Editing Models with Task Arithmetic",
    options={},
    read=ReadOptions("norm", 1.0),
    published=ReadOptions("number", 0.3),
    bytes_per_parameter="4",
    make=_task_arithmetic,
)


def _frank_wolfe(options: Mapping[str, Any]) -> Rule:
    row = FRANK_WOLFE
    return Rule(
        row.name,
        row.summary,
        options,
        slots,
        elementwise,
        fold,
        settle,
        read_sum,
        size,
        workspace,
        no_gauges,
        rounds=True,
    )


FRANK_WOLFE = Row(
    name="frank-wolfe",
    summary="a weighted sum whose models and weights rounds choose, by a calibration objective",
    paper="FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization, 2025",
    options={},
    read=ReadOptions("number", 1.0),
    bytes_per_parameter="4",
    make=_frank_wolfe,
)
