"""The commit log in memory: what is in force at each record, and every candidate's fate. Pure: replayed from the records, one step each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from continual.errors import Misconfigured
from continual.state.records import Commit


class Fold(NamedTuple):
    """A fold in force and the one before it: the history of a record is a chain that shares its tail with all later ones."""

    commit: Commit
    before: Fold | None


def chain(fold: Fold | None) -> list[Commit]:
    """The folds of a history, oldest first."""
    found = []
    while fold is not None:
        found.append(fold.commit)
        fold = fold.before
    return found[::-1]


class Ledger:
    """An index over the records so far; `add` takes the next one."""

    def __init__(self) -> None:
        self.log: list[Commit] = []
        self.tags: dict[str, int] = {}
        self._history: list[Fold | None] = []
        self._read: list[Mapping[str, Any]] = []
        self._fates: dict[str, Commit | None] = {}
        self._digests: dict[str, Commit] = {}

    def add(self, commit: Commit) -> None:
        """Takes the next record."""
        entry = commit.entry
        now = self._history[-1] if self._history else None
        key = entry.candidate["key"] if entry.candidate else None
        if entry.kind == "fold":
            now = Fold(commit, now)
            if entry.digest:
                self._digests[entry.digest] = commit
        elif entry.kind == "rollback":
            now = self._rolled_back(now, (entry.numbers or {})["to"])
        elif entry.kind == "tag":
            numbers = entry.numbers or {}
            self.tags[numbers["tag"]] = numbers["of"]
        if key is not None:
            self._fates[key] = commit if entry.kind in ("fold", "refuse") else None
        self.log.append(commit)
        self._history.append(now)
        self._read.append(entry.read if entry.read is not None else self._read[-1] if self._read else {})

    def _rolled_back(self, now: Fold | None, to: int) -> Fold | None:
        target = self._history[to]
        kept = {c.seq for c in chain(target)}
        for commit in chain(now):
            if commit.seq not in kept and commit.entry.candidate:
                marked = dataclasses.replace(commit, entry=dataclasses.replace(commit.entry, fate="rolled-back"))
                self._fates[commit.entry.candidate["key"]] = marked
        self._digests = {}
        for commit in chain(target):
            if commit.entry.candidate:
                self._fates[commit.entry.candidate["key"]] = commit
            if commit.entry.digest:
                self._digests[commit.entry.digest] = commit
        return target

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
