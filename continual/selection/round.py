"""One round over the pool, from the record that begins it to the record that ends it. A round that was killed is taken
up with the same members and makes the same choice."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from continual import provenance
from continual.engine.engine import Engine
from continual.engine.outcomes import Outcome
from continual.engine.reading import Reading
from continual.errors import Misconfigured, Refuse, Retry
from continual.executors.contract import Progress
from continual.objectives import calibration
from continual.records import Entry
from continual.selection import fates, frank_wolfe, relevance
from continual.selection.active import NONE, active
from continual.selection.asked import Asked
from continual.selection.commit import commit, entry, kept, kept_out
from continual.selection.fates import Row
from continual.selection.loaded import Loaded
from continual.selection.members import Member
from continual.selection.relevance import pending
from continual.selection.steps import Taken
from continual.state import Commit, State
from continual.state.ledger import Waiting


class Round(NamedTuple):
    """What a round came to: a row of each member, its numbers (`loss`, `before`, `gap`, `steps`, …), the record that
    ended it (None of a dry run), the folds it made, and its wall time in seconds."""

    rows: list[Row]
    numbers: Mapping[str, Any]
    commit: Commit | None
    folds: int
    seconds: float

    @property
    def refused(self) -> bool:
        """Whether it kept a model out for good."""
        return any(row.fate in ("refused", "expired") for row in self.rows)


_EMPTY = "nothing waits in the pool; 'continual fold MODEL' puts a model there, and so does the daemon"
Told = Callable[[Outcome | Taken], None]
"""Hears of each fold, or step, as it is made."""


def due(pool: Mapping[str, Waiting], asked: Asked, now: str) -> bool:
    """Whether a round is due: enough candidates wait that no round has judged, or one of them has waited long enough,
    or one has grown too old."""
    fresh = [w for w in pool.values() if not w.last]
    if pending(pool) or len(fresh) >= asked.size or any(fates.seconds(w.since, now) >= asked.wait for w in fresh):
        return True
    return any(fates.seconds(w.since, now) >= asked.age for w in pool.values())


def next_due(pool: Mapping[str, Waiting], asked: Asked, now: str) -> float | None:
    """Seconds until a round is due if nothing else comes; None if nothing waits."""
    left = [(asked.age if w.last else min(asked.wait, asked.age)) - fates.seconds(w.since, now) for w in pool.values()]
    return max(0.0, min(left)) if left else None


def clock() -> str:
    """The time, as the records have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def run(
    engine: Engine, reading: Callable[[], Reading], asked: Asked, progress: Progress, told: Told, *, weighed: bool
) -> Round:
    """Runs a round over all that wait, and first what one before left to be folded; `weighed`: the merge is
    Frank-Wolfe's, else the rule of the state folds.

    Raises Misconfigured where nothing waits or the objective cannot be used, Retry (the round stays open and is taken
    up again) and Halt.
    """
    started, state = time.perf_counter(), engine.state
    left = relevance.fold(engine, progress, told)
    pool, now = state.ledger.pool, active(state) if weighed else NONE
    if not pool and not now.weights:
        last = last_round(state)
        if left and last:
            return _after(last, left, started)
        raise Misconfigured(_EMPTY)
    by_layer = weighed and (asked.layers or any(len(w) > 1 for w in now.weights.values()))
    loaded = _load(engine, asked, progress, by_layer=by_layer)
    begun = _begun(engine, asked, pool, weighed)
    members = [
        Member(pool[m["key"]].commit.entry.candidate or {})
        for m in (begun.entry.numbers or {})["members"]
        if m["key"] in pool
    ]
    origin, plan = _origin(reading(), engine, progress, weighed=weighed), asked.plan
    if weighed:
        now = frank_wolfe.room(now, members, plan)
    else:
        plan = dataclasses.replace(plan, most=max(plan.most, len(members)), steps=max(plan.steps, 2 * len(members)))
    try:
        chosen = frank_wolfe.choose(engine, loaded, origin, now, members, asked, plan, progress, told)
        if weighed:
            return _after(commit(engine, loaded, origin, chosen, members, pool, asked, begun, progress), [], started)
    except Refuse as lost:  # it was there when it was scored: the next pass finds it gone
        raise Retry(
            f"{lost}; nothing was settled, and the round goes on without it when it is taken up again"
        ) from lost
    rows = kept_out(chosen, members, pool, asked, begun.time)
    first = sorted(chosen.active.weights, key=lambda key: (-chosen.active.weights[key][0], key))
    rows = [
        *(
            dataclasses.replace(kept(chosen, chosen.active.members[key], "chosen"), place=place)
            for place, key in enumerate(first)
        ),
        *rows,
    ]
    ended = state.record(entry(engine, begun, asked, rows, chosen.numbers))
    return _after(ended, relevance.fold(engine, progress, told), started)


