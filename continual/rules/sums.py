"""Rules whose state is the weighted sum of the task vectors: the plain mean and task arithmetic. Both are groups: weight −1 takes a model out.

Mean: Wortsman et al. 2022, "Model soups", applied to task vectors. Task arithmetic: Ilharco et al. 2023, "Editing Models with Task Arithmetic", eq. 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from continual.linalg import dot, sum_squares
from continual.records import SlotSpec, TensorSpec
from continual.rules import Accumulators, Folded, Inputs, ReadOptions, Rule, Totals, scale_of, settle


def mean(options: Mapping[str, Any]) -> Rule:
    """merged = s·Σwτ / Σw."""
    return _sum_rule("mean", options, averaged=True)


def task_arithmetic(options: Mapping[str, Any]) -> Rule:
    """merged = s·Σwτ, with s = λ of the paper."""
    return _sum_rule("task-arithmetic", options, averaged=False)


def _sum_rule(name: str, options: Mapping[str, Any], *, averaged: bool) -> Rule:
    def read(_spec: TensorSpec, accumulators: Accumulators, totals: Totals, options: ReadOptions) -> Tensor:
        s = scale_of(totals, options)
        if averaged and options.policy == "number" and s:
            s /= totals["weight"]
        return accumulators["sum"].mul(s)

    return Rule(name, dict(options), _slots, _fold, settle, read, lambda _totals: {}, lambda _spec: 0, group=True)


def _slots(spec: TensorSpec) -> dict[str, SlotSpec]:
    return {"sum": SlotSpec(spec.shape)}


def _fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
    """Σwτ += wτ."""
    x = accumulators["sum"]
    sums = {"tau_sq": sum_squares(tau), "before_sq": sum_squares(x), "dot": dot(tau, x)}
    if totals.get("count", 0.0) + (1.0 if inputs.weight > 0 else -1.0) == 0.0:
        x.zero_()  # the last model is taken out: no rounding of what was in is left behind
    else:
        x.add_(tau, alpha=inputs.weight)
    # ‖x + wτ‖² from the new x: the expansion by the three sums would cancel where x nearly vanishes
    return Folded({"sum": x}, {**sums, "merged_sq": sum_squares(x)}, {})

