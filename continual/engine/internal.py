"""What becomes of a candidate at which an exception was raised that nobody expected: a bug of continual or of its
environment. When it is settled, and what is said of it, the service decides."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

from continual.engine.engine import Engine
from continual.engine.outcomes import Outcome, known_as
from continual.errors import Halt, Retry, Skip
from continual.records import Candidate
from continual.state.entries import RefuseEntry
from continual.tensors import Place, candidate_of, open_model, unreadable

REASON = "internal"


def known(engine: Engine, place: Place) -> Outcome | None:
    """The outcome of the candidate at `place` if its fate is settled: the exception may have come after the commit, or
    the candidate was settled in an earlier process. Raises Retry, Skip and Halt."""
    candidate = candidate_at(place)
    found = engine.settled(candidate.key)
    return None if found is None else known_as(candidate.name, found)


def settle(engine: Engine, place: Place, message: str) -> Outcome:
    """Refuses the candidate at `place` as `internal`, with a record. Raises Retry, Skip and Halt."""
    found = known(engine, place)
    if found is not None:
        return found
    candidate = candidate_at(place)
    try:
        commit = engine.state.record(RefuseEntry(candidate=candidate, reason=REASON, message=message))
    except (Retry, Halt):
        raise
    except Exception:  # a name that no record can hold may be what was raised before
        candidate = dataclasses.replace(candidate, name=_sayable(candidate.name), origin=_sayable(candidate.origin))
        commit = engine.state.record(RefuseEntry(candidate=candidate, reason=REASON, message=_sayable(message)))
    return Outcome("refused", candidate.name, message, REASON, commit)


def candidate_at(place: Place) -> Candidate:
    """The candidate at `place`, known by as much of it as can be looked at without an exception. Raises Retry, Skip and
    Halt."""
    if place.settled_key is not None:
        return unreadable(place)
    ways: tuple[Callable[[Place], Candidate], ...] = (_by_headers, unreadable)
    for way in ways:
        try:
            return way(place)
        except (Retry, Skip, Halt):
            raise
        except Exception:
            continue  # that is why we are here
    digest = hashlib.sha256(place.origin.encode("utf-8", "surrogatepass")).hexdigest()
    return Candidate(f"unseen:{digest}", place.name, place.source, place.origin, "full", 0)


def _by_headers(place: Place) -> Candidate:
    model = open_model(place)
    try:
        return candidate_of(model)
    finally:
        model.close()


def _sayable(text: str) -> str:
    """`text` as every record can hold it: what is no Unicode is written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()
