"""What a round decided, written down: the fate of every member, and for Frank-Wolfe the one transaction that makes the
new sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from continual.engine.engine import Engine
from continual.executors.contract import Progress
from continual.records import Totals
from continual.selection import fates
from continual.selection.active import Active, active_at
from continual.selection.frank_wolfe import Chosen, Figures, SearchSpace, together
from continual.selection.last_word import LastWord
from continual.selection.members import Member
from continual.selection.mixing import Mixing
from continual.selection.round_options import RoundOptions
from continual.state import Commit
from continual.state.entries import SelectEntry
from continual.state.ledger import Waiting
from continual.state.parts import BroughtFold, FoldNumbers, MemberFate, MergedWord, RowFate


class OpenRound(NamedTuple):
    """A round under way: the record that began it (`begun`), its members, and the pool in which they wait."""

    engine: Engine
    options: RoundOptions
    begun: Commit
    members: Sequence[Member]
    pool: Mapping[str, Waiting]


def entry(under_way: OpenRound, rows: Sequence[MemberFate], figures: Figures) -> SelectEntry:
    """The record that ends a round, with the fates of its members."""
    listed: tuple[RowFate, ...] = ("chosen", "folded", "deferred", "refused", "expired")
    counted = [f"{len(found)} {fate}" for fate in listed if (found := fates.names(rows, fate))]
    loss = f"loss {figures.before:.4g} to {figures.loss:.4g}"
    return SelectEntry(
        message=f"{', '.join(counted) or 'no member'}; {loss}, gap {figures.gap:.3g}",
        device=str(under_way.engine.device),
        of=under_way.begun.seq,
        objective=under_way.options.calibration.told().digest,
        **figures._asdict(),
        scores=tuple(rows),
    )


def kept_out(under_way: OpenRound, chosen: Chosen, last: LastWord | None = None) -> list[MemberFate]:
    """The fates of the members that are not in the merge: that were not chosen, and under relevance those that the
    `last` word did not keep."""
    options, pool = under_way.options, under_way.pool
    goes = chosen.active.weights if last is None else last.order
    words = {} if last is None else last.words
    rows = []
    for member in under_way.members:
        key = member.key
        if key in goes:
            continue
        if key in chosen.lost:
            rows.append(fates.lost(member, chosen.lost[key]))
            continue
        word = words.get(key)
        score, judgement = chosen.scores[key].total, chosen.judged.get(key)
        if word is not None and key in chosen.active.weights:
            found = fates.figures(score, judgement)
            row = fates.irrelevant(member, pool[key], found, _said(word), under_way.begun.time, options)
            row = dataclasses.replace(row, weight=mean(chosen.active.weights[key]), merged=word)
        else:
            row = fates.kept_out(member, pool[key], score, judgement, under_way.begun.time, options)
            if word is not None:
                row = dataclasses.replace(row, message=f"{row.message}; {_said(word)}", merged=word)
        rows.append(row)
    return fates.crowded(rows, pool, options)


def to_fold(under_way: OpenRound, chosen: Chosen, last: LastWord) -> list[MemberFate]:
    """The rows of the models that the rule has to fold, in their order."""
    members = {member.key: member for member in under_way.members}
    rows = []
    for rank, key in enumerate(last.order):
        word = last.words.get(key)
        if key in chosen.active.weights:
            row = kept(chosen, key, "chosen", rank)
            rows.append(row if word is None else dataclasses.replace(row, message=f"{row.message}; {_said(word)}"))
        else:
            assert word is not None, "it was left out"
            found = fates.figures(chosen.scores[key].total, chosen.judged.get(key))
            message = f"{members[key].name}: kept, since {_said(word)}"
            rows.append(MemberFate(key, members[key].name, "chosen", "", message, rank=rank, **found))
        rows[-1] = dataclasses.replace(rows[-1], merged=word)
    return rows


def _said(word: MergedWord) -> str:
    """What the rule's merge says of a member, in words."""
    serves = "it serves no task" if word.task is None else f"it serves task {word.task} ({word.name})"
    return (
        f"{serves}, and with it folded too the loss on {word.rows} rows changes by {word.change:+.2g} ± "
        f"{word.error:.1g} (z {word.z:+.1f})"
    )


def kept(chosen: Chosen, key: str, fate: RowFate = "folded", rank: int | None = None) -> MemberFate:
    """The fate of a member that was chosen, or that is in the sum."""
    member = chosen.active.members[key]
    weight = mean(chosen.active.weights.get(key, (0.0,)))
    score = chosen.scores[key].total if key in chosen.scores else None
    figures = fates.figures(score, chosen.judged.get(key))
    message = f"{member.name}: weight {weight:.4g}"
    return MemberFate(key, member.name, fate, "", message, weight=weight, rank=rank, **figures)


