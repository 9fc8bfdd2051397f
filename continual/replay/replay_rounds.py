"""Makes the weighted sum of a round again, from the weights that its record has: no calibration row is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from continual.engine.engine import Engine
from continual.errors import Refuse
from continual.executors.contract import Progress
from continual.lazily import torch
from continual.selection.active import active_at
from continual.selection.frank_wolfe import together, wide
from continual.selection.members import Member
from continual.selection.mixing import Mixing, layers, mix, stored_sum
from continual.state.entries import SelectEntry
from continual.tensors import Place


def choose_again(engine: Engine, entry: SelectEntry, places: Mapping[str, Place | None], progress: Progress) -> None:
    """Writes the sum of a round, and the record of it. Raises Refuse for a model that is not what it was, Retry."""
    state, now = engine.state, active_at(engine.state)
    after, folds = dict(entry.active or {}), entry.folds or ()
    width = max((len(each) for each in (*after.values(), *now.weights.values(), now.rest, entry.rest or ())), default=1)
    out = set(entry.out or ())
    lost = [key for key in now.weights if key not in after and key not in out]
    rest = now.rest
    for key in lost:  # its files could not be had: it went into the rest
        rest = together(rest, now.weights[key], width)
    before = {key: each for key, each in now.weights.items() if key not in lost}
    keys = [*before, *(fold.candidate.key for fold in folds)]
    rows = [[wide(each.get(key, (0.0,)), width) for key in keys] for each in (before, after)]
    if rest:
        rows[0].append(wide(rest, width))
        rows[1].append(wide(entry.rest or (0.0,), width))
    start, end = (torch.tensor(each, dtype=torch.float64).reshape(-1, width) for each in rows)
    candidates = [*(member.candidate for member in now.members.values()), *(fold.candidate for fold in folds)]
    members = {one.key: Member(one, at=places.get(one.key)) for one in candidates}
    mixing = Mixing(engine, stored_sum(state), members, layers(engine.base, by_layer=width > 1))
    entering = [fold.candidate.key for fold in folds]
    with state.begin() as transaction:
        merged_sq, digests = mixing.write(transaction, mix(start, end, rest, keys), entering, progress)
        for fold in folds:
            if digests[fold.candidate.key] != fold.digest:
                raise Refuse("changed", f"{fold.candidate.name}: its files are others than a moment ago; start again")
        totals = None if entry.totals is None else replace(entry.totals, merged_sq=merged_sq)
        state.commit(transaction, replace(entry, of=0, totals=totals))
