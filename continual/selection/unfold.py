"""Taking a model out of a weighted sum that Frank-Wolfe made: its share is subtracted, and the other weights stay as
they are until the next round. For other rules see `engine.unfolding`."""

from __future__ import annotations

import time
from dataclasses import replace

from continual.engine import unfolding
from continual.engine.engine import Engine
from continual.engine.unfolding import Unfolding
from continual.errors import Misconfigured
from continual.executors.contract import Progress
from continual.records import Totals
from continual.selection.active import active_at
from continual.selection.commit import totals
from continual.selection.mixing import Mix, Mixing, layers, stored_sum
from continual.state import Commit


def subtract(engine: Engine, plan: Unfolding, progress: Progress) -> Commit:
    """Subtracts the model of `plan`. Returns the record.

    Raises Misconfigured for a model whose weight is not known by itself any more, Refuse where its files are not those
    that were folded, Retry; then nothing has changed.
    """
    began = time.perf_counter()
    state = engine.state
    now = active_at(state)
    if plan.key not in now.weights:
        raise Misconfigured(
            f"{plan.name} is in the merge, and has no weight of its own any more: it can only shrink in the rounds to "
            "come; 'continual rollback' goes back to a record before it"
        )
    after = now._replace(
        weights={key: w for key, w in now.weights.items() if key != plan.key},
        members={key: m for key, m in now.members.items() if key != plan.key},
    )
    (model,) = plan.again
    member = now.members[plan.key]._replace(at=model.place)
    gone = now.weights[plan.key]
    mixing = Mixing(engine, stored_sum(state), {plan.key: member}, layers(engine.base, by_layer=len(gone) > 1))
    with state.begin() as transaction:
        taken = Mix((1.0,) * len(gone), {plan.key: tuple(-w for w in gone)})
        merged_sq, digests = mixing.write(transaction, taken, [plan.key], progress)
        if digests[plan.key] != model.digest:
            raise unfolding.changed(model)
        if after.members:
            left = unfolding.entry(engine, plan, began, totals(after, merged_sq))
            return state.commit(transaction, replace(left, active=after.weights, rest=after.rest))
    # Nothing is left. The record has no generation: zeros, and not what rounding left of them.
    nothing = unfolding.entry(engine, plan, began, Totals())
    return state.record(replace(nothing, active=after.weights, rest=after.rest), None)
