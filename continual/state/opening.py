"""Opening a state: what a directory must hold to be one, or to become one, and its commit log, checked record by
record."""

from __future__ import annotations

import shutil
from pathlib import Path

from continual.errors import Damaged, Misconfigured
from continual.state import framing, protocol
from continual.state.format import Commit
from continual.state.ledger import Ledger
from continual.state.protocol import Head

DIRECTORIES = ("commits", "generations", "tags", "leases")
_READS = 50
"""How often the log is read again because a writer went on meanwhile."""


def unfinished(path: Path) -> bool | None:
    """Whether a directory without format.json is what a killed `create` leaves; None where there is no commit log at
    all."""
    commits = path / "commits"
    if not commits.is_dir():
        return None
    return sum(1 for _ in commits.iterdir()) <= 1 and not any((path / "generations").iterdir())


def must_be_free(path: Path) -> None:
    """Raises Misconfigured unless a state can be made in `path`; removes what a killed `create` left there."""
    if not path.exists():
        return
    found = (
        {p.name for p in path.iterdir() if p.name != "FORMAT.md" and not p.name.startswith(".")}
        if path.is_dir()
        else {path.name}
    )
    if found and not (
        found <= {*DIRECTORIES, "HEAD", "lock"} and (unfinished(path) or not (path / "commits").exists())
    ):
        raise Misconfigured(f"{path} is not empty: a state needs a directory of its own")
    if (path / "commits").exists():
        shutil.rmtree(path / "commits")
        (path / "HEAD").unlink(missing_ok=True)


def load(path: Path) -> Ledger:
    """Replays the commit log of the state in `path`, up to a record whose generation is there. Raises Damaged for a
    missing HEAD, record or generation in force, a gap, or a broken chain of checksums.

    A writer may go on meanwhile: then HEAD or the generation in force is older than what else is there, and all is read
    again.
    """
    for _ in range(_READS):
        head, names = protocol.read_head(path), _records(path)
        if len(names) > head.seq + 2:
            continue  # records were added between the two looks
        ledger = _replayed(path, head, names)
        held = ledger.head
        if held.generation is None or (path / "generations" / held.generation).exists():
            return ledger
        if len(_records(path)) == len(names):
            raise Damaged(
                f"{path / 'generations' / held.generation} is missing, and it is the generation in force; "
                "restore it from a backup"
            )
    raise Damaged(_missing(path, head, names))


def _records(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "commits").iterdir() if not file.name.startswith("."))


def _missing(path: Path, head: Head, names: list[str]) -> str:
    return (
        f"{path / 'commits'}: HEAD is at record {head.seq} and {len(names)} files are there: "
        "records are missing; restore from a backup"
    )


def _replayed(path: Path, head: Head, names: list[str]) -> Ledger:
    """The records in the files `names`, each of which must follow the one before it. Raises Damaged."""
    if names != [f"{seq:08d}.json" for seq in range(len(names))] or not head.seq < len(names):
        raise Damaged(_missing(path, head, names))
    ledger = Ledger()
    for seq, name in enumerate(names):
        file = path / "commits" / name
        body, checksum = framing.decode(file)
        commit = Commit.of(body, checksum, file)
        if commit.seq != seq or commit.prev != (ledger.head.crc if ledger.log else None):
            raise Damaged(
                f"{file} does not follow the record before it: the chain of checksums is broken; restore from a backup"
            )
        ledger.add(commit)
    if ledger.get(head.seq).crc != head.crc:
        raise Damaged(
            f"{path / 'HEAD'} names another record {head.seq} than the one in commits/: restore from a backup"
        )
    return ledger
