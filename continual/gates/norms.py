"""Keeps out task vectors whose length fits neither the base nor what was folded before.

The page on rules (ops/docs/rules.md) says how long the task vectors of honest fine-tunes are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from continual.errors import Refuse
from continual.gates.contract import AtNumbers, Numbers

_SHORTER = 1000
"""A task vector may be shorter than the mean by this many times more than it may be longer."""


@dataclass(frozen=True)
class NormsGate(AtNumbers):
    """Refuses a task vector that is zero, or too long, or too short.

    `max_base_ratio`: largest ‖τ‖/‖θ₀‖. `max_mean_ratio`: a task vector may be so many times longer than the mean of
    those folded before, and 1000 times as many times shorter.
    """

    name = "norms"
    reasons = ("zero", "norm-base", "norm-mean")

    max_base_ratio: float = 0.5
    max_mean_ratio: float = 30.0

    def judge(self, seen: Numbers) -> None:
        """Raises Refuse: `zero` if τ is zero everywhere, `norm-base`, `norm-mean`."""
        norm = seen.tau_norm
        base = seen.base_norm
        if norm == 0.0:
            raise Refuse(
                "zero",
                f"{seen.name}: the task vector is zero everywhere: it is the base itself, or an adapter that was saved "
                "before it was trained",
            )
        if base is not None and norm > self.max_base_ratio * base:
            raise Refuse(
                "norm-base",
                f"{seen.name}: the task vector's norm {norm:.4g} is {norm / base if base else math.inf:.3g} times "
                f"the base's ({base:.4g}), more than max_base_ratio = {self.max_base_ratio:g}: "
                "a fine-tune of another base, or a damaged one; if it is neither, set a larger max_base_ratio",
                by=("max_base_ratio",),
            )
        count = seen.totals.count
        if count < 1:
            return
        mean = seen.totals.norm_sum / count
        if norm > self.max_mean_ratio * mean or norm < mean / (_SHORTER * self.max_mean_ratio):
            raise Refuse(
                "norm-mean",
                f"{seen.name}: the task vector's norm {norm:.4g} is {norm / mean:.3g} times the mean of the "
                f"{count:.0f} folded before ({mean:.4g}), outside max_mean_ratio = {self.max_mean_ratio:g}; "
                "if it is meant to be so, set a larger max_mean_ratio",
                by=("max_mean_ratio",),
            )
