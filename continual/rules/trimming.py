"""Thresholds on |τ|: which changes are the largest, of a tensor or, exactly and without holding it, of a whole model.

What is kept are the ⌊density·N⌋ changes (at least one) of largest magnitude, and those equal to the smallest of them.
The bit patterns of |τ| are ordered like the magnitudes. Over a model a sample says about where the threshold lies; one
pass counts how many patterns lie above a window there, and each one inside. Where the window has missed it, two more
passes find it whatever the values are: they count the upper halves of the patterns, then the lower halves of those in
the half that holds it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from continual.rules.contract import Inputs, Measure, Measured

SCOPES = ("model", "tensor")
_LOW = 16
_WIDTH = 1 << _LOW


def keep(density: float, numel: int) -> int:
    """How many of `numel` changes are kept."""
    return max(1, int(density * numel))


def counted(density: float) -> Measure:
    """The passes that find `threshold`, the smallest magnitude kept of a whole model."""
    return Measure(4, _share, _tally, partial(_conclude, density))


def own_threshold(tau: Tensor, density: float) -> float:
    """The smallest magnitude that is kept of one tensor alone."""
    numel = tau.numel()
    return float(tau.abs().flatten().kthvalue(numel - keep(density, numel) + 1).values) if numel else 0.0


def trimmed(tau: Tensor, threshold: float) -> Tensor:
    """τ where |τ| ≥ threshold, else 0."""
    below = torch.tensor(threshold).nextafter(
        torch.tensor(0.0)
    )  # hardshrink keeps what is above, and costs a twentieth of a where
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


_SAMPLE = 1 / 16
_HALVES, _WINDOW, _UPPER, _LOWER = range(4)


def _share(number: int, measured: Measured) -> float:
    if number == _HALVES:
        return _SAMPLE
    return float(number == _WINDOW or "missed" in measured)


def _tally(number: int, tau: Tensor, inputs: Inputs) -> Tensor:
    if number == _WINDOW:
        return _window(tau, int(inputs.measured["from"]))
    bits = tau.view(torch.int32) & 0x7FFFFFFF
    if number != _LOWER:
        return torch.bincount(bits.bitwise_right_shift_(_LOW), minlength=1 << 15)
    # what lies outside goes into one place at either end
    inside = bits.sub_(int(inputs.measured["upper"]) << _LOW).clamp_(-1, 1 << _LOW).add_(1)
    return torch.bincount(inside, minlength=(1 << _LOW) + 2)[1:-1]


def _window(tau: Tensor, first: int) -> Tensor:
    """How many patterns there are of each of the 2^16 from `first` on, and how many above those. By NumPy: at a quarter
    of the cost of torch's masks."""
    bits = tau.numpy().view(np.uint32) & np.uint32(0x7FFFFFFF)
    bits -= np.uint32(first)  # what lies below wraps round to the largest
    inside = np.bincount(bits[np.flatnonzero(bits < _WIDTH)], minlength=_WIDTH)
    above = np.count_nonzero(bits.view(np.int32) >= _WIDTH)
    return torch.from_numpy(np.append(inside, above))


def _conclude(density: float, number: int, counts: Tensor, numel: int, measured: Measured) -> dict[str, float]:
    wanted = keep(density, numel)
    if number == _HALVES:
        seen = counts.flip(0).cumsum(0).flip(0)
        half = int((seen >= wanted).sum()) - 1
        if half < 0:
            return {"from": 0.0}
        inside = (wanted - int(seen[half] - counts[half])) / int(
            counts[half]
        )  # share of the half that is kept, from its top
        middle = ((half + 1) << _LOW) - int(inside * (1 << _LOW))
        return {"from": float(max(0, middle - (1 << (_LOW - 1))))}
    if number == _WINDOW:
        left = wanted - int(counts[-1])
        at_least = counts[:-1].flip(0).cumsum(0).flip(0)
        if left <= 0 or (left > int(at_least[0]) and measured["from"] > 0):
            return {"missed": 1.0}
        return {"threshold": _magnitude(int(measured["from"]) + max(0, int((at_least >= left).sum()) - 1))}
    wanted -= int(measured.get("above", 0.0))
    at_least = counts.flip(0).cumsum(0).flip(0)  # of each half, how many are in it or above
    reached = int((at_least >= wanted).sum()) - 1
    if reached < 0:  # fewer changes than are to be kept: all the rest are zeros of tensors that were left alone
        return {**measured, "upper": 0.0, "above": float(at_least[0]), "threshold": 0.0}
    if number == _UPPER:
        return {**measured, "upper": float(reached), "above": float(at_least[reached] - counts[reached])}
    return {**measured, "threshold": _magnitude((int(measured["upper"]) << _LOW) | reached)}


def _magnitude(bits: int) -> float:
    return float(torch.tensor([bits], dtype=torch.int32).view(torch.float32))
