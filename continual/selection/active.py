"""Which models a Frank-Wolfe merge weighs, as its newest record has it. Kept in the ledger; the merge itself only knows
their sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from continual.selection.members import Member
from continual.state import State


class Active(NamedTuple):
    """`weights`: by key, one weight or one for each layer. `rest`: the weights of what is in the merge and cannot be
    weighed any more, empty where nothing is. `members`: all models in the merge; `norms`: ‖τ‖ of each."""

    weights: Mapping[str, tuple[float, ...]]
    rest: tuple[float, ...]
    members: Mapping[str, Member]
    norms: Mapping[str, float]

    def body(self) -> dict[str, Any]:
        """As a `select` record holds it."""
        return {"active": {key: list(weights) for key, weights in self.weights.items()}, "rest": list(self.rest)}


NONE = Active({}, (), {}, {})
"""A merge that nobody weighs."""


def active(state: State, at: int | None = None) -> Active:
    """What the merge of `state` weighs at record `at`, default: now."""
    history = state.ledger.history(at)
    numbers = (history[-1].at.entry.numbers or {}) if history and history[-1].at else {}
    folds = [fold.commit.entry for fold in history]
    members = {(e.candidate or {})["key"]: Member(e.candidate or {}) for e in folds}
    norms = {(e.candidate or {})["key"]: float((e.numbers or {})["tau_norm"]) for e in folds}
    weights = {key: tuple(float(w) for w in found) for key, found in numbers.get("active", {}).items()}
    return Active(weights, tuple(numbers.get("rest", ())), members, norms)
