"""One look at everything that is watched, without a daemon: what would be taken and why, or taking it. For cron, for
jobs, and for trying settings out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from continual.api import Merge
from continual.engine import planning
from continual.engine.outcomes import Outcome, known_as
from continual.errors import Retry, Skip
from continual.service.watched import sources_of
from continual.sources.contract import Sight, Source
from continual.sources.roster import must_watch
from continual.tensors import Place


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
    """What became of a model that was taken: an outcome, or the trouble because of which it has to be tried again."""

    model: str
    outcome: Outcome | None
    trouble: str | None = None


def watched(merge: Merge) -> list[Source]:
    """The sources of one look. Raises Misconfigured where nothing is watched, or what is watched cannot be."""
    must_watch(merge.settings)
    return sources_of(merge)


def survey(merge: Merge, sources: Sequence[Source]) -> Iterator[Seen]:
    """Everything there is to see, taken or not, judged by headers alone; nothing is changed. Raises Misconfigured, and
    Retry where a source cannot be asked."""
    for source in sources:
        for sight in source.survey():
            place = merge.places.seen(sight.event)
            take, why = _judged(merge, sight, place)
            yield Seen(place.name, place.origin, sight.event.revision, place.source, take, why)


def once(merge: Merge, sources: Sequence[Source]) -> Iterator[Tried]:
    """Takes everything that is ready now, oldest first. Raises Misconfigured, Halt, and Retry where a source cannot be
    asked; what was folded by then stays."""
    ready = [(event, source) for source in sources for event in source.ready()]
    for event, source in sorted(ready, key=lambda row: (row[0].order, row[0].key)):
        key = None
        try:
            outcome = merge.fold(event)
            key = outcome.key
            if outcome.fate != "known":
                yield Tried(event.name, outcome)
        except Skip:
            pass
        except Retry as trouble:
            yield Tried(event.name, None, str(trouble))
            continue
        source.settled(event, key)
    for source in sources:
        source.finish()


def _judged(merge: Merge, sight: Sight, place: Place) -> tuple[bool, str]:
    """Whether a model would be taken now, and why or why not."""
    ledger = merge.state.ledger
    if sight.left_out is not None:
        return False, sight.left_out
    if sight.key is not None and (known := ledger.fate(sight.key)):
        return False, known_as(sight.event.name, known).message
    if sight.key is not None and sight.key in ledger.pool:
        return False, f"{sight.event.name}: waits in the pool"
    if sight.waits is not None:
        return False, sight.waits
    try:
        found = planning.plan(merge.engine, place)
    except Skip as skipped:
        return False, str(skipped)
    return found.ok, found.message
