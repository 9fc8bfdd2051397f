"""Reads every file of a state and compares it with what its record, receipt or checksum says. It reports, and repairs
nothing. What belongs to no part of the format is the matter of strays.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from continual.errors import ContinualError, Misconfigured
from continual.state import excerpts, framing, storing, task_inputs
from continual.state.entries import TagEntry
from continual.state.excerpts import Sealed
from continual.state.fields import record_of
from continual.state.format import Commit, Format
from continual.state.generation import Generation
from continual.state.inbox import PushRecord
from continual.state.ledger import Ledger
from continual.state.opening import PARTIAL
from continual.state.protocol import Head, read_head, tag_stands
from continual.state.store import State
from continual.stores import Where

OnPart = Callable[[int, int], None]
"""Is called with the number of parts that were checked so far, and of all."""


def verify(state: State, progress: OnPart = lambda _done, _total: None, *, generations: bool = True) -> list[str]:
    """Reads every file of `state` anew: format.json, HEAD, every record, tags, pushes, cursors, and every byte of the
    generations that it keeps and of the inputs of tasks, unless `generations` is False. Returns what is wrong, nothing
    if all is as it was written.

    A part, for `progress`, is a record or an array.
    """
    kept = state.generations()
    tagged = {state.ledger.get(seq).generation for seq in state.ledger.tags.values()} - {None}
    findings = [f"generation {missing} is tagged, but missing" for missing in sorted(tagged - set(kept), key=str)]
    arrays = sum(len(slots) for slots in state.format.slots.values())
    total, done = len(state.ledger.log) + len(kept) * arrays, 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    findings += _told(partial(_format, state))
    acknowledged = state.ledger.head.seq
    try:
        head = read_head(state.path)
        findings += _head(state, head)
        acknowledged = head.seq
    except ContinualError as error:
        findings.append(str(error))
    for commit in state.ledger.log:
        findings += _told(partial(_record, state.path, commit))
        step()
    for first in range(0, acknowledged + 2 - excerpts.SPAN, excerpts.SPAN):
        findings += _told(partial(excerpts.finding, state.path, state.ledger.log, first))
    for name in kept if generations else ():
        findings += _generation(state, name, step)
    if generations:
        for wrong in task_inputs.findings(state.path, state.format, state.ledger).values():
            findings += wrong
    for tag in state.ledger.tags:
        findings += _told(partial(tag_finding, state.path, state.ledger, acknowledged, tag))
    return findings + loose_findings(state.path)


def loose_findings(path: Where) -> list[str]:
    """What is wrong with the pushes and cursors of the state in `path`: files that no record names."""
    return [
        finding
        for name in ("inbox", "sources")
        for file in loose_files(path / name)
        for finding in _told(partial(loose, file))
    ]


def loose_files(directory: Where) -> list[Where]:
    """The files of pushes, or cursors, in a directory that may not be there. Raises OSError."""
    return [directory / name for name in storing.names(directory) if name.endswith(".json") and name[0] != "."]


def loose(file: Where) -> str | None:
    """Reads a push or a cursor. Raises Damaged; one that has gone meanwhile is settled."""
    try:
        body, _ = framing.decode(file)
    except ContinualError:
        if not file.exists():
            return None
        raise
    if file.parent.name == "inbox":
        record_of(PushRecord, body, file)
    return None


def _told(look: Callable[[], str | None]) -> list[str]:
    """What `look` says or raises."""
    try:
        found = look()
    except ContinualError as error:
        found = str(error)
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
    return [] if found is None else [found]


def _format(state: State) -> str | None:
    file = state.path / "format.json"
    if Format.of(framing.decode(file)[0], file) != state.format:
        return f"{file} is another than the state was opened with"
    return None


def _head(state: State, head: Head) -> list[str]:
    """What is wrong with HEAD. A writer may have gone on since the state was opened."""
    if head.seq < len(state.ledger.log) and state.ledger.get(head.seq).crc != head.crc:
        return [f"{state.path / 'HEAD'} names another record {head.seq} than the one in commits/"]
    return []


def _record(path: Where, commit: Commit) -> str | None:
    if isinstance(commit, Sealed):  # an excerpt said it, and is compared with it
        excerpts.whole(commit, storing.stem(path / "commits"))
        return None
    file = path / "commits" / f"{commit.seq:08d}.json"
    if framing.decode(file)[1] != commit.crc:
        return f"{file} is another record than the state was opened with"
    return None


def _generation(state: State, name: str, step: Callable[[], None]) -> list[str]:
    """What is wrong with a generation; nothing if it expires before it is looked at."""
    try:
        held = state.ledger.generations[name]
        with state.lease(held.seq):
            return list(Generation(state.path / "generations" / name, state.format, held.receipts or "").check(step))
    except Misconfigured:
        return []
    except ContinualError as error:
        return [str(error)]


def tag_finding(path: Where, ledger: Ledger, acknowledged: int, tag: str) -> str | None:
    """What is wrong with the file of a tag. It is written after its record and HEAD: where that record is the one that
    HEAD names, or stands above it, and in a backup that was not completed, the next writer writes the file."""
    in_flight = (path / PARTIAL).exists() or any(
        isinstance(c.entry, TagEntry) and c.entry.tag == tag for c in ledger.log[acknowledged:]
    )
    try:
        if tag_stands(path, tag, ledger.tags[tag]) or in_flight:
            return None
    except (ContinualError, OSError) as error:
        return str(error)
    file, seq = path / "tags" / f"{tag}.json", ledger.tags[tag]
    return f"{file} is not there, or does not name record {seq} as the ledger does"
