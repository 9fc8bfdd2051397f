"""Candidates that wait, without a state: a pool at a fixed time, and options of a round over it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from continual.config import RoundSettings
from continual.objectives.wanted_losses import Wanted
from continual.selection.round_options import DAY, RoundOptions
from continual.state.entries import DeferEntry
from continual.state.format import Commit
from continual.state.ledger import Waiting
from continual.state.parts import RowFate
from tests.helpers.entries import candidate, row

NOW = "2030-01-31T12:00:00.000Z"


def options(**changes: Any) -> RoundOptions:
    given = {"patience": 3, "age": 10 * DAY, "most": 3, "size": 4, "wait": 100.0}
    return RoundOptions.of(RoundSettings.model_validate(given | changes), Wanted("tests.helpers.quadratic:make"))


OPTIONS = options()


def ago(seconds: float) -> str:
    moment = datetime.fromisoformat(NOW) - timedelta(seconds=seconds)
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def waiting(seconds: float = 0.0, rounds: int = 0, *, seen: bool = False, fate: RowFate = "deferred") -> Waiting:
    time = ago(seconds)
    commit = Commit(1, None, "", None, None, time, DeferEntry(candidate=candidate("n")))
    return Waiting(commit, time, rounds, row("n", fate, 1) if seen or rounds else None)


def pool(*found: Waiting) -> dict[str, Waiting]:
    return {f"k{i}": w for i, w in enumerate(found)}
