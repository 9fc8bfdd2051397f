"""One round over the pool, from the record that begins it to the record that ends it. A round that was killed is taken
up again with the same members, and makes the same choice. When a round is due is in `due`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import NamedTuple

from continual.engine.engine import Engine
from continual.engine.outcomes import Outcome
from continual.engine.reading import Reading
from continual.errors import Misconfigured, Refuse, Retry
from continual.executors.contract import Progress
from continual.objectives import calibration
from continual.selection import beside, commit, fates, frank_wolfe, last_word, relevance
from continual.selection.active import NONE, active_at
from continual.selection.commit import OpenRound
from continual.selection.frank_wolfe import MergedVector, SearchSpace
from continual.selection.in_memory import ModelInMemory
from continual.selection.members import Member
from continual.selection.newest import last_round
from continual.selection.round_options import RoundOptions
from continual.selection.steps import Stepping, Taken
from continual.state import Commit, State
from continual.state.entries import RoundEntry, SelectEntry
from continual.state.ledger import Waiting
from continual.state.parts import MemberFate, MemberName, RowFate
from continual.tensors import BaseModel

_EMPTY = "nothing waits in the pool; 'continual fold MODEL' puts a model there, and so does the daemon"
HearRound = Callable[[Outcome | Taken], None]
"""Called with each fold, or step, of a round as it is made."""


class Round(NamedTuple):
    """What a round came to: the fate of each member (`rows`), the `loss` of the driving rows after it and `before` it,
    the record that ended it (None of a dry run), how many models were folded, and its wall time in seconds. A dry run
    has no `gap`, `pool_gap` and `steps`; SelectEntry says what they are. `cut`: where it weighs the models of a state
    of adapters, the shares of ‖τ‖² that it cut off to make room, by the models' names."""

    rows: list[MemberFate]
    loss: float
    before: float
    commit: Commit | None
    folds: int
    seconds: float
    gap: float | None = None
    pool_gap: float | None = None
    steps: int | None = None
    cut: Mapping[str, float] = MappingProxyType({})

    @property
    def refused(self) -> bool:
        """Whether it kept a model out for good."""
        return any(row.fate in ("refused", "expired") for row in self.rows)


class Ground(NamedTuple):
    """What a round runs on. `reading` reads the merged model of a state as it is now: of that of `engine`, or of one
    made of it on trial. `weighed`: the merged model is a weighted sum that Frank-Wolfe makes; else the rule of the
    state folds the models that the round chooses. weights(): the base with its weights, open as long as the block runs;
    a state of adapters opens it for a round alone."""

    engine: Engine
    reading: Callable[[State], Reading]
    weighed: bool
    weights: Callable[[], AbstractContextManager[BaseModel]]


def run(ground: Ground, options: RoundOptions, progress: Progress, hear: HearRound) -> Round:
    """Runs a round over all that wait. First folds what an earlier round chose and did not come to fold.

    Raises Misconfigured where nothing waits or the objective cannot be used, Retry (the round stays open, and is taken
    up again) and Halt.
    """
    started, again = time.perf_counter(), False
    while True:
        try:
            found = _run(ground, options, progress, hear, again=again)
            return found._replace(seconds=time.perf_counter() - started)
        except beside.NoRoom as full:  # here the base is closed and the model let go, before they are opened anew
            hear(full.outcome)
            again = True


def _run(ground: Ground, options: RoundOptions, progress: Progress, hear: HearRound, *, again: bool) -> Round:
    """As `run`, until a member is settled for which there is no room. Raises NoRoom then; `again`: it did, and the
    round has to end also where nobody is left."""
    started = time.perf_counter()
    engine = ground.engine
    state = engine.state
    left = relevance.fold(engine, progress, hear)
    pool = state.ledger.pool
    now = active_at(state) if ground.weighed else NONE
    if not pool and not now.weights and not again:
        last = last_round(state)
        if left and last:
            return _after(last, left, started)
        raise Misconfigured(_EMPTY)
    by_layer = ground.weighed and (options.layers or any(len(w) > 1 for w in now.weights.values()))
    with ground.weights() as base:
        model = _load(engine.reading_from(base), options, progress, by_layer=by_layer)
        begun = _begin(ground, options, pool)
        keys = [member.key for member in begun.of_kind(RoundEntry).members]
        members = [Member(pool[key].candidate) for key in keys if key in pool]
        under_way = OpenRound(engine, options, begun, members, pool)
        stepping = options.stepping
        if ground.weighed:
            now = frank_wolfe.room(now, members, stepping.most)
        else:
            stepping = _for_all(stepping, len(members))
        space = SearchSpace(model, _merged_vector(ground, progress), now, members)
        try:
            chosen = frank_wolfe.choose(space, options, stepping, progress, hear)
            if ground.weighed:
                write = commit.write_sum if state.format.form is None else beside.write
                return _after(write(under_way, space, chosen, progress), [], started)
            word = last_word.ask(space, chosen, options, ground.reading, progress)
        except Refuse as lost:  # it was there when it was scored: the next pass finds it gone
            raise Retry(
                f"{lost}; nothing was settled, and the round goes on without it when it is taken up again"
            ) from lost
    rows = [*commit.to_fold(under_way, chosen, word), *commit.kept_out(under_way, chosen, word)]
    ended = state.record(commit.entry(under_way, rows, chosen.figures))
    return _after(ended, relevance.fold(engine, progress, hear), started)


