"""What a record has to do with those before it: whether it follows them, and which of them it goes by. Nothing is
written here, and the ledger itself is in ledger.py."""

from __future__ import annotations

from collections.abc import Iterator

from continual.errors import Damaged
from continual.state.entries import (
    Entry,
    HookEntry,
    ReleaseEntry,
    RepairEntry,
    RetryEntry,
    RollbackEntry,
    ScaleEntry,
    SelectEntry,
    TagEntry,
    UnfoldEntry,
)
from continual.state.format import Commit
from continual.state.ledger import SHORT, Ledger, same


def must_follow(ledger: Ledger, commit: Commit, file: object) -> None:
    """Raises Damaged, naming the `file` of `commit`, unless it can be the record after the newest of `ledger`: its
    number and checksum are, and what it refers to is there. Afterwards the ledger can add it."""
    last = ledger.log[-1] if ledger.log else None
    if (commit.seq, commit.prev) != ((last.seq + 1, last.crc) if last else (0, None)):
        raise Damaged(
            f"{file} does not follow the record before it: the chain of checksums is broken; restore from a backup"
        )
    if (commit.kind == "init") != (last is None):
        raise Damaged(f"{file} does not fit the records before it: a state begins once; restore from a backup")
    if commit.kind not in SHORT and (lacks := _lacking(ledger, commit.entry)) is not None:
        raise Damaged(f"{file} does not fit the records before it: {lacks}; restore from a backup")


def _lacking(ledger: Ledger, entry: Entry) -> str | None:
    """What a record refers to that is not there; None where all of it is."""
    count = len(ledger.log)
    if isinstance(entry, RollbackEntry | RepairEntry) and not 0 <= entry.to < count:
        return f"it goes back to record {entry.to}"
    if isinstance(entry, TagEntry) and not 0 <= entry.of < count:
        return f"it names record {entry.of}"
    if isinstance(entry, UnfoldEntry) and (entry.of, entry.key) not in map(same, ledger.folds()):
        return f"it takes out {entry.key}, folded in record {entry.of}, which is not in the merge"
    return None


def goes_by(ledger: Ledger, entry: Entry) -> Iterator[Commit]:
    """The earlier records that a new record of `entry` goes by. They are read before it is written: one that is
    damaged must not be found out when the record stands. Raises Misconfigured where there is no such record."""
    if isinstance(entry, RollbackEntry | RepairEntry):
        yield from _back_to(ledger, entry.to)
    elif isinstance(entry, UnfoldEntry):
        out = entry.of, entry.key
        yield from (fold for fold in ledger.folds() if same(fold) == out)
        yield from map(ledger.get, (entry.of, *entry.again))
    elif isinstance(entry, SelectEntry):
        yield ledger.get(entry.of)
        out_of = set(entry.out or ())
        yield from (fold for fold in ledger.folds() if out_of and fold.key in out_of)
        pool = ledger.pool
        yield from (pool[row.key].commit for row in entry.scores if row.key in pool)
    elif isinstance(entry, TagEntry | ReleaseEntry | HookEntry | ScaleEntry):
        yield from () if entry.of is None else (ledger.get(entry.of),)
    elif isinstance(entry, RetryEntry) and (known := ledger.fate(entry.candidate.key)) is not None:
        yield known


def _back_to(ledger: Ledger, to: int) -> Iterator[Commit]:
    """What going back to a record goes by: that record, the folds that it undoes, and the record that has the totals of
    the merge there."""
    yield ledger.get(to)
    yield from ledger.undone(to)
    there = ledger.last_fold(to)
    if there is not None and there.at is not None:
        yield there.at
