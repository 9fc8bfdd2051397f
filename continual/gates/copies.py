"""Keeps out what is in the merge already: a copy of a model up to a factor, its negation, a merge of several."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from continual.errors import Refuse
from continual.gates.contract import AtNumbers, Doubt, Numbers
from continual.tensors.vectors import sketch as sketches

_NEAREST = 64
"""Models at most that one is compared with together: those whose cosine is largest."""


@dataclass(frozen=True)
class CopiesGate(AtNumbers, Doubt):
    """Refuses a task vector that what is in the merge explains, as sketches say it (tensors/vectors/sketch.py).

    `same`: the smallest cosine with one model, or with its negation, that makes it a copy, also where each layer may be
    another multiple of that model's, or none; fine-tunes of one task by one recipe have up to 0.86. `mixed`: the share
    of ‖τ‖² that a weighted sum of models in the merge may have; honest ones have up to 0.4, up to 0.89 where another
    of the same task is in the merge. An earlier revision of the candidate is no copy: the setting `updates` is about
    those.
    """

    name = "copies"
    reasons = ("copy", "negated", "mixture")

    same: float = 0.95
    mixed: float = 0.9

    def judge(self, seen: Numbers) -> None:
        """Raises Refuse: `copy`, `negated`, `mixture`."""
        if seen.sketch is None:
            return
        others = [one for one in seen.earlier() if one.tau_norm > 0 and not one.same_place]
        known = [(one, one.sketch) for one in others if one.sketch is not None]
        if not known:
            return
        cosines, layered = sketches.Alike.of(seen.sketch, [sketch for _, sketch in known])
        nearest = int(np.argmax(np.abs(cosines)))
        cosine, other = float(cosines[nearest]), known[nearest][0]
        if abs(cosine) >= self.same:
            ratio = seen.tau_norm / other.tau_norm
            what, of = ("copy", "a copy") if cosine > 0 else ("negated", "the negation")
            raise Refuse(
                what,
                f"{seen.name}: {of} of {other.name}, which is in the merge: its task vector is {ratio:.3g} times as "
                f"long, cosine {cosine:+.3f} (gates.copies.same = {self.same:g}); to give that model more weight, "
                "unfold it and fold it again with another --weight; to put this one in its place, unfold it first",
                by=("same",),
            )
        if layered[nearest := int(np.argmax(layered))] >= self.same:
            raise Refuse(
                "copy",
                f"{seen.name}: a copy of some layers of {known[nearest][0].name}, which is in the merge, or of all of "
                f"them, each times a number of its own: cosine {layered[nearest]:.3f} by layers (gates.copies.same = "
                f"{self.same:g})",
                by=("same",),
            )
        order = np.argsort(-np.abs(cosines))[:_NEAREST]
        share = sketches.explained(seen.sketch, [known[number][1] for number in order])
        if share >= self.mixed:
            names = ", ".join(known[number][0].name for number in order[:3])
            raise Refuse(
                "mixture",
                f"{seen.name}: a merge of models that are in this merge already, or trained on from one: a weighted "
                f"sum of them has {share:.0%} of its task vector (gates.copies.mixed = {self.mixed:g}); nearest: "
                f"{names}",
                by=("mixed",),
            )
