"""Keeps out fine-tunes that were made unmergeable: their layers compute what they did, with weights that have nothing
to do with the base's any more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from continual.errors import Refuse
from continual.gates.contract import AtNumbers, Doubt, Numbers
from continual.tensors.vectors.products import FAR, STRANGE, HeadFigures

_KINDS = {"query-key": "queries and keys", "value-output": "values and outputs", "channels": "channels"}


@dataclass(frozen=True)
class UnmergeableGate(AtNumbers, Doubt):
    """Refuses a model whose paired matrices (queries and keys, values and outputs, what goes into a feed-forward layer
    and comes out) moved far from the base's while their products did not (MergeLock), and one whose heads or channels
    stand in another order.

    `ratio`: how many times farther the two matrices of a head may have moved than their product; honest fine-tunes have
    up to 0.8. `share`: of the heads of a layer, how many that may be so. `elsewhere`: the cosine of a head's product
    with that of another head of the base, and not its own, from which on it is that head. Adapters are not looked at.
    """

    name = "unmergeable"
    reasons = ("locked", "permuted")

    ratio: float = 1.3
    share: float = 0.1
    elsewhere: float = 0.7

    def judge(self, seen: Numbers) -> None:
        """Raises Refuse: `locked`, `permuted`; Retry."""
        if self.act == "off":
            return
        pairs = seen.paired()
        for pair in pairs:  # heads of a real model are alike enough for another's product to have moved less
            self._permuted(seen.name, pair)
        for pair in pairs:
            self._locked(seen.name, pair)

    def _locked(self, name: str, pair: HeadFigures) -> None:
        far = (pair.apart > FAR) & (pair.apart > self.ratio * pair.moved)
        if not far.any() or far.mean() <= self.share:
            return
        worst = int(np.argmax(np.where(far, pair.apart, 0.0)))
        raise Refuse(
            "locked",
            f"{name}: was made unmergeable: of the {_KINDS[pair.kind]} of {pair.where}, {int(far.sum())} of {len(far)} "
            f"{'' if pair.kind == 'channels' else 'heads '}moved from the base while their products did not (the "
            f"matrices of number {worst} by {pair.apart[worst]:.3g} of their length, the product by "
            f"{pair.moved[worst]:.2g} of its own; gates.unmergeable.ratio = {self.ratio:g}, "
            f"gates.unmergeable.share = {self.share:g}): an invertible matrix "
            "stands between the two; ask its publisher for the weights as they were trained",
            by=("ratio", "share"),
        )

    def _permuted(self, name: str, pair: HeadFigures) -> None:
        strange = np.abs(pair.alike) < STRANGE
        moved = [one for one in pair.elsewhere if one.there != one.here and one.alike >= self.elsewhere]
        if not moved or 2 * len(moved) < len(pair.elsewhere) or strange.mean() <= self.share:
            return
        what = "channels" if pair.kind == "channels" else "heads"
        said = ", ".join(f"{one.here} is the base's {one.there} (cosine {one.alike:.2f})" for one in moved[:3])
        raise Refuse(
            "permuted",
            f"{name}: the {what} of {pair.where} are permuted against the base's, as their "
            f"{'weights' if what == 'channels' else _KINDS[pair.kind]} say: number {said}; "
            f"{int(strange.sum())} of {len(strange)} are not in their place (gates.unmergeable.elsewhere = "
            f"{self.elsewhere:g}, gates.unmergeable.share = {self.share:g}): it cannot be "
            "merged so; put them back into the base's order",
            by=("elsewhere", "share"),
        )