def write_sum(under_way: OpenRound, space: SearchSpace, chosen: Chosen, progress: Progress) -> Commit:
    """Writes the weighted sum that Frank-Wolfe chose as one durable step, with the fate of every member; where no
    weight changed, a record alone.

    Raises Refuse where a member's files are gone by now, Retry; then nothing is settled.
    """
    engine = under_way.engine
    state = engine.state
    now = active_at(state)
    weights = chosen.active.weights
    out = [key for key in now.members if key not in weights and (key in chosen.left or not chosen.active.rest)]
    rows = kept_out(with_those_that_leave(under_way, now, out, chosen), chosen)
    if weights == now.weights and chosen.active.rest == now.rest:
        rows = [*(kept(chosen, key) for key in weights), *rows]
        return state.record(entry(under_way, rows, chosen.figures))
    entering = [m.key for m in under_way.members if m.key in weights]
    with state.begin() as transaction:
        everyone = {**now.members, **chosen.active.members}
        mixing = Mixing(engine, space.merged.vector, everyone, space.model.layers)
        merged_sq, digests = mixing.write(transaction, chosen.mix, entering, progress)
        engine.go_on("the round")
        after, doubles = _without_twins(engine, chosen.active, digests)
        chosen = chosen._replace(active=after)
        rows = [*(kept(chosen, key) for key in after.weights), *doubles, *rows]
        norms = {**now.norms, **after.norms}
        entered = [key for key in entering if key in after.weights]
        staying = {key: now.members[key] for key in now.members if key not in out}
        members = staying | {key: after.members[key] for key in entered}
        folds = [_fold(under_way.pool[key], digests[key], norms[key], mean(after.weights[key])) for key in entered]
        written = dataclasses.replace(
            entry(under_way, rows, chosen.figures),
            totals=totals(after._replace(members=members, norms=norms), merged_sq),
            active=after.weights,
            rest=after.rest,
            folds=tuple(folds),
            out=tuple(out),
        )
        return state.commit(transaction, written)


def totals(merged: Active, merged_sq: float) -> Totals:
    """The totals of a weighted sum. `weight` is Σ w; of weights by layer, their mean over layers. `merged_sq` is
    ‖X‖²."""
    weight = sum(mean(w) for w in merged.weights.values()) + (mean(merged.rest) if merged.rest else 0.0)
    norms = sum(merged.norms[key] for key in merged.members)
    return Totals(count=float(len(merged.members)), weight=weight, norm_sum=norms, merged_sq=merged_sq)


def with_those_that_leave(under_way: OpenRound, now: Active, out: Sequence[str], chosen: Chosen) -> OpenRound:
    """The round, as if the models that leave the sum waited in the pool since they were folded."""
    pool = dict(under_way.pool)
    for fold in under_way.engine.state.ledger.folds():
        key = fold.entry.candidate.key
        if key in out:
            pool[key] = Waiting(fold, fold.time)
    leaving = [now.members[key] for key in out if key in chosen.scores]
    return under_way._replace(members=[*under_way.members, *leaving], pool=pool)


def _fold(waiting: Waiting, digest: str, norm: float, weight: float) -> BroughtFold:
    """A model that entered the sum, as the record has it."""
    return BroughtFold(waiting.candidate, digest, FoldNumbers(tau_norm=norm, weight=weight))


def _without_twins(engine: Engine, after: Active, digests: Mapping[str, str]) -> tuple[Active, list[MemberFate]]:
    """Gives the weight of a model that is in the sum already, under another name, to the one that is there; X does not
    change. Returns the weights, and the fates of the twins."""
    seen: dict[str, str] = {}
    twins: list[MemberFate] = []
    weights = dict(after.weights)
    rest = after.rest
    for key, digest in digests.items():
        known = engine.state.ledger.folded_digest(digest)
        first = known.entry.candidate.key if known else seen.setdefault(digest, key)
        if first == key:
            continue
        weight = weights.pop(key)
        if first in weights:
            weights[first] = together(weights[first], weight, len(weight))
        else:
            rest = together(rest, weight, len(weight))
        name = after.members[key].name
        of = known.entry.candidate.name if known else after.members[first].name
        twins.append(MemberFate(key, name, "refused", "duplicate", f"{name}: duplicate of {of}: the same tensors"))
    members = {key: member for key, member in after.members.items() if key in weights}
    return after._replace(weights=weights, rest=rest, members=members), twins


def mean(weights: Sequence[float]) -> float:
    """The mean over layers."""
    return sum(weights) / len(weights)
