"""Which models Frank-Wolfe weighs in a merged model, and with which weights. The ledger has them; the state itself
holds only their sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from continual.selection.members import Member
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
    members = {e.candidate.key: Member(e.candidate) for e in folds}
    norms = {e.candidate.key: e.numbers.tau_norm for e in folds}
    if not isinstance(newest, SelectEntry | UnfoldEntry):
        return Active({}, (), members, norms)
    return Active(newest.active or {}, newest.rest or (), members, norms)
