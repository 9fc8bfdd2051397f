"""A model taken out of a merge that Frank-Wolfe weighs: its share is subtracted, and the other weights stay as they are
until the next round."""

from __future__ import annotations

import time
from collections.abc import Mapping

from continual import provenance
from continual.engine.engine import Engine
from continual.engine.unfolding import Unfolding
from continual.errors import Misconfigured, Refuse
from continual.executors.contract import Progress
from continual.records import Entry
from continual.selection.active import active
from continual.selection.commit import totals
from continual.selection.mixing import Mix, Mixing, layers, origin
from continual.state import Commit


def unfold(engine: Engine, plan: Unfolding, progress: Progress) -> Commit:
    """Subtracts the model of `plan`. Returns the record.

    Raises Misconfigured for one whose weight is not known by itself any more, Refuse where its files are not those that
    were folded, Retry; then nothing has changed.
    """
    begun, state, now = time.perf_counter(), engine.state, active(engine.state)
    if plan.key not in now.weights:
        raise Misconfigured(
            f"{plan.name} is in the merge, and has no weight of its own any more: it can only shrink in the rounds to come; "
            "'continual rollback' goes back to a record before it"
        )
    weights = {key: w for key, w in now.weights.items() if key != plan.key}
    after = now._replace(weights=weights, members={key: m for key, m in now.members.items() if key != plan.key})
    (model,) = plan.again
    member = now.members[plan.key]._replace(at=model.place)
    fold = next(c for c in state.ledger.folds() if (c.entry.candidate or {})["key"] == plan.key)

    def entry(found: Mapping[str, float]) -> Entry:
        return Entry(
            kind="unfold",
            candidate=fold.entry.candidate,
            digest=fold.entry.digest,
            fate="unfolded",
            message=f"{plan.name}: record {plan.seq} taken out in {time.perf_counter() - begun:.1f} s",
            totals=found,
            numbers={"of": plan.seq, "key": plan.key, "again": [], **after.body()},
            software=provenance.software(),
            device=str(engine.device),
        )

    gone = now.weights[plan.key]
    mixing = Mixing(engine, origin(state), {plan.key: member}, layers(engine.base, by_layer=len(gone) > 1))
    with state.begin() as transaction:
        taken = Mix((1.0,) * len(gone), {plan.key: tuple(-w for w in gone)})
        merged_sq, digests = mixing.write(transaction, taken, [plan.key], progress)
        if digests[plan.key] != model.digest:
            raise Refuse(
                "changed",
                f"{model.place} does not hold what was folded as record {plan.seq} ({plan.name}) any more: nothing was changed; "
                "if the model is somewhere else now, name the place with --at",
            )
        if after.members:
            return transaction.commit(entry(totals(after, merged_sq).body()))
    return state.record(entry({}), None)  # nothing is left: zeros, and not what rounding left
