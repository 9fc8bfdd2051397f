"""Thresholds on |τ|: which changes are the largest, of a tensor or, exactly and without holding it, of a whole model.

Over a model two passes count the bit patterns of |τ|, which are ordered like the magnitudes: first the upper halves, then the lower halves of those in the
half where the threshold lies. What is kept are the ⌊density·N⌋ changes (at least one) of largest magnitude, and those equal to the smallest of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from continual.rules.contract import Inputs, Measure, Measured

SCOPES = ("model", "tensor")
_LOW = 16


def keep(density: float, numel: int) -> int:
    """How many of `numel` changes are kept."""
    return max(1, int(density * numel))


def counted(density: float) -> Measure:
    """The passes that find `threshold`, the smallest magnitude kept of a whole model."""
    return Measure(2, _tally, partial(_conclude, density))


def own_threshold(tau: Tensor, density: float) -> float:
    """The smallest magnitude that is kept of one tensor alone."""
    numel = tau.numel()
    return float(tau.abs().flatten().kthvalue(numel - keep(density, numel) + 1).values) if numel else 0.0


def trimmed(tau: Tensor, threshold: float) -> Tensor:
    """τ where |τ| ≥ threshold, else 0."""
    below = torch.tensor(threshold).nextafter(torch.tensor(0.0))  # hardshrink keeps what is above, and costs a twentieth of a where
    return torch.nn.functional.hardshrink(tau, float(below))


def share(value: Any) -> float:
    """A number above 0 and at most 1. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ValueError("a number above 0 and at most 1")
    return float(value)


def scope(value: Any) -> str:
    """`model` or `tensor`. Raises ValueError for anything else."""
    if value not in SCOPES:
        raise ValueError(f"one of {', '.join(SCOPES)}")
    return str(value)


def _tally(number: int, tau: Tensor, inputs: Inputs) -> Tensor:
    bits = tau.view(torch.int32) & 0x7FFFFFFF
    if number == 0:
        return torch.bincount(bits.bitwise_right_shift_(_LOW), minlength=1 << 15)
    # what lies outside goes into one place at either end
    inside = bits.sub_(int(inputs.measured["upper"]) << _LOW).clamp_(-1, 1 << _LOW).add_(1)
    return torch.bincount(inside, minlength=(1 << _LOW) + 2)[1:-1]


def _conclude(density: float, number: int, counts: Tensor, numel: int, measured: Measured) -> dict[str, float]:
    wanted = keep(density, numel) - int(measured.get("above", 0.0))
    at_least = counts.flip(0).cumsum(0).flip(0)  # of each half, how many are in it or above
    reached = int((at_least >= wanted).sum()) - 1
    if reached < 0:  # fewer changes than are to be kept: all the rest are zeros of tensors that were left alone
        return {"upper": 0.0, "above": float(at_least[0]), "threshold": 0.0}
    if number == 0:
        return {"upper": float(reached), "above": float(at_least[reached] - counts[reached])}
    bits = torch.tensor([(int(measured["upper"]) << _LOW) | reached], dtype=torch.int32)
    return {**measured, "threshold": float(bits.view(torch.float32))}
