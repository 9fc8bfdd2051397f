"""Takes a model out of a merge.

Where a rule folds by adding, the model is folded once more with minus its weight. Where it does not, or what rounding
would leave of the model could hide one that stays, all models that came later are folded again without it. Either way
the ledger gets one record. Until that record is there nothing has changed, and what a kill leaves behind is removed
when the state is opened next.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial

from continual.engine.blocks import take_out
from continual.engine.engine import Engine
from continual.engine.outcomes import FoldReport, OpenCandidate
from continual.errors import Misconfigured, Refuse, Retry
from continual.executors.contract import Progress, Task
from continual.outside import counted
from continual.records import Totals
from continual.rules import Sums, settle
from continual.state import Commit, Transaction
from continual.state.entries import UnfoldEntry
from continual.state.format import FoldCommit
from continual.state.ledger import weights_at
from continual.tensors import Place, candidate_of, open_model


@dataclass(frozen=True, slots=True)
class Again:
    """A folded model that has to be read once more. `seq` is the number of its record, `nbytes` the bytes of its
    weights; `by_token`: its rows were matched by token."""

    seq: int
    name: str
    place: Place
    digest: str
    weight: float
    nbytes: int
    by_token: bool = False


@dataclass(frozen=True, slots=True)
class Unfolding:
    """What it takes to take a model out of the merge.

    `seq`: the number of the record that folded it. `exact`: it is read once more and subtracted, or taken out without
    being read where `again` is empty; else the models of `again` are folded once more, on the merge of record `start`
    (None: on nothing). Sizes are bytes.
    """

    seq: int
    name: str
    key: str
    exact: bool
    start: int | None
    again: tuple[Again, ...]
    read_bytes: int
    disk_bytes: int

    def line(self) -> str:
        """What will be done, in one line."""
        if self.exact and not self.again:
            return f"{self.name} (record {self.seq}) is taken out; its files are not needed"
        if self.exact:
            return f"{self.name} (record {self.seq}) is read once more and subtracted"
        on = f"on the merge of record {self.start}" if self.start is not None else "from the beginning"
        later = counted(len(self.again), "later model")
        return f"{self.name} (record {self.seq}) is left out, and {later} will be folded again {on}"


def look(engine: Engine, word: str, at: Place | None = None) -> Unfolding:
    """Finds the fold in force that `word` names (a name, path, key or record number), and what it takes to take it out.

    It reads headers only. `at` is where the model is now, if it was moved. Raises Misconfigured if `word` names no fold
    or several, or if a model that has to be read is not there.
    """
    state = engine.state
    rule = engine.rule
    history = state.ledger.history()
    index = _find([fold.commit for fold in history], word)
    gone = history[index].commit
    if state.format.form is not None:
        seq, candidate = gone.seq, gone.entry.candidate
        return Unfolding(seq, candidate.name, candidate.key, True, None, (), 0, state.generation_bytes())
    others = [_weight(fold.commit) for number, fold in enumerate(history) if number != index]
    told_apart = min(others, default=math.inf) >= rule.laws.lightest * _weight(gone)
    exact = rule.laws.rounds or (rule.laws.combine is not None and told_apart)
    start: int | None = None
    needed = [gone]
    if not exact:
        kept = set(state.generations())
        begin = 0
        for number, fold in enumerate(history[:index]):
            if fold.at is not None and fold.at.generation in kept:
                start = fold.at.seq
                begin = number + 1
        needed = [fold.commit for number, fold in enumerate(history) if number >= begin and number != index]
    again = tuple(_locate(engine, commit, at if commit is gone else None, gone) for commit in needed)
    candidate = gone.entry.candidate
    transactions = min(3, len(again))
    return Unfolding(
        seq=gone.seq,
        name=candidate.name,
        key=candidate.key,
        exact=exact,
        start=start,
        again=again,
        read_bytes=sum(model.nbytes for model in again),
        disk_bytes=transactions * state.format.generation_bytes,
    )


def unfold(engine: Engine, plan: Unfolding, progress: Progress) -> Commit:
    """Takes the model of `plan` out of the merge. Returns the record.

    Raises Refuse naming a model whose files are not those that were folded, Retry and Halt. Then the merge is as it was
    before.
    """
    state = engine.state
    began = time.perf_counter()
    if state.format.form is not None:
        return _without(engine, plan, progress)
    if plan.exact:
        (model,) = plan.again
        with state.begin() as transaction:
            report = _stream(engine, transaction, model, state.ledger.totals, -model.weight, progress)
            taken = entry(engine, plan, began, report.totals)
            found = report.numbers
            return state.commit(transaction, replace(taken, tau_norm=found.tau_norm, merged_norm=found.merged_norm))
    generation = state.generation_of(state.ledger.get(plan.start)) if plan.start is not None else None
    totals = state.ledger.totals_at(plan.start) if plan.start is not None else Totals()
    if not plan.again:
        return state.record(entry(engine, plan, began, totals), generation)
    scratch: Transaction | None = None
    try:
        for number, model in enumerate(plan.again, 1):
            with state.begin(generation) as transaction:
                report = _stream(engine, transaction, model, totals, model.weight, progress)
                progress("models", number, len(plan.again))
                if number == len(plan.again):
                    return state.commit(transaction, entry(engine, plan, began, report.totals))
                generation = transaction.seal()
                totals = report.totals
            if scratch is not None:
                scratch.abandon()
            scratch = transaction
    finally:
        if scratch is not None:
            scratch.abandon()
    raise AssertionError("the last model commits")


def _without(engine: Engine, plan: Unfolding, progress: Progress) -> Commit:
    """Takes an adapter out of a state that keeps adapters as they are."""
    state, began = engine.state, time.perf_counter()
    fold = next(c for c in state.ledger.folds() if (c.seq, c.entry.candidate.key) == (plan.seq, plan.key))
    numbers = fold.entry.numbers
    assert numbers.block is not None
    with state.begin(writes=plan.disk_bytes) as transaction:
        layers = [layer.name for layer in state.format.layers]
        tasks = [Task(name, 0, partial(take_out, transaction, name, numbers.block)) for name in layers]
        progress("unfold", 0, len(tasks))
        for done, _ in enumerate(engine.executor.map(tasks), 1):
            progress("unfold", done, len(tasks))
        weights = weights_at(state.ledger)
        mine = (weights or {}).get(plan.key) or (numbers.weight or 1.0,)
        left = settle(state.ledger.totals, Sums(numbers.tau_norm**2), -sum(mine) / len(mine))
        taken = replace(entry(engine, plan, began, left), tau_norm=numbers.tau_norm)
        if weights is not None:
            others = {key: each for key, each in weights.items() if key != plan.key}
            taken = replace(taken, active=others, rest=())
        return state.commit(transaction, taken)


def entry(engine: Engine, plan: Unfolding, began: float, totals: Totals) -> UnfoldEntry:
    """The record that takes the model of `plan` out. `began` is when that work did, by `time.perf_counter`; `totals`
    are those without the model."""
    folds = engine.state.ledger.folds()
    fold = next(c for c in folds if (c.seq, c.entry.candidate.key) == (plan.seq, plan.key))
    return UnfoldEntry(
        candidate=fold.entry.candidate,
        digest=fold.entry.digest,
        message=f"{plan.name}: record {plan.seq} taken out in {time.perf_counter() - began:.1f} s",
        totals=totals,
        of=plan.seq,
        key=plan.key,
        again=() if plan.exact else tuple(model.seq for model in plan.again),
        device=str(engine.device),
    )


def changed(again: Again) -> Refuse:
    """The refusal of a model whose files are not those that were folded."""
    return Refuse(
        "changed",
        f"{again.place} does not hold what was folded as record {again.seq} ({again.name}) any more: nothing was "
        "changed; if the model is somewhere else now, name the place with --at",
    )


def _stream(
    engine: Engine,
    transaction: Transaction,
    again: Again,
    totals: Totals,
    weight: float,
    progress: Progress,
) -> FoldReport:
    with open_model(again.place) as model:
        candidate = candidate_of(model)
        opened = OpenCandidate(candidate, model, engine.lineage(model, by_token=again.by_token), weight)
        report = engine.stream(transaction, opened, totals, progress)
    if report.digest != again.digest:
        raise changed(again)
    return report


def _find(folds: list[FoldCommit], word: str) -> int:
    found = [i for i, fold in enumerate(folds) if word == str(fold.seq) or fold.entry.candidate.answers(word)]
    if not found:
        raise Misconfigured(
            f"{word}: no model of this name, path, key or record number is in the merge; see 'continual log'"
        )
    if len(found) > 1:
        names = ", ".join(
            f"{folds[i].entry.candidate.name} (record {folds[i].seq}, key {folds[i].entry.candidate.key})"
            for i in found
        )
        raise Misconfigured(
            f"{word}: {len(found)} models in the merge answer to it: {names}; "
            "name one by its record number, or by its key"
        )
    return found[0]


def _locate(engine: Engine, commit: FoldCommit, moved: Place | None, gone: FoldCommit) -> Again:
    candidate = commit.entry.candidate
    place = moved or engine.locate(candidate)
    is_gone = commit is gone
    why = f"{gone.entry.candidate.name} cannot be taken out of this merge without folding the others again, and "
    try:
        with open_model(place) as model:
            nbytes = model.nbytes
    except (Refuse, Retry) as error:
        advice = "name where it is now with --at" if is_gone else f"put {candidate.name} back, or roll back"
        raise Misconfigured(
            f"{'' if is_gone else why}{candidate.name} (record {commit.seq}) cannot be read: {error}; {advice}"
        ) from None
    by_token = bool(commit.entry.numbers.tokens)
    return Again(commit.seq, candidate.name, place, commit.entry.digest, _weight(commit), nbytes, by_token)


def _weight(commit: FoldCommit) -> float:
    weight = commit.entry.numbers.weight
    return 1.0 if weight is None else weight
