"""One look at everything that is watched, without a daemon: what would be taken and why, or taking it. For cron, for
jobs, and for trying settings out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from continual.api import Merge
from continual.engine import internal, planning
from continual.engine.outcomes import Outcome, known_as
from continual.errors import ContinualError, Retry, Skip
from continual.records import Event
from continual.service.failures import TRIES, contained, refusal, told
from continual.service.watched import sources_of
from continual.sources.contract import Sight, Source
from continual.sources.roster import must_watch
from continual.tensors import Place

FIRST_WAIT = 1.0
"""Seconds until a candidate at which an exception was raised that nobody expected is tried again; then twice as
long."""


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
    broken = []
    for event, source in sorted(ready, key=lambda row: (row[0].order, row[0].key)):
        try:
            found = _taken(merge, event, source)
        except ContinualError:
            raise
        except Exception as error:
            _tell(event, error)
            broken.append((event, source))
            continue
        if found is not None:
            yield found
    for event, source in broken:
        if (found := _again(merge, event, source)) is not None:
            yield found
    for source in sources:
        source.finish()


def _taken(merge: Merge, event: Event, source: Source) -> Tried | None:
    """Folds one model; None where nothing is to be said of it. Raises Halt."""
    try:
        outcome = contained(partial(merge.fold, event))()
    except Skip:
        source.settled(event, None)
        return None
    except Retry as trouble:
        return Tried(event.name, None, str(trouble))
    source.settled(event, outcome.key)
    return None if outcome.fate == "known" else Tried(event.name, outcome)


def _again(merge: Merge, event: Event, source: Source) -> Tried | None:
    """What becomes of a model at which an exception was raised that nobody expected: it is tried again when the others
    are done, and refused as `internal` where that does not help. Raises Halt."""
    wait, left = FIRST_WAIT, TRIES - 1
    while True:
        try:
            if (found := internal.known(merge.engine, merge.places.seen(event))) is not None:
                source.settled(event, found.key)
                return None
            time.sleep(wait)
            return _taken(merge, event, source)
        except ContinualError:
            raise
        except Exception as error:
            _tell(event, error)
            wait, left = 2 * wait, left - 1
            if left == 0:
                outcome = internal.settle(merge.engine, merge.places.seen(event), refusal(event.name, error))
                source.settled(event, outcome.key)
                return Tried(event.name, outcome)


def _tell(event: Event, error: Exception) -> None:
    structlog.get_logger("continual").error("internal error", model=event.name, error=told(error), exc_info=error)


def _judged(merge: Merge, sight: Sight, place: Place) -> tuple[bool, str]:
    """Whether a model would be taken now, and why or why not."""
    ledger = merge.state.ledger
    if sight.left_out is not None:
        return False, sight.left_out
    if sight.key is not None and (known := merge.engine.settled(sight.key)):
        return False, known_as(sight.event.name, known).message
    if sight.key is not None and sight.key in ledger.pool:
        return False, f"{sight.event.name}: waits in the pool"
    if sight.waits is not None:
        return False, sight.waits
    try:
        found = contained(partial(planning.plan, merge.engine, place))()
    except Skip as skipped:
        return False, str(skipped)
    except ContinualError:
        raise
    except Exception as error:
        return False, f"{sight.event.name}: {told(error)}: nobody expected it: a bug of continual or its environment"
    return found.ok, found.message
