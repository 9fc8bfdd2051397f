"""The commit protocol from the record on: temporary record, fsync, link, fsync of the directory, HEAD. Also what is
made up for after an error or a kill: the acknowledgement of records above HEAD. FORMAT.md names the steps.

The generation is not written here (see transaction.py), and nothing is read here but HEAD (see opening.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from continual.errors import Damaged, Halt, Retry
from continual.state import excerpts, framing, predecessors, storing
from continual.state.durable import environment, trouble
from continual.state.entries import Entry, TagEntry
from continual.state.fields import body_of, record_of
from continual.state.format import Commit
from continual.state.holding import Lock
from continual.state.ledger import Ledger
from continual.state.software import software
from continual.state.storing import Creating
from continual.stores import Where

OnStep = Callable[[str], None]
"""Is called with the name of each step of the protocol as it begins, and with `acknowledged` at the end."""
_log = logging.getLogger("continual.state")


class Held(NamedTuple):
    """What a record holds: a generation and the CRC of its receipts.json; two None where it holds nothing."""

    generation: str | None = None
    receipts: str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What the file HEAD says: the last acknowledged record and its CRC."""

    seq: int
    crc: str


def read_head(path: Where) -> Head:
    """The last acknowledged record of the state in `path`. Raises Damaged and Retry."""
    return record_of(Head, framing.decode(path / "HEAD")[0], path / "HEAD")


