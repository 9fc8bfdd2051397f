"""What the ledger keeps of a tuning, and how it is found again."""

from __future__ import annotations

from continual.rules import ReadOptions
from continual.state import Commit, State
from continual.state.entries import ScaleEntry, TuneEntry
from continual.state.parts import TrialRecord
from continual.tuning.search import Trial


def row(trial: Trial, *, lower: bool) -> TrialRecord:
    """A trial; `lower` where the evaluation's score is better where it is lower."""
    score = -trial.score if lower else trial.score
    read = trial.options
    return TrialRecord(read.scale, read.lines or None, score, dict(read.weights) or None, trial.loss, trial.drift)


def newest(state: State) -> Commit | None:
    """The record of the newest tuning; None where there was none."""
    return next((c for c in reversed(state.ledger.log) if c.kind == "tune" and isinstance(c.entry, TuneEntry)), None)


def in_force(state: State) -> Commit | None:
    """The record of the tuning that chose how the merged model is read now; None where none did."""
    last = next(c for c in reversed(state.ledger.log) if c.read is not None)
    of = last.entry.of if isinstance(last.entry, ScaleEntry) else None
    found = last if of is None else state.ledger.get(of)
    return found if isinstance(found.entry, TuneEntry) else None


def chosen(commit: Commit) -> ReadOptions:
    """How the merged model is read by the record of a tuning."""
    assert commit.entry.read is not None
    return ReadOptions.from_mapping(commit.entry.read)
