"""Records above HEAD: which of them count, and what a writer makes durable before it acknowledges them. Also whether
format.json is the one that the ledger began with. FORMAT.md says what can lie above HEAD, and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from continual.errors import Damaged, Misconfigured
from continual.state import arrays, storing
from continual.state.durable import environment
from continual.state.entries import (
    CombineEntry,
    FoldEntry,
    InitEntry,
    InputsEntry,
    RepairEntry,
    RollbackEntry,
    SelectEntry,
    UnfoldEntry,
)
from continual.state.format import Commit, Format
from continual.state.generation import Generation
from continual.state.ledger import SHORT, Ledger
from continual.state.protocol import Held
from continual.state.task_inputs import DIRECTORY
from continual.stores import Where

_log = logging.getLogger("continual.state")
_WRITES = (FoldEntry, CombineEntry, UnfoldEntry, SelectEntry)
"""Records that may come with a generation of their own."""


def bound(path: Where, ledger: Ledger, checksum: str) -> None:
    """Raises Damaged where format.json, with this CRC, is not the one of which the ledger says that it is its own. A
    ledger that an earlier version began says nothing of it."""
    said = [commit for commit in ledger.log if commit.kind not in SHORT]
    named = [crc for commit in said if (crc := getattr(commit.entry, "format", None)) is not None]
    if named and named[-1] != checksum:
        raise Damaged(
            f"{path / 'format.json'} is not the one that this state was made with: it has the checksum {checksum}, and "
            f"the ledger names {named[-1]}. It is of another state, with another base or rule; "
            "restore format.json from a backup of this one"
        )


def check(path: Where, form: Format, log: Sequence[Commit], acknowledged: int) -> None:
    """Raises Damaged where a record of `log` above `acknowledged`, the one that HEAD names, cannot be what the holder
    of this state's lock wrote: what it holds does not follow from the records before it, or its generation is not
    whole. That its checksums follow each other has been checked."""
    for commit in log[acknowledged + 1 :]:
        with environment(f"cannot open the state {path}"):
            why = _why_not(path, form, log, commit)
        if why is not None:
            raise Damaged(
                f"{path / 'commits' / f'{commit.seq:08d}.json'} stands above HEAD, which names record {acknowledged}, "
                f"and cannot be taken up: {why}. A copy that was made while a writer went on looks like this; "
                "restore a whole one from a backup"
            )


def make_durable(path: Where, log: Sequence[Commit], acknowledged: int) -> None:
    """Syncs the records above `acknowledged` and their generations, which a copy of the state may have left in memory
    alone; logs each. Raises Retry and Halt."""
    above = log[acknowledged + 1 :]
    with environment(f"cannot open {path} for writing"):
        for commit in above:
            storing.sync(path / "commits" / f"{commit.seq:08d}.json")
        for name in {c.generation for c in above if c.generation}:
            storing.sync_tree(path / "generations" / name)
        for entry in [c.entry for c in above if isinstance(c.entry, InputsEntry)]:
            for task in entry.tasks:
                storing.sync_tree(path / DIRECTORY / task.id)
        if above:
            storing.sync(path / "generations")
    for commit in above:
        _log.warning("%s: record %d stands above HEAD: it is whole, and counts", path, commit.seq)


def _why_not(path: Where, form: Format, log: Sequence[Commit], commit: Commit) -> str | None:
    """What is wrong with a record above HEAD; None if it can be adopted."""
    before = [Held(c.generation, c.receipts) for c in log[: commit.seq]]
    held, entry = Held(commit.generation, commit.receipts), commit.entry
    if isinstance(entry, InitEntry):
        return "a state begins once"
    if isinstance(entry, RollbackEntry | RepairEntry) and not (0 <= entry.to < commit.seq and held == before[entry.to]):
        return f"it goes back to record {entry.to}, and holds another generation"
    if not isinstance(entry, RollbackEntry | RepairEntry | UnfoldEntry) and held != before[-1]:
        if not isinstance(entry, _WRITES):
            return f"a record of the kind {entry.kind} changes no tensor, and it holds another generation"
        if held.generation is None or held.generation in {b.generation for b in before}:
            return "it writes a generation, and holds an older one"
    if held not in before and held.generation in {b.generation for b in before}:
        return f"it names other receipts of the generation {held.generation} than an earlier record"
    if held.generation is None:
        return None
    return _not_whole(Generation(path / "generations" / held.generation, form, held.receipts or ""))


def _not_whole(generation: Generation) -> str | None:
    """What a generation lacks: its receipts, or a file of the right length that they name. None where it is whole; the
    contents of the files are for `verify`."""
    try:
        generation.load()
        sizes = storing.sizes(generation.directory)
        for _, place in generation.held():
            expected = arrays.chunk_bytes(place.spec) + 4
            count = len(generation.chunks(place)) if place.spec.rows else None
            for file in place.files(count):
                if (size := sizes[file]) != expected:
                    return f"{generation.path(file)} has {size} bytes, and {expected} were written"
        for path in generation.receipts.metadata:
            _ = sizes[f"{path}/zarr.json".lstrip("/")]
    except KeyError as error:
        return f"{generation.path(error.args[0])} is missing"
    except (Damaged, Misconfigured) as error:
        return str(error)
    return None
