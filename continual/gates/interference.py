"""Says where a task vector works against the merge before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from continual.errors import Refuse
from continual.gates.contract import AtNumbers, Doubt, Numbers


@dataclass(frozen=True)
class InterferenceGate(AtNumbers, Doubt):
    """Doubts a task vector that points against the merge: one that was negated, or trained to undo what is there.

    `against`: minus the smallest cosine with the merge before it. Fine-tunes of one base point the same way a little,
    whatever their tasks: of 57 honest ones of the digits, folded one after the other, the smallest is -0.07 (beside one
    other), the next -0.02; of the negations of 14, twelve have less than -0.1. `act` is `warn`: to undo something may
    be what is wanted, and one that has nothing in common with the merge has 0, as has its negation
    (ops/docs/measured.md).
    """

    name = "interference"
    reasons = ("interference",)

    act: Literal["refuse", "warn", "off"] = "warn"
    against: float = 0.1

    def judge(self, seen: Numbers) -> None:
        """Raises Refuse: `interference`."""
        if seen.cosine is None or seen.cosine > -self.against:
            return
        worst = ""
        if seen.layer_cosines:
            least = min(seen.layer_cosines)
            group = list(seen.layer_cosines).index(least)
            worst = f"; most in layer group {group + 1} of {len(seen.layer_cosines)}, {least:+.3f}"
        raise Refuse(
            "interference",
            f"{seen.name}: points against the merge, cosine {seen.cosine:+.3f}{worst} (gates.interference.against = "
            f"{self.against:g}): it undoes what other models do, as one that was negated would; evaluate it, or let an "
            "[evaluation] look at each",
            by=("against",),
        )
