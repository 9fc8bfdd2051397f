"""Relevance as a gate before any rule: Frank-Wolfe, from the merge as it is, says which of the candidates that wait the
objective wants; the rule folds these.

Which they are is recorded before the first is folded, so that an interrupted round folds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from continual import provenance
from continual.engine.engine import Engine
from continual.engine.outcomes import Outcome
from continual.errors import Refuse
from continual.executors.contract import Progress
from continual.records import Entry
from continual.selection.members import Member, opened
from continual.state.ledger import Waiting


def pending(pool: Mapping[str, Waiting]) -> dict[str, Waiting]:
    """The candidates that a round has chosen and that are not folded yet, in the order in which they are to be."""
    found = {key: w for key, w in pool.items() if w.last.get("fate") == "chosen"}
    return dict(sorted(found.items(), key=lambda item: int(item[1].last["place"])))


def fold(engine: Engine, progress: Progress, told: Callable[[Outcome], None]) -> list[Outcome]:
    """Folds what a round has chosen. Raises Retry and Halt; what is folded by then stays folded."""
    outcomes = []
    for waiting in pending(engine.state.ledger.pool).values():
        candidate: Any = waiting.commit.entry.candidate
        member = Member(candidate)
        try:
            with opened(engine, member) as seen:
                place = seen.model.place
        except Refuse as gone:  # it was there when it was chosen: what lies there now is another candidate
            software = provenance.software()
            entry = Entry(
                kind="refuse",
                candidate=candidate,
                fate="expired",
                reason=gone.reason,
                message=str(gone),
                software=software,
            )
            outcomes.append(Outcome("refused", member.name, str(gone), gone.reason, engine.state.record(entry)))
            told(outcomes[-1])
            continue
        found = {key: waiting.last[key] for key in ("score", "change", "error", "z", "weight")}
        outcome = engine.fold(place, progress=progress, chosen={"relevance": found})
        told(outcome)
        outcomes.append(outcome)
    return outcomes
