"""What the ledger keeps of a tuning, and how it is found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from continual.rules import ReadOptions
from continual.state import Commit, State
from continual.tuning.search import Trial


def row(trial: Trial, *, lower: bool) -> dict[str, Any]:
    """A trial with the score as the evaluation gave it."""
    lines = trial.options.lines
    return {
        "scale": trial.options.scale,
        "lines": list(lines) if lines else None,
        "score": -trial.score if lower else trial.score,
    }


def numbers(trials: Sequence[Trial], evaluation: Mapping[str, Any], seconds: float, folds: int) -> dict[str, Any]:
    """The `numbers` of a tune record: `before` is the first trial, which is how the merge was read until then."""
    rows = [row(trial, lower=bool(evaluation.get("lower"))) for trial in trials]
    return {"trials": rows, "before": rows[0], "evaluation": dict(evaluation), "seconds": seconds, "folds": folds}


def newest(state: State) -> Commit | None:
    """The newest tuning; None if there was none."""
    return next(
        (c for c in reversed(state.ledger.log) if c.entry.kind == "tune" and "trials" in (c.entry.numbers or {})), None
    )


def in_force(state: State) -> Commit | None:
    """The tuning that chose how the merge is read now; None if none did."""
    last = next(c for c in reversed(state.ledger.log) if c.entry.read is not None)
    of = (last.entry.numbers or {}).get("of")
    found = last if of is None else state.ledger.get(of)
    return found if "trials" in (found.entry.numbers or {}) else None


def chosen(commit: Commit) -> ReadOptions:
    """What a tuning chose."""
    assert commit.entry.read is not None
    return ReadOptions.from_mapping(commit.entry.read)
