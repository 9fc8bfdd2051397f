"""One look at everything that is watched, without a daemon: what would be taken and why, or taking it. For cron, for
jobs, and for trying settings out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from continual.api import Merge
from continual.engine import planning
from continual.engine.outcomes import Outcome, known_as
from continual.errors import Misconfigured, Refuse, Retry, Skip
from continual.hub.locate import SCHEME
from continual.records import Event
from continual.sources import hub as hub_source
from continual.sources.folder import FolderSighting, scan
from continual.tensors import Folder, Place


@dataclass(frozen=True, slots=True)
class Seen:
    """A model that was found. `take`: it would be folded now (or put into the pool); `why` says what speaks for or
    against it."""

    model: str
    origin: str
    revision: str | None
    source: str
    take: bool
    why: str


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of a model that was taken: an outcome, or why it has to be tried again."""

    model: str
    outcome: Outcome | None
    trouble: str | None = None


def survey(merge: Merge) -> Iterator[Seen]:
    """Everything there is to see, taken or not, judged by headers alone; nothing is changed. Raises Misconfigured, and
    Trouble where the Hub cannot be listed."""
    settings = merge.settings
    for root in settings.watch:
        for sighting in scan(root):
            found = Folder(sighting.path, root, "folder")
            waits = _waits(sighting, settings.settle)
            yield _seen(found, None, *((False, waits) if waits else _verdict(merge, found)))
    if not _hub(merge):
        return
    now, rows = time.time(), source(merge).rows()
    merge.places.newer = lambda _info: None  # nothing is changed
    for called, info in rows:
        if isinstance(info, Refuse):
            yield Seen(called, f"{SCHEME}{called}", None, "hub", False, str(info))
            continue
        place = merge.places.seen(Event("hub", f"{SCHEME}{info.id}", revision=info.sha))
        key = f"hub:{info.id}@{info.sha}"
        young = settings.hub.settle - (now - info.modified.timestamp())
        if out := merge.places.left_out(info, called):
            verdict = False, out
        elif known := merge.state.ledger.fate(key):
            verdict = False, known_as(info.id, known).message
        elif key in merge.state.ledger.pool:
            verdict = False, f"{info.id}: waits in the pool"
        elif young > 0:
            verdict = False, f"{info.id}: is looked at in {young:.0f} s, if it has no new commit until then"
        else:
            verdict = _verdict(merge, place)
        yield _seen(place, info.sha, *verdict)


def once(merge: Merge) -> Iterator[Tried]:
    """Takes everything that is ready now, oldest first. Raises Misconfigured, Halt, and Retry where the Hub cannot be
    polled; what was folded by then stays."""
    settings, events = merge.settings, []
    for root in settings.watch:
        events += [Event("folder", str(s.path), s.order, root) for s in scan(root) if not _waits(s, settings.settle)]
    found = source(merge) if _hub(merge) else None
    if found is not None:
        found.poll()
        found.open_inbox()
        events += [hub_source.event_of(s) for s in found.cursor.ready(time.time(), settings.hub.settle)]
    for event in sorted(events, key=lambda e: (e.order, e.key)):
        key = None
        try:
            outcome = merge.fold(event)
            key = (outcome.commit.entry.candidate or {}).get("key")
            if outcome.fate != "known":
                yield Tried(event.name, outcome)
        except Skip:
            pass
        except Retry as trouble:
            yield Tried(event.name, None, str(trouble))
            continue
        if found is not None:
            found.settled(event.key, key)
    if found is not None:
        found.forget()
        found.save()


def source(merge: Merge) -> hub_source.HubSource:
    """The Hub as a source of this state."""
    found = hub_source.HubSource(merge.places, merge.settings.hub, merge.settings.state, merge.state.ledger.is_settled)
    found.again(merge.state.ledger.retried())
    return found


def must_watch(merge: Merge) -> None:
    """Raises Misconfigured where nothing is watched, or what is watched cannot be."""
    if _hub(merge):
        merge.places.check()
    if not merge.settings.watch and not _hub(merge):
        raise Misconfigured(
            "nothing to watch: name a folder with watch = [DIR] (--watch DIR), or set hub.watch = true (--hub watch=true)"
        )


def _hub(merge: Merge) -> bool:
    asked = merge.settings.hub
    return asked.watch or bool(asked.repos or asked.authors)


def _waits(sighting: FolderSighting, settle: float) -> str | None:
    """Why a model in a folder is not looked at yet; None if it is."""
    if not sighting.whole:
        return f"{sighting.path.name}: is not whole: a shard is missing, or shorter than its header says"
    young = settle - (time.time() - max(file.mtime_ns for file in sighting.files) / 1e9)
    return (
        f"{sighting.path.name}: is looked at in {young:.0f} s, if its files are still until then" if young > 0 else None
    )


def _verdict(merge: Merge, place: Place) -> tuple[bool, str]:
    try:
        found = planning.plan(merge.engine, place)
    except Skip as skipped:
        return False, str(skipped)
    return found.ok, found.message


def _seen(place: Place, revision: str | None, take: bool, why: str) -> Seen:
    return Seen(place.name, place.origin, revision, place.source, take, why)
