"""Where a class of transformers has what a base's files hold: under the newest names, and with the experts packed."""

from __future__ import annotations

from functools import partial

from continual.objectives.parameters import Elsewhere, Spot
from continual.tensors.layouts.repacking import DOWN, FUSED, TRIPLES, UP, by_input, one_of
from continual.tensors.names.kinds import BaseModel
from continual.tensors.names.renaming import canonical, family_of


def elsewhere(base: BaseModel) -> Elsewhere:
    """For the class of this base."""
    config = base.checkpoint.config
    named = partial(canonical, family=family_of(config))
    return Elsewhere(named) if by_input(config) else Elsewhere(named, _spots)


def _spots(name: str, shape: tuple[int, ...]) -> list[Spot]:
    """Where the weight of one expert can lie: gate stands before up where they are packed in one parameter."""
    one = one_of(name)
    found: list[Spot] = []
    for gate, up, down in TRIPLES if one is not None and len(shape) == 2 else ():
        assert one is not None
        first = {gate: 0, up: shape[0]}.get(one.role)
        if first is not None:
            found.append(Spot(f"{one.head}.{FUSED}", one.number, first, first + shape[0]))
        if one.role in (up, down):
            role = UP if one.role == up else DOWN
            found.append(Spot(f"{one.head}.{role}", one.number, 0, shape[0]))
    return found
