"""The ledger as a small drawing, as git draws its history: the newest first, a line that leads to what is in force, and
beside it what rollbacks left behind. Pure: a ledger in, lines of text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from continual.outside import counted, few
from continual.rules import ReadOptions
from continual.state import Commit
from continual.state.entries import (
    CloneEntry,
    CombineEntry,
    FoldEntry,
    ReleaseEntry,
    RepairEntry,
    RollbackEntry,
    SelectEntry,
    UnfoldEntry,
)
from continual.state.ledger import Ledger
from continual.state.refs import HEAD
from continual.texts import plain

WIDTH = 80
_ROOM = 24
"""Columns that the words of a record have at least, however many lines run beside it."""
_DRAWN = ("init", "fold", "rollback", "repair", "unfold", "combine", "tune", "inputs", "clone")


class GraphLines(NamedTuple):
    """The records that are drawn, oldest first, with the record that each follows; `anchors`: by the number of any
    record the drawn one that it is, or follows."""

    records: list[Commit]
    parents: dict[int, int | None]
    anchors: list[int]

    @classmethod
    def of(cls, ledger: Ledger) -> GraphLines:
        """All that changed the merge, or how it is read."""
        records: list[Commit] = []
        parents: dict[int, int | None] = {}
        anchors: list[int] = []
        for commit in ledger.log:
            before = anchors[-1] if anchors else None
            if commit.kind in ("rollback", "repair"):
                entry = commit.entry
                assert isinstance(entry, RollbackEntry | RepairEntry)
                before = anchors[entry.to]
            if before is None or _is_drawn(commit):
                records.append(commit)
                parents[commit.seq] = before
                anchors.append(commit.seq)
            else:
                anchors.append(before)
        return cls(records, parents, anchors)

    def line(self, seq: int) -> set[int]:
        """The records that lead to record `seq`."""
        found: set[int] = set()
        at: int | None = self.anchors[seq]
        while at is not None:
            found.add(at)
            at = self.parents[at]
        return found


def graph(ledger: Ledger, most: int = 0, width: int = WIDTH) -> list[str]:
    """The drawing, of the newest `most` records that changed the merge (0: all), at most `width` columns wide. `*`:
    what is in force; `o`: what is not any more, undone by a rollback or taken out."""
    drawn = GraphLines.of(ledger)
    line = drawn.line(ledger.head.seq)
    merged = {fold.seq for fold in ledger.folds()}
    shown = drawn.records[-most:] if most else drawn.records
    words = _references(ledger, drawn, shown[0].seq)
    columns: list[int] = []
    lines: list[str] = []
    for commit in reversed(shown):
        seq = commit.seq
        if seq not in columns:
            columns.append(seq)
        place = columns.index(seq)
        there = seq in line and (commit.kind != "fold" or seq in merged)
        marks = "".join(("* " if there else "o ") if at == place else "| " for at in range(len(columns)))
        lines.append(marks + _cut(_told(commit, words.get(seq, [])), max(_ROOM, width - len(marks))))
        before = drawn.parents[seq]
        if before in columns:
            low, high = sorted((place, columns.index(before)))
            lines.append(_joined(len(columns), low, high))
            columns[low] = before
            del columns[high]
        elif before is not None:
            columns[place] = before
    if len(shown) < len(drawn.records):
        lines.append("| " * len(columns) + f"({len(drawn.records) - len(shown)} earlier)")
    return lines


def _joined(count: int, low: int, high: int) -> str:
    """The line on which the column `high` runs into the column `low`, and those beyond it move one to the left."""
    marks = [" "] * (2 * count)
    for column in range(count):
        if column < high:
            marks[2 * column] = "|"
        else:
            marks[2 * column - 1] = "/"
    for between in range(2 * low + 1, 2 * high - 2, 2):
        marks[between] = "_"
    return "".join(marks).rstrip()


def _is_drawn(commit: Commit) -> bool:
    if commit.kind == "select":
        return commit.of_kind(SelectEntry).active is not None
    return commit.kind in _DRAWN


def _references(ledger: Ledger, drawn: GraphLines, first: int) -> Mapping[int, list[str]]:
    """What points at each record that is drawn, from record `first` on: HEAD, tags, releases."""
    found: dict[int, list[str]] = {drawn.anchors[ledger.head.seq]: [HEAD]}
    for tag, seq in sorted(ledger.tags.items()):
        found.setdefault(drawn.anchors[seq], []).append(tag)
    for commit in ledger.log[first:]:
        if commit.kind == "publish" and isinstance(commit.entry, ReleaseEntry):
            names = found.setdefault(drawn.anchors[commit.entry.of], [])
            if (said := f"released to {commit.entry.repo}") not in names:
                names.append(said)
    return found


def _told(commit: Commit, names: list[str]) -> str:
    """What a record is, on one line."""
    pointed = f" ({few(names, most=4)})" if names else ""
    return plain(f"{commit.seq} {commit.time[:10]}{pointed} {commit.kind} {_what(commit)}".rstrip())


def _what(commit: Commit) -> str:
    entry = commit.entry
    if isinstance(entry, FoldEntry):
        weight = entry.numbers.weight
        weighed = "" if weight is None or weight == 1.0 else f", weight {weight:.4g}"
        return f"{entry.candidate.name}: norm {entry.numbers.tau_norm:.4g}{weighed}"
    if isinstance(entry, UnfoldEntry):
        return f"{entry.candidate.name} (record {entry.of})"
    if isinstance(entry, RollbackEntry | RepairEntry):
        return f"to {entry.to}, {counted(entry.undone, 'fold')} undone"
    if isinstance(entry, CombineEntry):
        return f"with {counted(len(entry.folds), 'model')} of {entry.of[:8]}: " + few(
            fold.candidate.name for fold in entry.folds
        )
    if isinstance(entry, CloneEntry):
        return f"of {entry.of[:8]}"
    if commit.kind == "tune" and entry.read is not None:
        return f"scale {ReadOptions.from_mapping(entry.read)}"
    return entry.message or ""


def _cut(text: str, width: int) -> str:
    """`text` in as many columns of a terminal as there are; letters can take two."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"
