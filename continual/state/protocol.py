"""The commit protocol from the record on: temporary record, fsync, link, fsync of the directory, HEAD. Also what a
writer completes when it opens a state whose last writer died. FORMAT.md names the steps.

The generation is not written here (see transaction.py), and nothing is read here but HEAD (see opening.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from continual.errors import Damaged
from continual.state import framing
from continual.state.durable import environment, link_new, replace_bytes, sync_file, write_temporary
from continual.state.entries import Entry, TagEntry
from continual.state.fields import body_of, record_of
from continual.state.format import Commit
from continual.state.ledger import Ledger
from continual.state.software import software

OnStep = Callable[[str], None]
"""Is called with the name of each step of the protocol as it begins, and with `acknowledged` at the end."""


class Held(NamedTuple):
    """What a record holds: a generation and the CRC of its receipts.json; two None where it holds nothing."""

    generation: str | None = None
    receipts: str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What the file HEAD says: the last acknowledged record and its CRC."""

    seq: int
    crc: str


def read_head(path: Path) -> Head:
    """The last acknowledged record of the state in `path`. Raises Damaged."""
    return record_of(Head, framing.decode(path / "HEAD")[0], path / "HEAD")


def append(path: Path, ledger: Ledger, entry: Entry, held: Held, on_step: OnStep) -> Commit:
    """Makes a record of `entry` in the state in `path` and adds it to `ledger`. On disk when it returns.

    Raises Retry if the disk or another writer got in the way, Halt if an fsync failed. If `ledger` has the record
    although this raised, the record stands: only its acknowledgement failed, and the next open completes that.
    """
    last = ledger.log[-1] if ledger.log else None
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    entry = dataclasses.replace(entry, software=software())
    commit = Commit(last.seq + 1 if last else 0, last.crc if last else None, "", *held, time, entry)
    data, checksum = framing.encode(commit.body())
    commit = dataclasses.replace(commit, crc=checksum)
    file = path / "commits" / f"{commit.seq:08d}.json"
    with environment("cannot write the record"):
        on_step("temp-commit")
        temporary = write_temporary(file, data)
        on_step("link")
        link_new(file, temporary)
    # the commit point is passed: whatever fails from here on, the record stands and the next open completes it
    ledger.add(commit)
    on_step("fsync-commits")
    sync_file(file.parent)
    on_step("head")
    with environment(f"record {commit.seq} is committed, but HEAD could not be written"):
        _write_head(path, commit)
    on_step("acknowledged")
    return commit


def settle(path: Path, ledger: Ledger) -> None:
    """Completes the commit that was in flight when the last writer died, the file of a tag included, and removes the
    temporary files it left."""
    sync_file(path / "commits")
    if read_head(path).seq != ledger.head.seq:
        _write_head(path, ledger.head)
    entry = ledger.head.entry
    if isinstance(entry, TagEntry):
        with contextlib.suppress(Damaged):  # an altered file is for `verify` to report
            if not tag_stands(path, entry.tag, entry.of):
                write_tag(path, entry.tag, entry.of)
    for leftover in (*path.glob(".*.tmp"), *path.glob("*/.*.tmp")):
        leftover.unlink(missing_ok=True)


def write_tag(path: Path, name: str, seq: int) -> None:
    """Writes the file of a tag, whose record stands already. Raises Retry if the disk gets in the way."""
    with environment(f"cannot write tag {name}"):
        replace_bytes(_tag_file(path, name), framing.encode({"tag": name, "seq": seq})[0])


def tag_stands(path: Path, name: str, seq: int) -> bool:
    """Whether the file of a tag is there and names record `seq`. Raises Damaged if it is there and was altered."""
    file = _tag_file(path, name)
    return file.exists() and framing.decode(file)[0] == {"tag": name, "seq": seq}


def _tag_file(path: Path, name: str) -> Path:
    return path / "tags" / f"{name}.json"


def _write_head(path: Path, commit: Commit) -> None:
    replace_bytes(path / "HEAD", framing.encode(body_of(Head(commit.seq, commit.crc)))[0])
