"""What a round decided, written: every member's row, and for a merge of Frank-Wolfe the one transaction that makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from continual import provenance
from continual.engine.engine import Engine
from continual.executors.contract import Progress
from continual.records import Entry, Totals
from continual.selection import fates
from continual.selection.active import Active, active
from continual.selection.asked import Asked
from continual.selection.fates import Row
from continual.selection.frank_wolfe import Chosen, Origin, together
from continual.selection.loaded import Loaded
from continual.selection.members import Member
from continual.selection.mixing import Mixing
from continual.state import Commit
from continual.state.ledger import Waiting


def entry(
    engine: Engine,
    begun: Commit,
    asked: Asked,
    rows: Sequence[Row],
    numbers: Mapping[str, Any],
    merge: Mapping[str, Any] | None = None,
    after: Mapping[str, float] | None = None,
) -> Entry:
    """The record that ends a round."""
    counted = ", ".join(
        f"{len(found)} {fate}"
        for fate in ("chosen", "folded", "deferred", "refused", "expired")
        if (found := fates.names(rows, fate))
    )
    body = {
        "of": begun.seq,
        "objective": asked.calibration.told()["digest"],
        **numbers,
        "scores": [row.body() for row in rows],
        **(merge or {}),
    }
    message = (
        f"{counted or 'no member'}; loss {numbers['before']:.4g} to {numbers['loss']:.4g}, gap {numbers['gap']:.3g}"
    )
    return Entry(
        kind="select",
        numbers=body,
        message=message,
        software=provenance.software(),
        device=str(engine.device),
        totals=after,
    )


def kept_out(
    chosen: Chosen, members: Sequence[Member], pool: Mapping[str, Waiting], asked: Asked, now: str
) -> list[Row]:
    """The rows of the members that nobody chose."""
    rows = []
    for member in members:
        if member.key in chosen.lost:
            rows.append(fates.lost(member, chosen.lost[member.key]))
        elif member.key not in chosen.active.weights:
            score = chosen.scores[member.key].total
            rows.append(fates.kept_out(member, pool[member.key], score, chosen.judged.get(member.key), now, asked))
    return fates.crowded(rows, pool, asked)


def kept(chosen: Chosen, member: Member, fate: str = "folded") -> Row:
    """The row of a member that was chosen, or is in the merge."""
    verdict, weight = chosen.judged.get(member.key), _mean(chosen.active.weights.get(member.key, (0.0,)))
    change, error, z = (verdict.change, verdict.error, verdict.z) if verdict else (None, None, None)
    score = chosen.scores[member.key].total if member.key in chosen.scores else None
    return Row(
        member.key, member.name, fate, "", f"{member.name}: weight {weight:.4g}", 0, score, change, error, z, weight
    )


def commit(
    engine: Engine,
    loaded: Loaded,
    origin: Origin,
    chosen: Chosen,
    members: Sequence[Member],
    pool: Mapping[str, Waiting],
    asked: Asked,
    begun: Commit,
    progress: Progress,
) -> Commit:
    """Writes the weighted sum that Frank-Wolfe chose as one durable step, with every member's fate. Raises Retry; then
    nothing is settled."""
    state, now, weights = engine.state, active(engine.state), chosen.active.weights
    out = [key for key in now.members if key not in weights and (key in chosen.left or not chosen.active.rest)]
    waits = dict(pool)
    for fold in state.ledger.folds():
        if (key := (fold.entry.candidate or {})["key"]) in out:
            waits[key] = Waiting(fold, fold.time)
    rows = kept_out(
        chosen, [*members, *(now.members[key] for key in out if key in chosen.scores)], waits, asked, begun.time
    )
    if weights == now.weights and chosen.active.rest == now.rest:
        rows = [*(kept(chosen, chosen.active.members[key]) for key in weights), *rows]
        return state.record(entry(engine, begun, asked, rows, chosen.numbers))
    entering = [m for m in members if m.key in weights]
    with state.begin() as transaction:
        mixing = Mixing(engine, origin.vector, {**now.members, **chosen.active.members}, loaded.layers)
        merged_sq, digests = mixing.write(transaction, chosen.mix, [m.key for m in entering], progress)
        engine.go_on("the round")
        after, doubles = _twins(engine, chosen.active, digests)
        rows = [*(kept(chosen._replace(active=after), after.members[key]) for key in after.weights), *doubles, *rows]
        norms = {**now.norms, **after.norms}
        staying = [key for key in now.members if key not in out]
        entered = [m.key for m in entering if m.key in after.weights]
        folds = [_fold(pool[key], digests[key], norms[key], _mean(after.weights[key])) for key in entered]
        everyone = {key: now.members[key] for key in staying} | {key: after.members[key] for key in entered}
        found = totals(after._replace(members=everyone, norms=norms), merged_sq).body()
        merge = {**after.body(), "folds": folds, "out": out}
        return transaction.commit(entry(engine, begun, asked, rows, chosen.numbers, merge, found))


def totals(merge: Active, merged_sq: float) -> Totals:
    """The totals of a weighted sum: what every rule has, `weight` being Σ w (over layers their mean)."""
    weight = sum(_mean(w) for w in merge.weights.values()) + (_mean(merge.rest) if merge.rest else 0.0)
    norms = sum(merge.norms[key] for key in merge.members)
    return Totals(count=float(len(merge.members)), weight=weight, norm_sum=norms, merged_sq=merged_sq)


def _fold(waiting: Waiting, digest: str, norm: float, weight: float) -> dict[str, Any]:
    """A model that entered the merge, as a record of several holds it."""
    return {
        "candidate": dict(waiting.commit.entry.candidate or {}),
        "digest": digest,
        "numbers": {"tau_norm": norm, "weight": weight},
    }


def _twins(engine: Engine, after: Active, digests: Mapping[str, str]) -> tuple[Active, list[Row]]:
    """A model that is in the merge already under another name is no second one: its weight is that of the first. X is
    the same."""
    seen, doubles, weights, rest = dict[str, str](), list[Row](), dict(after.weights), after.rest
    for key, digest in digests.items():
        known = engine.state.ledger.folded_digest(digest)
        first = (known.entry.candidate or {})["key"] if known else seen.setdefault(digest, key)
        if first == key:
            continue
        weight = weights.pop(key)
        if first in weights:
            weights[first] = together(weights[first], weight, len(weight))
        else:
            rest = together(rest, weight, len(weight))
        name = after.members[key].name
        message = f"{name}: duplicate of {(known.entry.candidate or {})['name'] if known else after.members[first].name}: the same tensors"
        doubles.append(Row(key, name, "refused", "duplicate", message))
    members = {key: member for key, member in after.members.items() if key in weights}
    return after._replace(weights=weights, rest=rest, members=members), doubles


def _mean(weights: Sequence[float]) -> float:
    return sum(weights) / len(weights)
