"""Which models a Frank-Wolfe merge weighs, and with which weights. The ledger has them; the state itself holds only
their sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from continual.selection.members import Member
from continual.state import State


class Active(NamedTuple):
    """What a weighted sum is made of. `weights`: by key, one weight or one for each layer. `rest`: the weights of what
    is in the sum and cannot be weighed any more, as many; empty where there is nothing of that. `members`: all models
    in the sum; `norms`: ‖τ‖ of each."""

    weights: Mapping[str, tuple[float, ...]]
    rest: tuple[float, ...]
    members: Mapping[str, Member]
    norms: Mapping[str, float]

    def body(self) -> dict[str, object]:
        """As `select` and `unfold` records hold it."""
        return {"active": {key: list(weights) for key, weights in self.weights.items()}, "rest": list(self.rest)}


NONE = Active({}, (), {}, {})
"""Nothing is weighed."""


def active_at(state: State, at: int | None = None) -> Active:
    """What the merged model of `state` weighs at record `at`, by default the newest. Raises Misconfigured where there
    is no such record."""
    history = state.ledger.history(at)
    numbers = (history[-1].at.entry.numbers or {}) if history and history[-1].at else {}
    folds = [fold.commit.entry for fold in history]
    members = {(e.candidate or {})["key"]: Member(e.candidate or {}) for e in folds}
    norms = {(e.candidate or {})["key"]: float((e.numbers or {})["tau_norm"]) for e in folds}
    weights = {key: tuple(float(w) for w in found) for key, found in numbers.get("active", {}).items()}
    return Active(weights, tuple(numbers.get("rest", ())), members, norms)
