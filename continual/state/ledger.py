"""The commit log in memory: what is in force at each record, and every candidate's fate. Pure: replayed from the
records, one step each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from continual.errors import Misconfigured
from continual.records import Entry
from continual.state.format import Commit


class Fold(NamedTuple):
    """A fold in force and the one before it: the history of a record is a chain that shares its tail with all later
    ones.

    `at` is the record whose generation and totals are those of the history up to here; None where there never was one,
    as in the middle of a combined state.
    """

    commit: Commit
    at: Commit | None
    before: Fold | None


def chain(fold: Fold | None) -> list[Fold]:
    """The folds of a history, oldest first."""
    found = []
    while fold is not None:
        found.append(fold)
        fold = fold.before
    return found[::-1]


def same(commit: Commit) -> tuple[int, str]:
    """What tells folds apart: the record, and for those that came with another state in one record the candidate."""
    return commit.seq, (commit.entry.candidate or {}).get("key", "")


def of_combined(commit: Commit) -> list[Commit]:
    """The folds that a `combine` record brought, each as if it were a record of its own."""
    return [
        dataclasses.replace(commit, entry=Entry(kind="fold", fate="folded", **fold))
        for fold in (commit.entry.numbers or {})["folds"]
    ]


MODEL = ("fold", "rollback", "unfold", "combine", "tune")
"""Kinds of records after which the merged model is another one; a `select` is one where it wrote a generation."""


class Waiting(NamedTuple):
    """A candidate in the pool: the record that has its identity, when it was first seen, how many rounds judged it, and
    what the last of them said of it."""

    commit: Commit
    since: str
    rounds: int = 0
    last: Mapping[str, Any] = MappingProxyType({})


class Ledger:
    """Every question about the history of a state, answered from memory; `add` takes the next record.

    `log` has every record, oldest first; `models` those that made the merged model another one; `refusals` what was
    refused, duplicates and what expired included (a candidate that a round refused has the number of its record);
    `open_round` the round that was begun and has not ended. Nobody but `add` changes them.
    """

    def __init__(self) -> None:
        self.log: list[Commit] = []
        self._tags: dict[str, int] = {}
        self._history: list[Fold | None] = []
        self._read: list[Mapping[str, Any]] = []
        self._fates: dict[str, Commit | None] = {}
        self._digests: dict[str, Commit] = {}
        self.models: list[Commit] = []
        self._pool: dict[str, Waiting] = {}
        self.open_round: Commit | None = None
        self.refusals: list[Commit] = []

    def add(self, commit: Commit) -> None:
        """Takes the next record."""
        entry = commit.entry
        now = self._history[-1] if self._history else None
        key = entry.candidate["key"] if entry.candidate else None
        if entry.kind in ("fold", "combine"):
            folds = [commit] if entry.kind == "fold" else of_combined(commit)
            for fold in folds:
                now = Fold(fold, commit if fold is folds[-1] else None, now)
                self._settle(fold)
        elif entry.kind == "unfold":
            now = self._without(now, commit)
        elif entry.kind == "round":
            self.open_round = commit
        elif entry.kind == "select":
            self.open_round = None
            now = self._selected(now, commit)
        elif entry.kind == "rollback":
            now = self._rolled_back(now, (entry.numbers or {})["to"])
        elif entry.kind == "tag":
            numbers = entry.numbers or {}
            self._tags[numbers["tag"]] = numbers["of"]
        if key is not None:
            self._fates[key] = commit if entry.kind in ("fold", "refuse", "unfold") else None
            self._pool.pop(key, None)
            if entry.kind == "defer":
                self._pool[key] = Waiting(commit, commit.time)
        if entry.kind == "refuse":
            self.refusals.append(commit)
        wrote = entry.kind == "select" and commit.generation != self.log[-1].generation
        if wrote or (entry.kind in MODEL and (self.model or entry.kind != "tune")):
            self.models.append(commit)
        self.log.append(commit)
        self._history.append(now)
        self._read.append(entry.read if entry.read is not None else self._read[-1] if self._read else {})

    def _selected(self, now: Fold | None, commit: Commit) -> Fold | None:
        """The history after a round: without the models it left out, with those it brought, all of them read from its
        generation; and its members' fates."""
        numbers = commit.entry.numbers or {}
        out = set(numbers.get("out", ()))
        folds = [fold.commit for fold in chain(now)]
        for fold in folds:
            candidate = fold.entry.candidate or {}
            if candidate.get("key") in out:
                self._digests.pop(fold.entry.digest or "", None)
                self._fates[candidate["key"]] = None
                self._pool[candidate["key"]] = Waiting(fold, fold.time)
        if "active" in numbers:
            brought = of_combined(commit) if numbers.get("folds") else []
            now = None
            for fold in [f for f in folds if (f.entry.candidate or {}).get("key") not in out] + brought:
                now = Fold(fold, None, now)
            now = now and now._replace(at=commit)
            for fold in brought:
                self._settle(fold)
        for row in numbers.get("scores", ()):
            waiting = self._pool.get(row["key"])
            if waiting is None:
                continue
            if row["fate"] in ("deferred", "chosen"):
                self._pool[row["key"]] = waiting._replace(rounds=waiting.rounds + row["judged"], last=row)
            elif row["fate"] in ("refused", "expired"):
                del self._pool[row["key"]]
                said = {"fate": row["fate"], "reason": row["reason"], "message": row["message"]}
                refusal = Entry(kind="refuse", candidate=waiting.commit.entry.candidate, **said)
                self.refusals.append(dataclasses.replace(commit, entry=refusal))
                self._fates[row["key"]] = self.refusals[-1]
        return now

    def _rolled_back(self, now: Fold | None, to: int) -> Fold | None:
        target = self._history[to]
        kept = {same(fold.commit) for fold in chain(target)}
        for fold in chain(now):
            if same(fold.commit) not in kept and fold.commit.entry.candidate:
                marked = dataclasses.replace(
                    fold.commit, entry=dataclasses.replace(fold.commit.entry, fate="rolled-back")
                )
                self._fates[fold.commit.entry.candidate["key"]] = marked
        self._digests = {}
        for fold in chain(target):
            self._settle(fold.commit)
        return target

    def _without(self, now: Fold | None, commit: Commit) -> Fold | None:
        """The history without the fold that the record `commit` took out; up to its place it is as it was."""
        numbers = commit.entry.numbers or {}
        gone = (numbers["of"], numbers["key"])
        folds = chain(now)
        place = next(i for i, fold in enumerate(folds) if same(fold.commit) == gone)
        self._digests.pop(folds[place].commit.entry.digest or "", None)
        left = folds[place].before
        for fold in folds[place + 1 :]:
            left = Fold(fold.commit, None, left)
        return left and left._replace(at=commit)

    def _settle(self, fold: Commit) -> None:
        if fold.entry.candidate:
            self._fates[fold.entry.candidate["key"]] = fold
            self._pool.pop(fold.entry.candidate["key"], None)
        if fold.entry.digest:
            self._digests[fold.entry.digest] = fold

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

    def folds(self, at: int | None = None) -> list[Commit]:
        """The records of the folds in force now, or at record `at`, oldest first. A fold that came with another state
        has the number of the record that combined the two. Raises Misconfigured if there is no such record."""
        return [fold.commit for fold in self.history(at)]

    def undone(self, to: int) -> list[Commit]:
        """The folds in force now that are not in force at record `to`: those that a rollback to it undoes, oldest
        first. Raises Misconfigured if there is no such record."""
        kept = {same(commit) for commit in self.folds(to)}
        return [commit for commit in self.folds() if same(commit) not in kept]

    def kept_out(self, word: str) -> list[Commit]:
        """The records that settled the candidates that `word` names (a name, path, key or record number) and that are
        not in the merge. Of a repo it is the newest commit that was seen, unless `word` is a key or a record number."""
        latest: dict[str, Commit] = {}
        path = str(Path(word).absolute())
        for commit in self.log:
            candidate = commit.entry.candidate
            if not candidate:
                continue
            exact = word in (candidate["key"], str(commit.seq))
            if not exact and word != candidate["name"] and candidate["origin"] not in (word, path):
                continue
            fate = self.fate(candidate["key"])
            if fate is not None and fate.entry.fate != "folded":
                of_repo = candidate.get("revision") is not None and not exact
                latest[candidate["origin"] if of_repo else candidate["key"]] = fate
        return list(latest.values())

    def revisions(self, origin: str) -> list[Commit]:
        """The folds in force of candidates that came from `origin`, oldest first."""
        return [c for c in self.folds() if c.entry.candidate and c.entry.candidate["origin"] == origin]

    @property
    def totals(self) -> Mapping[str, float]:
        """The rule's totals in force now; empty before the first fold."""
        return self.totals_at(self.head.seq)

    def totals_at(self, seq: int) -> Mapping[str, float]:
        """The rule's totals that were in force at record `seq`. Raises Misconfigured if there is no such record."""
        fold = self.last_fold(seq)
        return (fold.at.entry.totals or {}) if fold and fold.at else {}

    def read_options(self, seq: int) -> Mapping[str, Any]:
        """The read-time options in force at record `seq`. Raises Misconfigured if there is no such record."""
        self.get(seq)
        return self._read[seq]

    def fate(self, key: str) -> Commit | None:
        """The record that settled the candidate `key`; its entry's fate is `rolled-back` where a rollback undid it.
        None if the candidate was never seen, is deferred, or is to be looked at again."""
        return self._fates.get(key)

    def is_settled(self, key: str) -> bool:
        """Whether the candidate `key` need not be looked at: its fate is settled, or it waits in the pool."""
        return self._fates.get(key) is not None or key in self._pool

    def retried(self) -> list[Mapping[str, Any]]:
        """The candidates, as their records name them, that somebody asked to look at again and that are not settled
        since."""
        asked = {
            c.entry.candidate["key"]: c.entry.candidate
            for c in self.log
            if c.entry.kind == "retry" and c.entry.candidate
        }
        return [candidate for key, candidate in asked.items() if not self.is_settled(key)]

    def folded_digest(self, digest: str) -> Commit | None:
        """The fold in force of a model with this content digest."""
        return self._digests.get(digest)
