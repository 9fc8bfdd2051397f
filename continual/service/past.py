"""The past of a state, as the pages ask for it: which folds there were and what became of them, which records are about
a model. An index over the ledger that grows with it; how a fold or a model is told is for `recalling.py`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from continual.service.showing import model_id
from continual.service.web.recalled import RowsWanted
from continual.state import Commit, State
from continual.state.entries import CombineEntry, SelectEntry, UnfoldEntry
from continual.state.format import FoldCommit
from continual.state.ledger import Ledger, brought, folded, same

C = TypeVar("C", bound=Commit)


class PastRows(NamedTuple):
    """Rows of a list, the newest first; how many there are in all, and where the next page begins."""

    commits: Sequence[Commit]
    total: int
    before: int | None


class Past:
    """An index over the ledger of `state`. Safe from several threads; a look reads what was recorded since the last."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._lock = threading.Lock()
        self._ledger: Ledger | None = None
        self._begin()

    def _begin(self) -> None:
        self._seen = 0
        self._folds: list[FoldCommit] = []
        self._of: dict[str, list[Commit]] = {}
        self._last: dict[str, FoldCommit] = {}
        self._ended: dict[tuple[int, str], str] = {}
        self._standing: tuple[int, frozenset[tuple[int, str]]] = (-1, frozenset())

    @property
    def folds(self) -> Sequence[FoldCommit]:
        """Every fold that there was, whatever became of it, the oldest first."""
        self._catch_up()
        return self._folds

    @property
    def refusals(self) -> Sequence[Commit]:
        """Every refusal, the oldest first."""
        return self.state.ledger.refusals

    def of_model(self, identity: str) -> Sequence[Commit]:
        """The records about a model, the oldest first; none where no model has this id."""
        self._catch_up()
        return self._of.get(identity, ())

    def last_fold_of(self, identity: str) -> FoldCommit | None:
        """The newest fold of a model; None where it never was folded."""
        self._catch_up()
        return self._last.get(identity)

    def fold(self, seq: int, part: int) -> FoldCommit | None:
        """One of the folds of record `seq`; None where there is none."""
        at = self._place(seq)
        found = self.folds[at : at + part + 1] if at is not None else []
        return found[part] if len(found) > part and found[part].seq == seq else None

    def beside(self, fold: FoldCommit) -> tuple[int | None, int | None]:
        """The records of the folds before and after the record of this one."""
        folds = self.folds
        at = self._place(fold.seq)
        assert at is not None
        after = at
        while after < len(folds) and folds[after].seq == fold.seq:
            after += 1
        return folds[at - 1].seq if at else None, folds[after].seq if after < len(folds) else None

    def part(self, fold: FoldCommit) -> int:
        """Which of the folds of its record it is, from 0."""
        at = self._place(fold.seq) or 0
        return next((n for n, one in enumerate(self.folds[at:]) if same(one) == same(fold)), 0)

    def in_force(self) -> frozenset[tuple[int, str]]:
        """The folds in force now, as `same` tells them apart."""
        head, found = self._standing
        ledger = self.state.ledger
        if head != ledger.head.seq:
            head = ledger.head.seq
            found = frozenset(same(fold) for fold in ledger.folds(head))
            self._standing = head, found
        return found

    def fate(self, fold: FoldCommit) -> str:
        """What has become of a fold, in words."""
        self._catch_up()
        if same(fold) in self.in_force():
            return "in the merge"
        return self._ended.get(same(fold), "undone by going back")

    def wanted_folds(self, wanted: RowsWanted) -> PastRows:
        """The folds that are asked for."""
        return _found(self.folds, wanted)

    def wanted_refusals(self, wanted: RowsWanted) -> PastRows:
        """The refusals that are asked for."""
        return _found(self.refusals, wanted)

    def _place(self, seq: int) -> int | None:
        """Where the folds of a record begin."""
        folds = self.folds
        low, high = 0, len(folds)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if folds[middle].seq < seq else (low, middle)
        return low if low < len(folds) and folds[low].seq == seq else None

    def _catch_up(self) -> None:
        with self._lock:
            ledger = self.state.ledger
            if ledger is not self._ledger or len(ledger.log) < self._seen:
                self._ledger = ledger
                self._begin()
            for commit in ledger.log[self._seen :]:
                for fold in self._brought(commit):
                    self._folds.append(fold)
                    self._last[model_id(fold.key or "")] = fold
                    if fold.key is not None and fold.key != commit.key:
                        self._of.setdefault(model_id(fold.key), []).append(fold)
                if commit.key is not None:
                    self._of.setdefault(model_id(commit.key), []).append(commit)
                self._seen += 1

    def _brought(self, commit: Commit) -> Iterator[FoldCommit]:
        """The folds that a record brought; of those that it took out it is kept in mind."""
        if commit.kind == "fold":
            yield folded(commit)
        elif commit.kind in ("combine", "select", "unfold"):
            entry = commit.entry
            if isinstance(entry, UnfoldEntry):
                self._ended[entry.of, entry.key] = f"taken out in record {commit.seq}"
            if isinstance(entry, SelectEntry):
                out = set(entry.out or ())
                for fold in self._folds:
                    if fold.key in out:
                        self._ended[same(fold)] = f"left out by the round of record {commit.seq}"
            if isinstance(entry, CombineEntry | SelectEntry):
                yield from brought(commit, entry.folds or ())


def _found(commits: Sequence[C], wanted: RowsWanted) -> PastRows:
    """Rows whose place or key has the text; neither needs a record to be read."""
    text = wanted.search.casefold()
    rows: list[Commit] = []
    count, left = 0 if text else len(commits), False
    for commit in reversed(commits):
        if text and not any(text in (word or "").casefold() for word in (commit.origin, commit.key)):
            continue
        count += bool(text)
        if wanted.before is not None and commit.seq >= wanted.before:
            continue
        if len(rows) < wanted.limit or commit.seq == rows[-1].seq:  # what one record brought stays together
            rows.append(commit)
            continue
        left = True
        if not text:
            break
    return PastRows(rows, count, rows[-1].seq if left else None)
