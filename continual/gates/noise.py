"""Keeps out task vectors in which nothing was learned: random numbers, and what rounding leaves."""

from __future__ import annotations

from dataclasses import dataclass

from continual.errors import Refuse
from continual.gates.contract import AtNumbers, Doubt, Numbers


@dataclass(frozen=True)
class NoiseGate(AtNumbers, Doubt):
    """Refuses a task vector of whole matrices in which no direction stands out: Gaussian noise, the base after a
    quantisation or a conversion, a checkpoint whose training was lost in the rounding of its dtype.

    `least`: the largest squared singular value over that of noise of the same length, the median of some matrices
    (`Picture.stands_out`). Noise has 0.8 to 1, a base in int8, int4, NF4, FP8 or half precision 0.9 to 1.3; fine-tunes
    over two decades of learning rates, saved in bfloat16, have 3.8 and more. Matrices with a side below 64 and
    adapters are not looked at.
    """

    name = "noise"
    reasons = ("noise",)

    least: float = 1.6

    def judge(self, seen: Numbers) -> None:
        """Raises Refuse: `noise`."""
        if seen.stands_out is not None and seen.stands_out < self.least:
            raise Refuse(
                "noise",
                f"{seen.name}: no direction stands out of its task vector (largest singular value squared "
                f"{seen.stands_out:.2f} times that of noise, gates.noise.least = {self.least:g}): random numbers, or "
                "only rounding, as of a base that was quantised; publish the weights as they were trained",
                by=("least",),
            )
