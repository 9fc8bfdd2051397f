"""Thresholds on |τ|: which changes are the largest, of a tensor or, exactly and without holding it, of a whole model.

What is kept are the ⌊density·N⌋ changes (at least one) of largest magnitude, and those equal to the smallest of them.
The bits of |τ| as a float32, read as a whole number, are ordered like the magnitudes: below they are called patterns.
A sample of the model says about where the threshold lies; one pass counts how many patterns lie above a window there,
and each one inside. Where the window has missed the threshold, two more passes find it whatever the values are: one
counts the upper halves of the patterns, the other the lower halves of those whose upper half is the threshold's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from continual import linalg
from continual.lazily import Tensor, torch
from continual.lazily import numpy as np
from continual.rules.contract import Counts, Inputs, Pass

if TYPE_CHECKING:
    import numpy.typing as npt

SCOPES = ("model", "tensor")
SAMPLE = 1 / 16
_LOW = 16
_WIDTH = 1 << _LOW
_UPPER_HALVES = 1 << 15
"""Upper halves of patterns: the sign bit is always 0."""


class Threshold(NamedTuple):
    """The smallest magnitude that is kept."""

    value: float


def keep(density: float, numel: int) -> int:
    """How many of `numel` changes are kept."""
    return max(1, int(density * numel))


def own_threshold(tau: Tensor, density: float) -> float:
    """The smallest magnitude that is kept of one tensor alone."""
    numel = tau.numel()
    return float(tau.abs().flatten().kthvalue(numel - keep(density, numel) + 1).values) if numel else 0.0


def found_threshold(inputs: Inputs) -> float:
    """The smallest magnitude that is kept, as the passes over the model or the tensor found it."""
    assert isinstance(inputs.measured, Threshold), "measure first"
    return inputs.measured.value


def trimmed(tau: Tensor, threshold: float) -> Tensor:
    """τ where |τ| ≥ threshold, else 0."""
    # hardshrink keeps what is above, and costs a twentieth of a where
    return torch.nn.functional.hardshrink(tau, float(np.nextafter(np.float32(threshold), np.float32(0.0))))


@dataclass(frozen=True)
class Sampled(Pass):
    """The first pass: the upper halves of a sample's patterns. It says where the window of the next one begins."""

    density: float
    share = SAMPLE
    usual = SAMPLE + 1.0
    bins = _UPPER_HALVES

    def tally(self, tau: Tensor, inputs: Inputs, counts: Counts, times: int) -> None:
        _count(_patterns(tau) >> np.uint32(_LOW), counts, times)

    def conclude(self, counts: Counts, numel: int) -> Pass:
        wanted, at_least = keep(self.density, numel), _at_least(counts)
        half = int((at_least >= wanted).sum()) - 1
        if half < 0:
            return Window(self.density, 0)
        # the share of that half which is kept, from its top
        inside = (wanted - int(at_least[half] - counts[half])) / int(counts[half])
        middle = ((half + 1) << _LOW) - int(inside * _WIDTH)
        return Window(self.density, max(0, middle - _WIDTH // 2))


@dataclass(frozen=True)
class Window(Pass):
    """The second pass: each of the 2^16 patterns from `first` on, and in the last bin all those above."""

    density: float
    first: int
    share = 1.0
    usual = 1.0
    bins = _WIDTH + 1

    def tally(self, tau: Tensor, inputs: Inputs, counts: Counts, times: int) -> None:
        flat = tau.view(-1)
        for start in range(0, len(flat), linalg.PIECE):  # what is made of a piece stays in the cache
            bits = _patterns(flat[start : start + linalg.PIECE])
            bits -= np.uint32(self.first)  # what lies below wraps round to the largest
            _count(bits[np.flatnonzero(bits < _WIDTH)], counts, times)
            counts[_WIDTH] += times * np.count_nonzero(bits.view(np.int32) >= _WIDTH)

    def conclude(self, counts: Counts, numel: int) -> Threshold | Pass:
        wanted, at_least = keep(self.density, numel) - int(counts[_WIDTH]), _at_least(counts[:_WIDTH])
        if wanted <= 0 or (wanted > int(at_least[0]) and self.first > 0):
            return UpperHalves(self.density)
        return Threshold(_magnitude(self.first + max(0, int((at_least >= wanted).sum()) - 1)))


@dataclass(frozen=True)
class UpperHalves(Pass):
    """The third pass, where the window has missed: the upper halves of all patterns."""

    density: float
    share = 1.0
    usual = 2.0
    bins = _UPPER_HALVES

    def tally(self, tau: Tensor, inputs: Inputs, counts: Counts, times: int) -> None:
        _count(_patterns(tau) >> np.uint32(_LOW), counts, times)

    def conclude(self, counts: Counts, numel: int) -> Threshold | Pass:
        wanted, at_least = keep(self.density, numel), _at_least(counts)
        half = int((at_least >= wanted).sum()) - 1
        if half < 0:  # fewer changes than are kept: all the rest are zeros of tensors that the model does not change
            return Threshold(0.0)
        return LowerHalves(half, wanted - int(at_least[half] - counts[half]))


@dataclass(frozen=True)
class LowerHalves(Pass):
    """The last pass: the lower halves of the patterns with the upper half `upper`, of which the `wanted` largest are
    kept."""

    upper: int
    wanted: int
    share = 1.0
    usual = 1.0
    bins = _WIDTH

    def tally(self, tau: Tensor, inputs: Inputs, counts: Counts, times: int) -> None:
        bits = _patterns(tau)
        bits -= np.uint32(self.upper << _LOW)  # what has a smaller upper half wraps round to the largest
        _count(bits[np.flatnonzero(bits < _WIDTH)], counts, times)

    def conclude(self, counts: Counts, numel: int) -> Threshold:
        lower = int((_at_least(counts) >= self.wanted).sum()) - 1
        return Threshold(_magnitude(self.upper << _LOW | lower))


def _patterns(tau: Tensor) -> npt.NDArray[np.uint32]:
    """The bits of |τ|, in new memory."""
    return tau.numpy().view(np.uint32) & np.uint32(0x7FFFFFFF)


def _count(places: npt.NDArray[np.uint32], counts: Counts, times: int) -> None:
    """Adds `times` to the counts at `places`."""
    if len(places) < _WIDTH // 8:  # for a short run all the bins would cost more than it does
        np.add.at(counts, places, times)
    else:
        found = np.bincount(places)
        found *= times
        counts[: len(found)] += found


def _at_least(counts: Counts) -> Counts:
    """Of each bin, how many are in it or above."""
    return counts[::-1].cumsum()[::-1]


def _magnitude(pattern: int) -> float:
    return float(np.uint32(pattern).view(np.float32))