def last_round(state: State) -> Commit | None:
    """The record that ended the last round; None if there was none."""
    return next((c for c in reversed(state.ledger.log) if c.entry.kind == "select"), None)


def _after(ended: Commit, outcomes: Sequence[Outcome], started: float) -> Round:
    """The round that the record `ended`, with what became of those it chose."""
    numbers = ended.entry.numbers or {}
    fates = {(o.commit.entry.candidate or {})["key"]: o for o in outcomes}
    rows = []
    for body in numbers["scores"]:
        row, outcome = Row(**body), fates.get(body["key"])
        if outcome is not None:
            fate = "folded" if outcome.fate == "folded" else "refused"
            row = dataclasses.replace(row, fate=fate, reason=outcome.reason or "", message=outcome.message)
        rows.append(row)
    folds = sum(o.fate == "folded" for o in outcomes) + len(numbers.get("folds", ()))
    figures = {key: numbers[key] for key in ("loss", "before", "gap", "pool_gap", "steps")}
    return Round(rows, figures, ended, folds, time.perf_counter() - started)


def _origin(merge: Reading, engine: Engine, progress: Progress, *, weighed: bool) -> frank_wolfe.Origin:
    """What weights are counted from: the weighted sum that the state holds, or what is published of another rule's
    merge."""
    merge.settle(engine.executor, progress)
    return frank_wolfe.Origin(merge.unit if weighed else merge.vector, merge.need, not weighed)


def look(engine: Engine, reading: Callable[[], Reading], asked: Asked, progress: Progress, *, weighed: bool) -> Round:
    """Scores all that wait at the merge as it is, and tries those whose score is below zero; nothing is folded or
    recorded. Raises as `run`."""
    started, pool = time.perf_counter(), engine.state.ledger.pool
    if not pool:
        raise Misconfigured(_EMPTY)
    loaded, members = (
        _load(engine, asked, progress, by_layer=False),
        [Member(w.commit.entry.candidate or {}) for w in pool.values()],
    )
    origin = _origin(reading(), engine, progress, weighed=weighed)._replace(
        fixed=True
    )  # nobody who is in it is weighed
    search = frank_wolfe.Search(engine, loaded, origin, NONE, members, asked, progress)
    while True:
        try:
            start = search.start()
            loss, _ = search.gradient(start)
            break
        except frank_wolfe.Lost as lost:
            search.lost[lost.key] = lost.refusal
    rows = [fates.lost(m, search.lost[m.key]) for m in members if m.key in search.lost]
    for member in members:
        if member.key not in search.lost:
            search.relevant(member.key, start)
            rows.append(fates.seen(member, search.scores[member.key].total, search.judged.get(member.key), asked))
    loaded.clear()
    rows.sort(key=lambda row: (row.score is None, row.score))
    return Round(rows, {"before": loss, "loss": loss}, None, 0, time.perf_counter() - started)


def _load(engine: Engine, asked: Asked, progress: Progress, *, by_layer: bool) -> Loaded:
    """The model in memory, with its calibration rows."""
    progress("load", 0, 1)
    return Loaded(
        engine, calibration.load(asked.calibration, engine.base.checkpoint.directory, engine.device), by_layer=by_layer
    )


def _begun(engine: Engine, asked: Asked, pool: Mapping[str, Waiting], weighed: bool) -> Commit:
    """The record that begins the round: the one that is open if it asks for the same, else a new one, which has the
    members as they are now."""
    state, numbers = (
        engine.state,
        {
            "mode": "frank-wolfe" if weighed else "relevance",
            "asked": asked.told(),
            "objective": asked.calibration.told(),
        },
    )
    open_round = state.ledger.open_round
    if open_round is not None and {key: (open_round.entry.numbers or {}).get(key) for key in numbers} == numbers:
        return open_round
    members = [{"key": key, "name": (w.commit.entry.candidate or {})["name"]} for key, w in pool.items()]
    message = f"{len(members)} candidate{'s' * (len(members) != 1)}"
    return state.record(
        Entry(kind="round", numbers={**numbers, "members": members}, message=message, software=provenance.software())
    )
