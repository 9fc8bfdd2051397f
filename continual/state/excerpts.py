"""Excerpts of the ledger: of each thousand records what is asked of all of them when a state is opened. A record that
an excerpt speaks of is read when somebody asks for the rest of it.

An excerpt follows from its records: one that is missing, damaged, or does not fit the chain of checksums is not
believed, its records are read, and the next writer makes it anew. FORMAT.md has its keys, and says what is checked
when.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from continual.errors import ContinualError, Damaged
from continual.state import framing, storing
from continual.state.entries import EntryKind
from continual.state.fields import body_of, record_of
from continual.state.format import Commit, FoldCommit
from continual.state.ledger import SHORT
from continual.state.storing import Stem
from continual.stores import Where

SPAN = 1000
"""Records that an excerpt is of."""
DIRECTORY = "excerpts"
_KINDS = frozenset(get_args(EntryKind))
_SHORT, _LONG = 2, 8
"""Cells of a row: of a record that is read at opening, and of one that is not."""
_log = logging.getLogger("continual.state")


@dataclass(frozen=True, slots=True)
class ExcerptRow:
    """What an excerpt says of a record: its CRC and kind; of short kinds also what it holds, its time, and key,
    origin and digest of its candidate. The rest of others is null."""

    crc: str
    kind: EntryKind
    generation: str | None = None
    receipts: str | None = None
    time: str | None = None
    key: str | None = None
    origin: str | None = None
    digest: str | None = None

    @property
    def short(self) -> bool:
        """Whether it says all that opening asks for."""
        return self.time is not None

    @classmethod
    def of(cls, commit: Commit) -> ExcerptRow:
        """Of a record."""
        if commit.kind not in SHORT or commit.read is not None:
            return cls(commit.crc, commit.kind)
        held = commit.generation, commit.receipts
        return cls(commit.crc, commit.kind, *held, commit.time, commit.key, commit.origin, commit.digest)


@dataclass(frozen=True, slots=True)
class ExcerptBody:
    """The file of an excerpt: `prev`, the CRC of the record before its first; a row for each record, each as a list in
    the order of the fields of `ExcerptRow`."""

    prev: str | None
    rows: tuple[object, ...]


class Sealed(FoldCommit):
    """A record as its excerpt has it; its file is read, and compared with the excerpt, when `entry` is first asked for.
    That raises Damaged where the file is not the record that the ledger has, Retry where it cannot be read now."""

    __slots__ = ("_commits", "row")
    row: ExcerptRow
    _commits: Stem

    def __init__(self, seq: int, prev: str | None, row: ExcerptRow, commits: Stem) -> None:
        put = object.__setattr__
        for name, value in (
            ("seq", seq),
            ("prev", prev),
            ("crc", row.crc),
            ("generation", row.generation),
            ("receipts", row.receipts),
            ("time", row.time),
            ("row", row),
            ("_commits", commits),
        ):
            put(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Is asked for what was not set: the entry, once."""
        if name != "entry":
            raise AttributeError(name)
        found = whole(self, self._commits).entry
        object.__setattr__(self, "entry", found)
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Commit) and self.body() == other.body() and self.crc == other.crc

    __hash__ = None  # type: ignore[assignment]

    @property
    def kind(self) -> EntryKind:
        """The kind of the record."""
        return self.row.kind

    @property
    def key(self) -> str | None:
        """The key of its candidate, where it is about one."""
        return self.row.key

    @property
    def origin(self) -> str | None:
        """Where its candidate came from."""
        return self.row.origin

    @property
    def digest(self) -> str | None:
        """The content digest of what was folded."""
        return self.row.digest

    @property
    def read(self) -> None:
        """Read-time options that it sets: none, as in every row of a short kind."""


