"""What the ledger keeps of a tuning, and how it is found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from continual.rules import ReadOptions
from continual.state import Commit, State
from continual.tuning.search import Trial


class TrialRow(TypedDict):
    """A trial as a record has it, with the score as the evaluation gave it."""

    scale: str
    lines: list[float] | None
    score: float


class TuneNumbers(TypedDict):
    """The `numbers` of a tune record (FORMAT.md). `before` is the first trial: how the merged model was read until
    then. `folds` is how many models were folded then."""

    trials: list[TrialRow]
    before: TrialRow
    evaluation: dict[str, object]
    seconds: float
    folds: int


def row(trial: Trial, *, lower: bool) -> TrialRow:
    """A trial; `lower` where the evaluation's score is better where it is lower."""
    lines = trial.options.lines
    return {
        "scale": trial.options.scale,
        "lines": list(lines) if lines else None,
        "score": -trial.score if lower else trial.score,
    }


def numbers(trials: Sequence[Trial], evaluation: Mapping[str, object], seconds: float, folds: int) -> TuneNumbers:
    """The `numbers` of the record of a tuning that took so many seconds."""
    rows = [row(trial, lower=bool(evaluation.get("lower"))) for trial in trials]
    return {"trials": rows, "before": rows[0], "evaluation": dict(evaluation), "seconds": seconds, "folds": folds}


def newest(state: State) -> Commit | None:
    """The record of the newest tuning; None where there was none."""
    return next((c for c in reversed(state.ledger.log) if c.entry.kind == "tune" and _evaluated(c)), None)


def in_force(state: State) -> Commit | None:
    """The record of the tuning that chose how the merged model is read now; None where none did."""
    last = next(c for c in reversed(state.ledger.log) if c.entry.read is not None)
    of = (last.entry.numbers or {}).get("of")
    found = last if of is None else state.ledger.get(of)
    return found if _evaluated(found) else None


def chosen(commit: Commit) -> ReadOptions:
    """How the merged model is read by the record of a tuning."""
    assert commit.entry.read is not None
    return ReadOptions.from_mapping(commit.entry.read)


def _evaluated(commit: Commit) -> bool:
    """Whether a record is that of a tuning, which evaluated candidates: other `tune` records only set options."""
    return "trials" in (commit.entry.numbers or {})
