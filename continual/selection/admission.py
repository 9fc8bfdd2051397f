"""How a candidate comes into the pool: by its headers alone. It waits there, by reference, for a round."""

from __future__ import annotations

from continual.engine.engine import Engine
from continual.engine.outcomes import OpenCandidate, Outcome
from continual.gates import Headers
from continual.gates.updates import UpdatesGate
from continual.records import Candidate
from continual.state import State
from continual.state.entries import DeferEntry, RefuseEntry
from continual.tensors import Place


def admit(engine: Engine, place: Place) -> Outcome:
    """Takes the model at `place` into the pool. A refusal is a record in the ledger and an outcome. Raises Retry
    (nothing is settled) and Halt."""

    def wait(seen: Headers) -> Outcome:
        candidate, model, lineage, *_ = OpenCandidate.of(seen)
        name = candidate.name
        if waiting := engine.state.ledger.pool.get(candidate.key):
            message = f"{name}: waits in the pool since {waiting.since}"
            return Outcome("known", name, message, "waiting", waiting.commit)
        shipped = engine.shipped(model, lineage)
        if shipped is not None:
            shipped.close()
        if engine.gates.the(UpdatesGate).updates == "refuse" and candidate.revision is not None:
            _replace_older(engine.state, candidate)
        message = f"{name}: waits in the pool for a round"
        entry = DeferEntry(candidate=candidate, message=message)
        return Outcome("deferred", name, message, "waiting", engine.state.record(entry))

    return engine.consider(place, wait)


def _replace_older(state: State, candidate: Candidate) -> None:
    """Settles the other commits of the same repo that wait: rounds look at the one that came now in their place."""
    for waiting in state.ledger.pool.values():
        older = waiting.candidate
        if older.origin == candidate.origin and older.key != candidate.key:
            state.record(
                RefuseEntry(
                    candidate=older,
                    reason="superseded",
                    message=f"{older.name}: a newer commit of it waits in its place",
                )
            )
