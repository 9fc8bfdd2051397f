"""The newest round, as the ledger has it."""

from __future__ import annotations

from continual.state import Commit, State


def last_round(state: State) -> Commit | None:
    """The record that ended the last round; None where there was none."""
    return next((c for c in reversed(state.ledger.log) if c.kind == "select"), None)
