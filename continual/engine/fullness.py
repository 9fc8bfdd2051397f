"""How full a state of adapters is, and what of its adapters was cut off by now: from the small arrays of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from continual.engine.block_reading import StoredLayers
from continual.state import State


@dataclass(frozen=True, slots=True)
class Fullness:
    """`width`: how many singular triplets a layer can have; `used`: how many the fullest one has; `layers`: how many
    have any. `cut`: the share of the sum of all ‖τ‖² that was cut off by now; `models`: that of each model's own, by
    its number."""

    width: int
    used: int
    layers: int
    cut: float
    models: Mapping[int, float]


def fullness_of(state: State) -> Fullness | None:
    """Of the newest record, whose generation the caller keeps from expiring; None for a merge of whole tensors. Raises
    Misconfigured and Damaged."""
    if state.format.form is None:
        return None
    head = state.ledger.head
    folds = state.ledger.folds(head.seq)
    shelf = StoredLayers(state, head)
    used = [found for name in shelf.specs if (found := shelf.columns(name).used)]
    cut = shelf.cut(folds)
    squares = {fold.entry.numbers.block or 0: fold.entry.numbers.tau_norm**2 for fold in folds}
    whole, lost = math.fsum(squares.values()), math.fsum(square * cut[number] for number, square in squares.items())
    return Fullness(state.format.form.width, max(used, default=0), len(used), lost / whole if lost else 0.0, cut)
