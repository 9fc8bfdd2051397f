"""The commit log in memory: what is in force at each record, and every candidate's fate. Pure: replayed from the
records, one step each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    """An index over the records so far; `add` takes the next one."""

    def __init__(self) -> None:
        self.log: list[Commit] = []
        self.tags: dict[str, int] = {}
        self._history: list[Fold | None] = []
        self._read: list[Mapping[str, Any]] = []
        self._fates: dict[str, Commit | None] = {}
        self._digests: dict[str, Commit] = {}
        self.models: list[Commit] = []
        self.pool: dict[str, Waiting] = {}
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
            self.tags[numbers["tag"]] = numbers["of"]
        if key is not None:
            self._fates[key] = commit if entry.kind in ("fold", "refuse", "unfold") else None
            self.pool.pop(key, None)
            if entry.kind == "defer":
                self.pool[key] = Waiting(commit, commit.time)
        if entry.kind == "refuse":
            self.refusals.append(commit)
        wrote = entry.kind == "select" and commit.generation != self.log[-1].generation
        if wrote or (entry.kind in MODEL and (self.model or entry.kind != "tune")):
            self.models.append(commit)
        self.log.append(commit)
        self._history.append(now)
        self._read.append(entry.read if entry.read is not None else self._read[-1] if self._read else {})

    @property
    def model(self) -> Commit | None:
        """The newest record that made the merged model another one."""
        return self.models[-1] if self.models else None

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
                self.pool[candidate["key"]] = Waiting(fold, fold.time)
        if "active" in numbers:
            brought = of_combined(commit) if numbers.get("folds") else []
            now = None
            for fold in [f for f in folds if (f.entry.candidate or {}).get("key") not in out] + brought:
                now = Fold(fold, None, now)
            now = now and now._replace(at=commit)
            for fold in brought:
                self._settle(fold)
        for row in numbers.get("scores", ()):
            waiting = self.pool.get(row["key"])
            if waiting is None:
                continue
            if row["fate"] in ("deferred", "chosen"):
                self.pool[row["key"]] = waiting._replace(rounds=waiting.rounds + row["judged"], last=row)
            elif row["fate"] in ("refused", "expired"):
                del self.pool[row["key"]]
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
            self.pool.pop(fold.entry.candidate["key"], None)
        if fold.entry.digest:
            self._digests[fold.entry.digest] = fold

    def get(self, seq: int) -> Commit:
        """Record `seq`. Raises Misconfigured if there is none."""
        if not 0 <= seq < len(self.log):
            raise Misconfigured(f"no record {seq}: the newest is {len(self.log) - 1}")
        return self.log[seq]

    def history(self, seq: int) -> Fold | None:
        """The last fold in force at record `seq`."""
        self.get(seq)
        return self._history[seq]

    def read_options(self, seq: int) -> Mapping[str, Any]:
        """The read-time options in force at record `seq`."""
        self.get(seq)
        return self._read[seq]

    def fate(self, key: str) -> Commit | None:
        """The record that settled a candidate; None if it was never seen, is deferred, or is to be looked at again."""
        return self._fates.get(key)

    def folded_digest(self, digest: str) -> Commit | None:
        """The fold in force of a model with this content."""
        return self._digests.get(digest)