class Journal:
    """Adds records to the ledger of the state in `path`, which this process has locked.

    A record that is on disk stands, whatever fails afterwards: `append` returns it, and `behind` says what is still to
    be done. Nothing more is written before that is.
    """

    def __init__(self, path: Where, ledger: Ledger, on_step: OnStep, lock: Lock | None) -> None:
        self.path = path
        self.ledger = ledger
        self._lock = lock
        self.behind: str | None = None
        """What could not be done for records that stand, in words; None where all is done."""
        self._on_step = on_step
        self._first: int | None = None  # the first record that is not acknowledged
        self._halted: Halt | None = None

    def append(self, entry: Entry, held: Held) -> Commit:
        """Makes a record of `entry` and adds it to the ledger. On disk when it returns; where only HEAD or the file of
        a tag could not be written after it, the log has a line about that, and the next write makes up for it first.

        Raises Retry if the disk or another writer got in the way before the record stood, Refuse for a text that no
        record can hold, Damaged where an earlier record that it goes by cannot be read; then nothing is settled. Raises
        Halt if an fsync failed, or an object store did not say whether the record stands, and from then on always.
        """
        self.mend()
        ledger = self.ledger
        for known in predecessors.goes_by(ledger, entry):
            _ = known.entry  # read now, if it was not yet
        last = ledger.log[-1] if ledger.log else None
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = dataclasses.replace(entry, software=software())
        commit = Commit(last.seq + 1 if last else 0, last.crc if last else None, "", *held, time, entry)
        data, checksum = framing.encode(commit.body())
        commit = dataclasses.replace(commit, crc=checksum)
        file = self.path / "commits" / f"{commit.seq:08d}.json"
        with environment("cannot write the record"), storing.creating(file, data, self._on_step) as new:
            self._halting(lambda: self._make(new))
            # the commit point is passed: whatever fails from here on, the record stands
            self._first = commit.seq
            ledger.add(commit)
            self._on_step("fsync-commits")
            self._halting(new.sync)
        self._on_step("head")
        self._acknowledge()
        self._on_step("acknowledged")
        return commit

    def must_hold(self) -> None:
        """Raises Halt where another process may write by now."""
        assert self._lock is not None, "who has no lock writes nothing"
        self._lock.must_hold()

    def mend(self) -> None:
        """Does what is still to be done for records that stand. Raises Retry where it cannot be done now, Halt where an
        fsync failed before."""
        if self._halted is not None:
            raise self._halted
        if self._first is None:
            return
        self._halting(self.must_hold)
        with environment("what an earlier write left undone has to be done first"):
            storing.sync(self.path / "commits")
            self._complete(self._first)
        _log.warning("%s: record %d is acknowledged now", self.path, self.ledger.head.seq)

    def settle(self, acknowledged: int) -> None:
        """Completes what the last writer left: all of the ledger stands, and HEAD names record `acknowledged`. The file
        of a tag may be missing if its record is the newest that HEAD names, or newer. Raises Retry and Halt."""
        with environment(f"cannot open {self.path} for writing"):
            storing.sync(self.path / "commits")
            if acknowledged != self.ledger.head.seq:
                write_head(self.path, self.ledger.head)
            self._write_tags(acknowledged, missing=True)
        excerpts.renew(self.path, self.ledger.log)
        with contextlib.suppress(OSError):  # found again at the next open
            storing.clear_temporaries(self.path)

    def _make(self, new: Creating) -> None:
        """Has the record stand. Where another writer was first, and none may be, this one stops: what it knows of the
        ledger is old."""
        try:
            new.make(self.must_hold)
        except Retry as error:
            raise Halt(f"{error}; another process writes to {self.path}: start again once it is done") from None

    def _halting(self, work: Callable[[], None]) -> None:
        """Does something after whose failure nothing more may be written: what stands is unknown."""
        try:
            work()
        except Halt as error:
            self._halted = error
            raise

    def _acknowledge(self) -> None:
        """Acknowledges the newest record, which is on disk. An OSError is told, and kept for `mend`."""
        assert self._first is not None
        newest = self.ledger.head.seq
        try:
            self._complete(self._first)
        except OSError as error:
            self.behind = (
                f"record {newest} is committed, and what follows it could not be written: {trouble(error)}; "
                "the next write begins with that"
            )
            _log.warning("%s", self.behind)
        except Halt as error:
            self._halted = Halt(f"record {newest} is committed, and then: {error}")
            raise self._halted from error

    def _complete(self, first: int) -> None:
        """Writes HEAD, then the files of the tags among the records from `first` on. Raises OSError and Halt."""
        write_head(self.path, self.ledger.head)
        self._write_tags(first)
        self.behind = self._first = None
        log = self.ledger.log
        for end in range(first + 1, len(log) + 1):
            if end % excerpts.SPAN == 0:
                excerpts.write(self.path, log[end - excerpts.SPAN : end])

    def _write_tags(self, first: int, *, missing: bool = False) -> None:
        """The files of the tags among the records from `first` on; with `missing` only those that do not stand. Raises
        OSError, Retry of `missing` alone, and Halt."""
        for commit in self.ledger.log[first:]:
            if commit.kind != "tag":
                continue
            entry = commit.of_kind(TagEntry)
            if self.ledger.tags.get(entry.tag) != entry.of:
                continue
            with contextlib.suppress(Damaged):  # an altered file is for `verify` to report
                if missing and tag_stands(self.path, entry.tag, entry.of):
                    continue
                write_tag(self.path, entry.tag, entry.of)


def tag_stands(path: Where, name: str, seq: int) -> bool:
    """Whether the file of a tag is there and names record `seq`. Raises Damaged if it is there and was altered."""
    file = _tag_file(path, name)
    return file.exists() and framing.decode(file)[0] == {"tag": name, "seq": seq}


def write_tag(path: Where, name: str, seq: int) -> None:
    """Writes the file of a tag. Raises OSError and Halt."""
    storing.replace(_tag_file(path, name), framing.encode({"tag": name, "seq": seq})[0])


def write_head(path: Where, commit: Commit) -> None:
    """Has HEAD name `commit`. Raises OSError and Halt."""
    storing.replace(path / "HEAD", framing.encode(body_of(Head(commit.seq, commit.crc)))[0])


def _tag_file(path: Where, name: str) -> Where:
    return path / "tags" / f"{name}.json"
