"""How full a state of adapters is, and what of its adapters was cut off by now: from the small arrays of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from continual.engine.block_reading import StoredLayers
from continual.state import State

_NOTHING = 1e-9
"""A share of ‖τ‖² below which nothing was cut: the sums over the layers are rounded."""


@dataclass(frozen=True, slots=True)
class Fullness:
    """`width`: how many singular triplets a layer can have; `used`: how many the fullest one has; `layers`: how many
    have any. `cut`: the share of the sum of all ‖τ‖² that was cut off by now; `models`: that of each model's own, by
    its number among the blocks."""

    width: int
    used: int = 0
    layers: int = 0
    cut: float = 0.0
    models: Mapping[int, float] = field(default_factory=dict)


def fullness_of(state: State) -> Fullness | None:
    """Of the newest record, whose generation the caller keeps from expiring; None for a merge of whole tensors. Raises
    Misconfigured and Damaged."""
    if state.format.form is None:
        return None
    head = state.ledger.head
    shelf = StoredLayers(state, head)
    energies = {fold.entry.numbers.block or 0: fold.entry.numbers.tau_norm**2 for fold in state.ledger.folds(head.seq)}
    lost: dict[int, list[float]] = {number: [] for number in energies}
    seen: dict[int, list[float]] = {number: [] for number in energies}
    used = []
    for name in shelf.specs:
        columns = shelf.columns(name)
        used += [columns.used] if columns.used else []
        shares = columns.lost()
        for number, where in columns.models.items():
            energy = float(columns.energy[where.start])
            seen[number].append(energy)
            lost[number].append(shares[number] * energy)
    gone = {  # where a model has no column any more, nothing in the layer tells of it
        number: math.fsum(lost[number]) + max(0.0, energy - math.fsum(seen[number]))
        for number, energy in energies.items()
    }
    return Fullness(
        state.format.form.width,
        max(used, default=0),
        len(used),
        _share(math.fsum(gone.values()), math.fsum(energies.values())),
        {number: _share(gone[number], energy) for number, energy in energies.items()},
    )


def _share(part: float, whole: float) -> float:
    return part / whole if part > _NOTHING * whole else 0.0
