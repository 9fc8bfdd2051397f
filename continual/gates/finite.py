"""Keeps out models that hold NaN or infinite values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from continual.errors import Refuse
from continual.gates.contract import AtTensor, TensorNumbers


@dataclass(frozen=True)
class FiniteGate(AtTensor):
    """Refuses a tensor if its squared norm is not finite: then it holds NaN or infinite values."""

    name = "finite"
    reasons = ("non-finite",)

    def judge(self, seen: TensorNumbers) -> None:
        """Raises Refuse (`non-finite`)."""
        if not math.isfinite(seen.tau_sq):
            raise Refuse(
                "non-finite",
                f"{seen.name}: tensor {seen.tensor} holds NaN or infinite values: its training diverged, or it was "
                "converted to a dtype that is too narrow",
            )