def whole(commit: Sealed, commits: Stem) -> Commit:
    """The record in its file. Raises Damaged where that is not the record that its excerpt is of, Retry."""
    file = storing.below(commits, f"{commit.seq:08d}.json")
    found = Commit.of(*framing.decode(file), file)
    fits = (found.seq, found.prev) == (commit.seq, commit.prev)
    if fits and found.crc == commit.crc and ExcerptRow.of(found) == commit.row:
        return found
    excerpt = _file(storing.place(commits).parent, commit.seq // SPAN * SPAN)
    if (fits and found.crc == commit.crc) or _stands(commits, commit.seq, found):
        raise Damaged(
            f"{excerpt} is damaged: it says otherwise than {file}, which is whole; delete {excerpt}, and nothing is "
            "lost: the next command that writes makes it anew from the records"
        )
    if not fits:
        raise Damaged(
            f"{file} does not follow the record before it: it is record {found.seq} after one with the checksum "
            f"{found.prev}; restore it from a backup"
        )
    raise Damaged(f"{file} is another record {commit.seq} than the one in the ledger; restore it from a backup")


def _stands(commits: Stem, seq: int, found: Commit) -> bool:
    """Whether what was found as record `seq` fits the records before and after it, in their files."""

    def beside(other: int) -> Commit | None:
        file = storing.below(commits, f"{other:08d}.json")
        with contextlib.suppress(ContinualError):
            return Commit.of(*framing.decode(file), file)
        return None

    before, after = beside(seq - 1) if seq else None, beside(seq + 1)
    prev = before.crc if before is not None else None
    return found.seq == seq and found.prev == prev and after is not None and after.prev == found.crc


def believed(path: Where, last: int, crc: str, read: Callable[[int], Commit]) -> dict[int, Sealed]:
    """What excerpts say of the records up to `last`, which HEAD names by its `crc`: by their numbers, those of short
    kinds. Only excerpts that fit the chain are believed: the last CRC of each is the one that the record after it
    names, or HEAD. `read` reads a record. Raises Damaged and Retry as it does."""
    found: dict[int, Sealed] = {}
    count = (last + 1) // SPAN
    if not count:
        return found
    link = crc if last + 1 == count * SPAN else read(count * SPAN).prev
    commits = storing.stem(path / "commits")
    for first in reversed(range(0, count * SPAN, SPAN)):
        excerpt = _loaded(path, first)
        if excerpt is None or excerpt[1][-1].crc != link:
            link = read(first).prev
            continue
        link = prev = excerpt[0]
        for seq, row in enumerate(excerpt[1], first):
            if row.short:
                found[seq] = Sealed(seq, prev, row, commits)
            prev = row.crc
    return found


def _loaded(path: Where, first: int) -> tuple[str | None, list[ExcerptRow]] | None:
    """The excerpt of the records from `first` on; None where there is none that can be used."""
    with contextlib.suppress(ContinualError):
        file = _file(path, first)
        body = record_of(ExcerptBody, framing.decode(file)[0], file)
        rows = [row for cells in body.rows if (row := _row(cells)) is not None]
        if len(rows) == len(body.rows) == SPAN:
            return body.prev, rows
    return None


def _row(cells: object) -> ExcerptRow | None:
    """A row as its cells say; None for cells that are not those of a row."""
    if not isinstance(cells, list) or not all(type(cell) is str or cell is None for cell in cells):
        return None
    if len(cells) == _SHORT and cells[0] and cells[1] in _KINDS:
        return ExcerptRow(*cells)
    if len(cells) != _LONG or not cells[0] or cells[1] not in SHORT or cells[4] is None:
        return None
    # a fold holds a generation and is of a candidate, a digest included; so are others of one, but publications
    must = cells[2:] if cells[1] == "fold" else cells[5:7] if cells[1] != "publish" else ()
    return None if None in must else ExcerptRow(*cells)


def renew(path: Where, log: Sequence[Commit]) -> None:
    """Writes the excerpts of the whole thousands of `log`, all of which is acknowledged, that were not believed. Where
    the disk refuses it nothing is lost: the next writer does it."""
    for first in range(0, len(log) // SPAN * SPAN, SPAN):
        records = log[first : first + SPAN]
        if not any(isinstance(commit, Sealed) for commit in records):
            write(path, records)


def write(path: Where, records: Sequence[Commit]) -> None:
    """Writes the excerpt of these records, a whole thousand. It is not synced: what a power cut leaves of it has
    another CRC than its first line says."""
    file = _file(path, records[0].seq)
    rows = tuple([*_cells(ExcerptRow.of(commit))] for commit in records)
    try:
        file.parent.mkdir(exist_ok=True)
        storing.replace_unsynced(file, framing.encode(body_of(ExcerptBody(records[0].prev, rows)))[0])
    except OSError as error:
        _log.debug("%s was not written: %s", file, error)


def _cells(row: ExcerptRow) -> tuple[str | None, ...]:
    cells = (row.crc, row.kind, row.generation, row.receipts, row.time, row.key, row.origin, row.digest)
    return cells if row.short else cells[:2]


def finding(path: Where, log: Sequence[Commit], first: int) -> str | None:
    """What is wrong with the excerpt of the records from `first` on, where there is one. Reads none of them: that each
    is as its excerpt says is looked at where `whole` reads it."""
    file = _file(path, first)
    if not file.exists() or any(isinstance(commit, Sealed) for commit in log[first : first + SPAN]):
        return None
    found = _loaded(path, first)
    if found is not None and found[1] == [ExcerptRow.of(commit) for commit in log[first : first + SPAN]]:
        return None
    return f"{file} does not fit its records, and is not believed: the next writer makes it anew"


def _file(path: Where, first: int) -> Where:
    return path / DIRECTORY / f"{first:08d}.json"
