"""Keeps out weights that were rounded to 8 bits or fewer and written as floats again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from continual.errors import Refuse
from continual.gates.contract import AtNumbers, Doubt, Numbers


@dataclass(frozen=True)
class GridGate(AtNumbers, Doubt):
    """Refuses a model whose matrices lie on the grid of a quantisation on which the base's do not: the task vector then
    holds what rounding changed, in all directions, beside what was learned, if anything was.

    `matrices`: the share of those looked at (eight, by their first rows) that makes it so. A matrix with a side below
    64, and adapters, are not looked at. A model that was trained to lie on a grid is one for `act = warn`.
    """

    name = "grid"
    reasons = ("requantised",)

    matrices: float = 0.25

    def judge(self, seen: Numbers) -> None:
        """Raises Refuse (`requantised`)."""
        on = Counter(grid for grid in seen.grids if grid)
        if not on or on.total() < self.matrices * len(seen.grids):
            return
        (grid, _), *_ = on.most_common(1)
        raise Refuse(
            "requantised",
            f"{seen.name}: its weights lie on the grid of {grid} in {on.total()} of {len(seen.grids)} matrices that "
            "were looked at, and the base's do not: it was quantised and written as floats again, and what that "
            f"rounded would be merged (gates.grid.matrices = {self.matrices:g}); publish the weights as they were "
            "trained",
            by=("matrices",),
        )
