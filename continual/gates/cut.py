"""Keeps out of a state of adapters what its width has no room for."""

from __future__ import annotations

from dataclasses import dataclass

from continual.errors import Refuse
from continual.gates.contract import AtNumbers, Numbers


@dataclass(frozen=True)
class CutGate(AtNumbers):
    """In a state that keeps adapters as they are, refuses one of which the width leaves too little: where a tensor was
    changed by more than a product of two thin factors (DoRA, IA³, a whole matrix), its task vector may have more
    directions than the state keeps. Thin factors are cut by the law of the width, whatever that takes of them.

    `most`: the largest share of ‖τ‖² that may be cut off so; at 0.01 what is folded is within a tenth of the length.
    """

    name = "cut"
    reasons = ("cut",)

    most: float = 0.01

    def judge(self, seen: Numbers) -> None:
        """Raises Refuse: `cut`."""
        if seen.cut > self.most:
            raise Refuse(
                "cut",
                f"{seen.name}: the width of this state has no room for {seen.cut:.2%} of the square of its task "
                f"vector, which is no product of thin factors; more than gates.cut.most = {self.most:g}: fold it "
                "into a state with a larger --width or one made without --adapters, or set a larger gates.cut.most",
                by=("most",),
            )
