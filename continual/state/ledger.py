"""The commit log in memory: what is in force at each record, and every candidate's fate. Pure: replayed from the records, one step each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from continual.errors import Misconfigured
from continual.records import Entry
from continual.state.records import Commit


class Fold(NamedTuple):
    """A fold in force and the one before it: the history of a record is a chain that shares its tail with all later ones.

    `at` is the record whose generation and totals are those of the history up to here; None where there never was one, as in the middle of a combined state.
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
    return [dataclasses.replace(commit, entry=Entry(kind="fold", fate="folded", **fold)) for fold in (commit.entry.numbers or {})["folds"]]


MODEL = ("fold", "rollback", "unfold", "combine", "tune")
"""Kinds of records after which the merged model is another one."""


class Ledger:
    """An index over the records so far; `add` takes the next one."""

    def __init__(self) -> None:
        self.log: list[Commit] = []
        self.tags: dict[str, int] = {}
        self._history: list[Fold | None] = []
        self._read: list[Mapping[str, Any]] = []
        self._fates: dict[str, Commit | None] = {}
        self._digests: dict[str, Commit] = {}
        self.model: Commit | None = None

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
        elif entry.kind == "rollback":
            now = self._rolled_back(now, (entry.numbers or {})["to"])
        elif entry.kind == "tag":
            numbers = entry.numbers or {}
            self.tags[numbers["tag"]] = numbers["of"]
        if key is not None:
            self._fates[key] = commit if entry.kind in ("fold", "refuse", "unfold") else None
        if entry.kind in MODEL and (self.model or entry.kind != "tune"):
            self.model = commit
        self.log.append(commit)
        self._history.append(now)
        self._read.append(entry.read if entry.read is not None else self._read[-1] if self._read else {})

    def _rolled_back(self, now: Fold | None, to: int) -> Fold | None:
        target = self._history[to]
        kept = {same(fold.commit) for fold in chain(target)}
        for fold in chain(now):
            if same(fold.commit) not in kept and fold.commit.entry.candidate:
                marked = dataclasses.replace(fold.commit, entry=dataclasses.replace(fold.commit.entry, fate="rolled-back"))
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
