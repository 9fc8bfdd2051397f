"""Opening a state: what a directory must hold to be one, or to become one, and its commit log, checked record by
record."""

from __future__ import annotations

import shutil
from pathlib import Path

from continual.errors import Damaged, Misconfigured
from continual.state import framing
from continual.state.format import Commit
from continual.state.generation import Generation
from continual.state.ledger import Ledger

DIRECTORIES = ("commits", "generations", "tags", "leases")
_READS = 50


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
    """Replays the commit log. Raises Damaged for a missing HEAD or record, a gap, or a broken chain."""
    for _ in range(_READS):
        head, _crc = framing.decode(path / "HEAD")
        found = sorted(p.name for p in (path / "commits").iterdir() if not p.name.startswith("."))
        if len(found) <= head["seq"] + 2:
            break  # else a writer went on between the two looks
    if found != [f"{i:08d}.json" for i in range(len(found))] or not head["seq"] < len(found) <= head["seq"] + 2:
        raise Damaged(
            f"{path / 'commits'}: HEAD is at record {head['seq']} and {len(found)} files are there: "
            "records are missing; restore from a backup"
        )
    ledger = Ledger()
    for seq, name in enumerate(found):
        place = path / "commits" / name
        body, checksum = framing.decode(place)
        commit = Commit.of(body, checksum, place)
        if commit.seq != seq or commit.prev != (ledger.log[-1].crc if ledger.log else None):
            raise Damaged(
                f"{place} does not follow the record before it: the chain of checksums is broken; restore from a backup"
            )
        ledger.add(commit)
    if ledger.log[head["seq"]].crc != head["crc"]:
        raise Damaged(
            f"{path / 'HEAD'} names another record {head['seq']} than the one in commits/: restore from a backup"
        )
    return ledger


def must_be_there(generation: Generation) -> None:
    """Raises Damaged if the generation in force is missing or not as it was written."""
    try:
        generation.load()
    except Misconfigured:
        raise Damaged(
            f"{generation.directory} is missing, and it is the generation in force; restore it from a backup"
        ) from None
