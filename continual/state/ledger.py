"""The commit log in memory: what is in force at each record, and every candidate's fate. Pure: replayed from the
records, one step each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from continual.errors import Misconfigured
from continual.records import Candidate, Totals
from continual.state.entries import (
    CloneEntry,
    CombineEntry,
    FoldEntry,
    RefuseEntry,
    RepairEntry,
    RollbackEntry,
    RoundEntry,
    SelectEntry,
    TagEntry,
    UnfoldEntry,
)
from continual.state.format import Commit, FoldCommit
from continual.state.parts import BroughtFold, MemberFate


class Fold(NamedTuple):
    """A fold in force and the one before it: the history of a record is a chain that shares its tail with all later
    ones.

    `at` is the record whose generation and totals are those of the history up to here; None where there never was one,
    as in the middle of a combined state.
    """

    commit: FoldCommit
    at: Commit | None
    before: Fold | None


def chain(fold: Fold | None) -> list[Fold]:
    """The folds of a history, oldest first."""
    found = []
    while fold is not None:
        found.append(fold)
        fold = fold.before
    return found[::-1]


def same(commit: FoldCommit) -> tuple[int, str]:
    """What tells folds apart: the record, and for those that came with another state in one record the candidate."""
    return commit.seq, commit.key or ""


def folded(commit: Commit) -> FoldCommit:
    """The record of a fold as such: the same, where it is known that it is one."""
    return commit if isinstance(commit, FoldCommit) else FoldCommit.at(commit, commit.of_kind(FoldEntry))


def brought(commit: Commit, folds: Iterable[BroughtFold]) -> list[FoldCommit]:
    """The folds that one record brought, each as if it were a record of its own."""
    return [
        FoldCommit.at(commit, FoldEntry(candidate=fold.candidate, digest=fold.digest, numbers=fold.numbers))
        for fold in folds
    ]


SHORT = ("fold", "refuse", "defer", "retry", "publish")
"""Kinds of which an excerpt of the ledger says all that `add` asks for. Records of the others are few."""
MODEL = ("fold", "rollback", "repair", "unfold", "combine", "tune", "inputs")
"""Kinds of records after which the merged model is another one; a `select` is one where it has weights."""


class Waiting(NamedTuple):
    """A candidate in the pool: the record that has it, when it was first seen, how many rounds judged it, and what the
    last of them said of it."""

    commit: Commit
    since: str
    rounds: int = 0
    last: MemberFate | None = None

    @property
    def candidate(self) -> Candidate:
        """The candidate."""
        assert self.commit.entry.candidate is not None
        return self.commit.entry.candidate


class RolledBack(NamedTuple):
    """The fate of a candidate whose fold a rollback took out: its record is read when somebody asks for it."""

    fold: FoldCommit


def refused(candidate: Candidate, row: MemberFate) -> RefuseEntry:
    """What a round said of a member that it refused, or that expired, as if it were a record of its own."""
    assert row.fate in ("refused", "expired")
    return RefuseEntry(
        candidate=candidate, fate=row.fate, reason=row.reason, message=row.message, settings=row.settings
    )


class InForce:
    """The folds in force, found by what was folded and by where it came from."""

    def __init__(self) -> None:
        self._digests: dict[str, FoldCommit] = {}
        self._origins: dict[str, list[FoldCommit]] = {}

    def add(self, fold: FoldCommit) -> None:
        """Takes a fold, the newest."""
        if fold.digest:
            self._digests[fold.digest] = fold
        self._origins.setdefault(fold.origin or "", []).append(fold)

    def remove(self, fold: FoldCommit) -> None:
        """Gives up a fold."""
        self._digests.pop(fold.digest or "", None)
        there = self._origins[fold.origin or ""]
        there[:] = [other for other in there if same(other) != same(fold)]

    def of_digest(self, digest: str) -> FoldCommit | None:
        """The fold of a model with this content digest."""
        return self._digests.get(digest)

    def of_origin(self, origin: str) -> list[FoldCommit]:
        """The folds of candidates that came from there, oldest first."""
        return list(self._origins.get(origin, ()))


class Ledger:
    """Every question about the history of a state, answered from memory; `add` takes the next record.

    `log` has every record, oldest first; `generations` the first record that holds each generation, in the order in
    which they were held last; `models` the records that made the merged model another one; `refusals` what was
    refused, duplicates and what expired included (a candidate that a round refused has the number of its record);
    `open_round` the round that was begun and has not ended; `id` is that of a clone, and
    `cloned` has the ids of the states that it has models of, the oldest first. Nobody but `add` changes them.
    """

    def __init__(self) -> None:
        self.log: list[Commit] = []
        self._tags: dict[str, int] = {}
        self._history: list[Fold | None] = []
        self._read: list[Mapping[str, object]] = []
        self._fates: dict[str, Commit | RolledBack | None] = {}
        self._asked: dict[str, Commit] = {}
        self._in_force = InForce()
        self.generations: dict[str, Commit] = {}
        self.models: list[Commit] = []
        self._pool: dict[str, Waiting] = {}
        self.open_round: Commit | None = None
        self.refusals: list[Commit] = []
        self.id: str | None = None
        self.cloned: tuple[str, ...] = ()

    def add(self, commit: Commit) -> None:
        """Takes the next record, which must follow the others (predecessors.py). Of a short kind its entry is not asked
        for."""
        now = self._history[-1] if self._history else None
        if commit.kind == "fold":
            now = self._added(now, commit, [folded(commit)])
        elif commit.kind not in SHORT:
            now = self._changed(now, commit)
        self._seen(commit)
        weighed = commit.kind == "select" and commit.of_kind(SelectEntry).active is not None
        if weighed or (commit.kind in MODEL and (self.models or commit.kind not in ("tune", "inputs", "repair"))):
            self.models.append(commit)
        held = commit.generation
        if held is not None and (not self.log or held != self.head.generation):
            self.generations[held] = self.generations.pop(held, commit)
        self.log.append(commit)
        self._history.append(now)
        self._read.append(commit.read if commit.read is not None else self._read[-1] if self._read else {})

    def _changed(self, now: Fold | None, commit: Commit) -> Fold | None:
        """The history after a record of a kind that is not short."""
        entry = commit.entry
        if isinstance(entry, CombineEntry):
            now = self._added(now, commit, brought(commit, entry.folds))
        elif isinstance(entry, UnfoldEntry):
            now = self._without(now, commit, entry)
        elif isinstance(entry, RoundEntry):
            self.open_round = commit
        elif isinstance(entry, SelectEntry):
            self.open_round = None
            now = self._selected(now, commit, entry)
        elif isinstance(entry, RollbackEntry | RepairEntry):
            now = self._rolled_back(now, entry.to)
            for tag in entry.tags if isinstance(entry, RepairEntry) else ():
                self._tags.pop(tag, None)
        elif isinstance(entry, TagEntry):
            self._tags[entry.tag] = entry.of
        elif isinstance(entry, CloneEntry):
            self.id, self.cloned = entry.id, (*self.cloned, entry.of) if now else ()
        return now

    def _seen(self, commit: Commit) -> None:
        """The fate of the candidate that a record is about, and whether it waits."""
        if commit.kind == "refuse":
            self.refusals.append(commit)
        if (key := commit.key) is None:
            return
        if commit.kind in ("refuse", "retry"):
            self._asked[key] = commit
        if commit.kind != "fold":  # of a fold it is settled with its history
            self._fates[key] = commit if commit.kind in ("refuse", "unfold") else None
        self._pool.pop(key, None)
        if commit.kind == "defer":
            self._pool[key] = Waiting(commit, commit.time)

    def _added(self, now: Fold | None, commit: Commit, folds: Sequence[FoldCommit]) -> Fold | None:
        """The history with what a record brought: its generation holds all of them."""
        for fold in folds:
            now = Fold(fold, commit if fold is folds[-1] else None, now)
            self._settle(fold)
        return now

    def _selected(self, now: Fold | None, commit: Commit, entry: SelectEntry) -> Fold | None:
        """The history after a round: without the models it left out, with those it brought, all of them read from its
        generation; and its members' fates."""
        out = set(entry.out or ())
        folds = [fold.commit for fold in chain(now)]
        for fold in folds:
            if (key := fold.key) is not None and key in out:
                self._in_force.remove(fold)
                self._fates[key] = None
                self._pool[key] = Waiting(fold, fold.time)
        if entry.active is not None:
            new = brought(commit, entry.folds or ())
            now = None
            for fold in [f for f in folds if f.key not in out] + new:
                now = Fold(fold, None, now)
            now = now and now._replace(at=commit)
            for fold in new:
                self._settle(fold)
        for row in entry.scores:
            self._judged(row, commit)
        return now

    def _judged(self, row: MemberFate, commit: Commit) -> None:
        """What a round said of a member: it waits on, or is settled."""
        waiting = self._pool.get(row.key)
        if waiting is None:
            return
        if row.fate in ("deferred", "chosen"):
            self._pool[row.key] = waiting._replace(rounds=waiting.rounds + row.judged, last=row)
        elif row.fate == "refused" or row.fate == "expired":
            del self._pool[row.key]
            self.refusals.append(dataclasses.replace(commit, entry=refused(waiting.candidate, row)))
            self._fates[row.key] = self.refusals[-1]

    def _rolled_back(self, now: Fold | None, to: int) -> Fold | None:
        target = self._history[to]
        kept = {same(fold.commit) for fold in chain(target)}
        for fold in chain(now):
            if same(fold.commit) not in kept:
                self._fates[fold.commit.key or ""] = RolledBack(fold.commit)
        self._in_force = InForce()
        for fold in chain(target):
            self._settle(fold.commit)
        return target

    def _without(self, now: Fold | None, commit: Commit, entry: UnfoldEntry) -> Fold | None:
        """The history without the fold that the record `commit` took out; up to its index it is as it was."""
        folds = chain(now)
        index = next(i for i, fold in enumerate(folds) if same(fold.commit) == (entry.of, entry.key))
        self._in_force.remove(folds[index].commit)
        left = folds[index].before
        for fold in folds[index + 1 :]:
            left = Fold(fold.commit, None, left)
        return left and left._replace(at=commit)

    def _settle(self, fold: FoldCommit) -> None:
        key = fold.key or ""
        self._fates[key] = fold
        self._pool.pop(key, None)
        self._in_force.add(fold)

    @property
    def head(self) -> Commit:
        """The newest record."""
        return self.log[-1]

    @property
    def model(self) -> Commit | None:
        """The newest record that made the merged model another one, None before the first fold."""
        return self.models[-1] if self.models else None

    @property
    def pool(self) -> dict[str, Waiting]:
        """The candidates that wait for a round, by key, in the order in which they came: a copy."""
        return dict(self._pool)

    @property
    def tags(self) -> dict[str, int]:
        """The tags and the number of the record that each of them names: a copy."""
        return dict(self._tags)

    def get(self, seq: int) -> Commit:
        """Record `seq`. Raises Misconfigured if there is none."""
        if not 0 <= seq < len(self.log):
            raise Misconfigured(f"no record {seq}: the newest is {len(self.log) - 1}")
        return self.log[seq]

    def last_fold(self, seq: int) -> Fold | None:
        """The newest of the folds in force at record `seq`, which leads to those before it. Raises Misconfigured if
        there is no such record."""
        self.get(seq)
        return self._history[seq]

    def history(self, at: int | None = None) -> list[Fold]:
        """The folds in force now, or at record `at`, oldest first; each has the record whose generation holds it and
        all folds before it, if there is one. Raises Misconfigured if there is no such record."""
        return chain(self.last_fold(self.head.seq if at is None else at))

    def folds(self, at: int | None = None) -> list[FoldCommit]:
        """The records of the folds in force now, or at record `at`, oldest first. A fold that came with another state
        has the number of the record that combined the two. Raises Misconfigured if there is no such record."""
        return [fold.commit for fold in self.history(at)]

    def undone(self, to: int) -> list[FoldCommit]:
        """The folds in force now that are not in force at record `to`: those that a rollback to it undoes, oldest
        first. Raises Misconfigured if there is no such record."""
        kept = {same(commit) for commit in self.folds(to)}
        return [commit for commit in self.folds() if same(commit) not in kept]

    def revisions(self, origin: str) -> list[FoldCommit]:
        """The folds in force of candidates that came from `origin`, oldest first."""
        return self._in_force.of_origin(origin)

    @property
    def totals(self) -> Totals:
        """The rule's totals in force now."""
        return self.totals_at(self.head.seq)

    def totals_at(self, seq: int) -> Totals:
        """The rule's totals that were in force at record `seq`. Raises Misconfigured if there is no such record."""
        fold = self.last_fold(seq)
        return (fold.at.entry.totals if fold and fold.at else None) or Totals()

    def read_options(self, seq: int) -> Mapping[str, object]:
        """The read-time options in force at record `seq`. Raises Misconfigured if there is no such record."""
        self.get(seq)
        return self._read[seq]

    def fate(self, key: str) -> Commit | None:
        """The record that settled the candidate `key`; its entry's fate is `rolled-back` where a rollback undid it.
        None if the candidate was never seen, is deferred, or is to be looked at again."""
        found = self._fates.get(key)
        if isinstance(found, RolledBack):
            entry = dataclasses.replace(found.fold.entry, fate="rolled-back")
            found = self._fates[key] = FoldCommit.at(found.fold, entry)
        return found

    def is_settled(self, key: str) -> bool:
        """Whether the candidate `key` need not be looked at: its fate is settled, or it waits in the pool."""
        return self._fates.get(key) is not None or key in self._pool

    def asked(self, key: str) -> Commit | None:
        """The newest record by which the candidate `key` was refused by itself, or is to be looked at again."""
        return self._asked.get(key)

    def retried(self) -> list[Candidate]:
        """The candidates, as their records name them, that somebody asked to look at again and that are not settled
        since."""
        asked = {c.entry.candidate.key: c.entry.candidate for c in self.log if c.kind == "retry" and c.entry.candidate}
        return [candidate for key, candidate in asked.items() if not self.is_settled(key)]

    def folded_digest(self, digest: str) -> FoldCommit | None:
        """The fold in force of a model with this content digest."""
        return self._in_force.of_digest(digest)


def weights_at(ledger: Ledger, seq: int | None = None) -> Mapping[str, tuple[float, ...]] | None:
    """The weights of the models in force now, or at record `seq`, by key, as rounds found them: one of each, or one for
    each layer. None where no round weighs. Raises Misconfigured if there is no such record."""
    fold = ledger.last_fold(ledger.head.seq if seq is None else seq)
    entry = fold.at.entry if fold and fold.at else None
    return entry.active if isinstance(entry, SelectEntry | UnfoldEntry) else None


def kept_out(ledger: Ledger, word: str) -> list[Commit]:
    """The records that settled the candidates that `word` names (a name, path, key or record number) and that are
    not in the merge. Of a repo it is the newest commit that was seen, unless `word` is a key or a record number."""
    latest: dict[str, Commit] = {}
    for commit in ledger.log:
        candidate = commit.entry.candidate
        if candidate is None:
            continue
        exact = word in (candidate.key, str(commit.seq))
        if not exact and not candidate.answers(word):
            continue
        fate = ledger.fate(candidate.key)
        if fate is not None and fate.entry.fate != "folded":
            of_repo = candidate.revision is not None and not exact
            latest[candidate.origin if of_repo else candidate.key] = fate
    return list(latest.values())
