"""Gates on a candidate's numbers, judged after its tensors streamed by and before the commit: pure functions of sums.

Thresholds are settings; see the page on rules for what honest fine-tunes look like.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from continual.errors import Refuse


@dataclass(frozen=True, slots=True)
class NormPolicy:
    """`base`: largest ‖τ‖/‖θ₀‖. `mean`: largest ratio, either way up for more and 1000 times that for less, to the mean
    ‖τ‖ so far."""

    base: float = 0.5
    mean: float = 30.0


def finite(name: str, tensor: str, tau_sq: float) -> None:
    """Refuses a tensor whose squared norm is no number: it holds NaN or infinities."""
    if not math.isfinite(tau_sq):
        raise Refuse("non-finite", f"{name}: tensor {tensor} holds NaN or infinite values")


def norms(name: str, tau_sq: float, base_sq: float, totals: Mapping[str, float], policy: NormPolicy) -> None:
    """Refuses a task vector that is zero everywhere or whose norm fits neither the base nor what was folded before.

    Args:
        tau_sq: ‖τ‖² over the whole model. base_sq: ‖θ₀‖² over the tensors that were folded.
        totals: of the state before this fold; `count` and `norm_sum` give the mean norm so far.
    """
    if tau_sq == 0.0:
        raise Refuse("zero", f"{name}: the task vector is zero everywhere: it is the base itself")
    norm, base = math.sqrt(tau_sq), math.sqrt(base_sq)
    if norm > policy.base * base:
        raise Refuse(
            "norm-base",
            f"{name}: the task vector's norm {norm:.4g} is {norm / base if base else math.inf:.3g} times the base's ({base:.4g}), more than max_base_ratio = "
            f"{policy.base:g}: a fine-tune of another base, or a damaged one",
        )
    if (count := totals.get("count", 0.0)) >= 1:
        mean = totals["norm_sum"] / count
        if norm > policy.mean * mean or norm < mean / (1000 * policy.mean):
            raise Refuse(
                "norm-mean",
                f"{name}: the task vector's norm {norm:.4g} is {norm / mean:.3g} times the mean of the {count:.0f} folded before ({mean:.4g}); "
                f"max_mean_ratio = {policy.mean:g}",
            )