def look(ground: Ground, options: RoundOptions, progress: Progress) -> Round:
    """Scores all that wait at the merged model as it is, and tries those whose score is below zero. Nothing is folded
    or recorded. Raises as `run` does."""
    started = time.perf_counter()
    engine = ground.engine
    pool = engine.state.ledger.pool
    if not pool:
        raise Misconfigured(_EMPTY)
    with ground.weights() as base:
        rows, loss = _looked(ground, engine.reading_from(base), options, progress)
    rows.sort(key=lambda row: (row.score is None, row.score))
    return Round(rows, loss, loss, None, 0, time.perf_counter() - started)


def _looked(
    ground: Ground, engine: Engine, options: RoundOptions, progress: Progress
) -> tuple[list[MemberFate], float]:
    """What is found of each member that waits, and the loss of the driving rows."""
    model = _load(engine, options, progress, by_layer=False)
    members = [Member(w.candidate) for w in engine.state.ledger.pool.values()]
    merged = _merged_vector(ground, progress)._replace(fixed=True)  # no model that is in it is weighed
    search = frank_wolfe.Search(SearchSpace(model, merged, NONE, members), options, progress)
    while True:
        try:
            start = search.start()
            loss, _ = search.gradient(start)
            break
        except frank_wolfe.Lost as lost:
            search.lose(lost)
    rows = [fates.lost(m, search.lost[m.key]) for m in members if m.key in search.lost]
    for member in members:
        if member.key not in search.lost:
            search.relevant(member.key, start)
            score = search.scores[member.key].total
            rows.append(fates.seen(member, score, search.judged.get(member.key), options))
    model.clear()
    return rows, loss


def _load(engine: Engine, options: RoundOptions, progress: Progress, *, by_layer: bool) -> ModelInMemory:
    """Loads the model, with its calibration rows."""
    progress("load", 0, 1)
    losses = calibration.load(options.calibration, engine.weights.checkpoint.directory, engine.device)
    return ModelInMemory(engine, losses, by_layer=by_layer)


def _begin(ground: Ground, options: RoundOptions, pool: Mapping[str, Waiting]) -> Commit:
    """The record that begins the round. It is the one of the open round, where that asked for the same; else a new one,
    with the members as they are now."""
    state = ground.engine.state
    entry = RoundEntry(
        message=f"{len(pool)} candidate{'s' * (len(pool) != 1)}",
        mode="frank-wolfe" if ground.weighed else "relevance",
        asked=options.told(),
        objective=options.calibration.told(),
        members=tuple(MemberName(key, waiting.candidate.name) for key, waiting in pool.items()),
    )
    open_round = state.ledger.open_round
    if open_round is not None and open_round.of_kind(RoundEntry).asks_as(entry):
        return open_round
    return state.record(entry)


def _merged_vector(ground: Ground, progress: Progress) -> MergedVector:
    """What weights are counted from: the weighted sum that the state holds; of another rule, the merged model as it is
    published."""
    reading = ground.reading(ground.engine.state)
    reading.settle(ground.engine.executor, progress)
    return MergedVector(reading.unit if ground.weighed else reading.vector, reading.need, fixed=not ground.weighed)


def _for_all(stepping: Stepping, members: int) -> Stepping:
    """Under relevance all members may be chosen, and there are at least two steps for each."""
    return dataclasses.replace(stepping, most=max(stepping.most, members), steps=max(stepping.steps, 2 * members))


def _after(ended: Commit, outcomes: Sequence[Outcome], started: float) -> Round:
    """The round that the record `ended` ends, with what became of the models that it chose."""
    entry = ended.of_kind(SelectEntry)
    folded = {outcome.key: outcome for outcome in outcomes}
    return Round(
        rows=[_settled(row, folded.get(row.key)) for row in entry.scores],
        loss=entry.loss,
        before=entry.before,
        commit=ended,
        folds=sum(outcome.fate == "folded" for outcome in outcomes) + len(entry.folds or ()),
        seconds=time.perf_counter() - started,
        gap=entry.gap,
        pool_gap=entry.pool_gap,
        steps=entry.steps,
    )


def _settled(row: MemberFate, outcome: Outcome | None) -> MemberFate:
    """The fate of a member, as the fold that came after the round settled it."""
    if outcome is None:
        return row
    fate: RowFate = "folded" if outcome.fate == "folded" else "refused"
    return dataclasses.replace(row, fate=fate, reason=outcome.reason or "", message=outcome.message)
