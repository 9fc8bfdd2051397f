"""Which models Frank-Wolfe weighs in a merged model, and with which weights. The ledger has them; the state itself
holds only their sum, or, where it keeps adapters, each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from continual.engine.block_reading import StoredLayers
from continual.selection.members import Kept, Member
from continual.state import State
from continual.state.entries import SelectEntry, UnfoldEntry


class Active(NamedTuple):
    """What a weighted sum is made of. `weights`: by key, one weight or one for each layer. `rest`: the weights of what
    is in the sum and cannot be weighed any more, as many; empty where there is nothing of that. `members`: all models
    in the sum; `norms`: ‖τ‖ of each."""

    weights: Mapping[str, tuple[float, ...]]
    rest: tuple[float, ...]
    members: Mapping[str, Member]
    norms: Mapping[str, float]


NONE = Active({}, (), {}, {})
"""Nothing is weighed."""


def active_at(state: State, at: int | None = None) -> Active:
    """What the merged model of `state` weighs at record `at`, by default the newest. Raises Misconfigured where there
    is no such record."""
    history = state.ledger.history(at)
    newest = history[-1].at.entry if history and history[-1].at else None
    folds = [fold.commit.entry for fold in history]
    shelf = StoredLayers(state, state.ledger.head if at is None else state.ledger.get(at))
    by_key = {e.candidate.key: e for e in folds}
    members = {
        key: Member(e.candidate, kept=None if e.numbers.block is None else Kept(shelf, e.numbers.block))
        for key, e in by_key.items()
    }
    norms = {key: e.numbers.tau_norm for key, e in by_key.items()}
    if not isinstance(newest, SelectEntry | UnfoldEntry):
        return Active({}, (), members, norms)
    return Active(newest.active or {}, newest.rest or (), members, norms)
