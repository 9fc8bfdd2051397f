"""A state as it would be with one record more, to be read; nothing of it is recorded."""

from __future__ import annotations

from dataclasses import replace

from continual.engine.neighbours import accepted
from continual.engine.resources import Judge
from continual.errors import Refuse
from continual.records import Warned
from continual.state import Commit, State, Transaction
from continual.state.entries import FoldEntry
from continual.state.generation import Generation
from continual.state.ledger import Ledger


def staged(state: State, generation: Generation, entry: FoldEntry) -> State:
    """`state` with a record of `entry` more, which puts `generation` in force."""
    head = state.ledger.head
    commit = Commit(head.seq + 1, None, "", generation.directory.name, generation.checksum, head.time, entry)
    found = Ledger()
    for known in (*state.ledger.log, commit):
        found.add(known)
    return State(state.path, state.format, found, None, lambda _: None)


def without_folds(state: State) -> State:
    """`state` as it was when it was made: its merge is the base."""
    found = Ledger()
    found.add(state.ledger.get(0))
    return State(state.path, state.format, found, None, lambda _: None)


def judged(state: State, judge: Judge | None, transaction: Transaction, entry: FoldEntry) -> FoldEntry:
    """`entry` with what `judge` says of the merge as `transaction` wrote it. Raises Refuse where that is worse, unless
    a person accepted the candidate: then the entry has a warning. Raises what else `judge` raises."""
    if judge is None:
        return entry
    name, evaluated = entry.candidate.name, None
    try:
        evaluated, doubt = judge(staged(state, transaction.written(), entry), state, name)
        reason = "unclear"
    except Refuse as refusal:
        if not accepted(state.ledger, entry.candidate.key):
            raise
        reason, doubt = refusal.reason, str(refusal)
    more = () if doubt is None else (Warned("evaluation", reason, doubt),)
    warnings = (*(entry.numbers.warnings or ()), *more) or None
    return replace(entry, numbers=replace(entry.numbers, evaluated=evaluated, warnings=warnings))
