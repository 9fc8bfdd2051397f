"""Relevance as a gate before any rule: a round says which of the candidates that wait the objective wants; the rule
folds these.

The round records which they are before the first is folded, so a round that was interrupted folds the same models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from continual.engine.engine import Engine
from continual.engine.outcomes import Outcome
from continual.errors import Refuse
from continual.executors.contract import Progress
from continual.selection.members import Member, opened_files
from continual.state.entries import RefuseEntry
from continual.state.ledger import Waiting
from continual.state.parts import Relevance


def pending(pool: Mapping[str, Waiting]) -> dict[str, Waiting]:
    """The candidates that a round chose and that are not folded yet, in the order in which they have to be."""
    chosen = {key: w.last for key, w in pool.items() if w.last is not None and w.last.fate == "chosen"}
    return {key: pool[key] for key in sorted(chosen, key=lambda key: chosen[key].rank or 0)}


def fold(engine: Engine, progress: Progress, hear: Callable[[Outcome], None]) -> list[Outcome]:
    """Folds what a round chose; `hear` is called with each outcome. Raises Retry and Halt; what is folded by then stays
    folded."""
    outcomes: list[Outcome] = []
    for waiting in pending(engine.state.ledger.pool).values():
        outcomes.append(_fold(engine, waiting, progress))
        hear(outcomes[-1])
    return outcomes


def _fold(engine: Engine, waiting: Waiting, progress: Progress) -> Outcome:
    member, row = Member(waiting.candidate), waiting.last
    assert row is not None, "a round chose it"
    chosen = Relevance(row.score, row.change, row.error, row.z, row.weight, row.merged)
    try:
        with opened_files(engine, member) as model:
            return engine.fold_chosen(model, chosen, progress)
    except Refuse as gone:  # it was there when it was chosen: what lies there now is another candidate
        return _expire(engine, member, gone)


def _expire(engine: Engine, member: Member, gone: Refuse) -> Outcome:
    entry = RefuseEntry(
        candidate=member.candidate,
        fate="expired",
        reason=gone.reason,
        message=str(gone),
    )
    return Outcome("refused", member.name, str(gone), gone.reason, engine.state.record(entry))
