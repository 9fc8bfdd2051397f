"""Builds a state again, step by step, and compares what comes of it with what there is, bit for bit."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

from continual.engine import combining, unfolding
from continual.engine.engine import Engine
from continual.engine.unfolding import Again, Unfolding
from continual.errors import Misconfigured, Refuse
from continual.executors.contract import Progress
from continual.replay.comparing_states import differing_receipts, differing_totals, differing_values, other_software
from continual.replay.replay_rounds import choose_again
from continual.replay.replay_sources import FoundModel, reopened
from continual.replay.replay_steps import NeededModel, ReplayPlan, ReplayStep, folds_again, start_of
from continual.selection import subtract
from continual.state import Commit, State
from continual.state.entries import CombineEntry, FoldEntry, SelectEntry, UnfoldEntry
from continual.state.format import FoldCommit
from continual.stores import Where
from continual.tensors import open_model


@dataclass(frozen=True, slots=True)
class Replayed:
    """What building a state again came to. `records`: so many were made, of which so many (`compared`) could be
    compared by the checksums of every tensor, as the generation is still there; of the others the totals were.
    `tensors`: those of the newest merge, of which every byte was. `differs`: what is not equal, by name; `left_out`:
    what was not built again; `software`: versions and devices of records that are others than here."""

    directory: str
    equal: bool
    records: int
    compared: int
    tensors: int
    differs: tuple[str, ...]
    left_out: tuple[str, ...]
    software: tuple[str, ...]


def begin(source: State, directory: Where) -> None:
    """Makes an empty state like `source` in `directory`, under an id of its own, unless there is one: then it is gone
    on with. Raises Misconfigured where something else is there, Busy and Retry."""
    if (directory / "format.json").exists():
        with State.open(directory) as there:
            if replace(there.format, id="") != replace(source.format, id=""):
                raise Misconfigured(f"{directory} is a state of another base, rule or form: name a new directory")
        return
    first = source.ledger.get(0).entry
    made = replace(source.format, id=secrets.token_hex(16))
    State.create(directory, made, read=first.read or {}, device=first.device or "cpu").close()


def rebuild(
    source: State,
    target: Engine,
    plan: ReplayPlan,
    found: Mapping[str, FoundModel],
    parts: Mapping[int, State],
    progress: Progress,
) -> Replayed:
    """Makes the records of `plan` in the state of `target`, those that are there already (`begin`) excepted, and
    compares. `parts`: states that were built again, by the record that combines each. Raises Misconfigured where what
    is there is something else, Refuse for a model that is not what it was when it was looked at, Retry and Halt; what
    was made stays, and is gone on with the next time."""
    state, steps = target.state, plan.steps
    _must_be_begun(state, steps)
    differs: list[str] = []
    compared = 0
    seqs = {step.commit.seq: number for number, step in enumerate(steps, 1) if step.changes}
    starts = {seqs[at] for step in steps if step.kind == "unfold" and (at := start_of(source, step.commit)) in seqs}
    going = Rebuilding(source, target, found, (seqs, parts), progress)
    with contextlib.ExitStack() as leases:
        for number in sorted(starts):
            if number <= state.ledger.head.seq:
                leases.enter_context(state.lease(number))
        for number, step in enumerate(steps, 1):
            if number > state.ledger.head.seq:
                progress("replay", number - 1, len(steps))
                going.make(step)
                assert state.ledger.head.seq == number, "one record a step"
                if number in starts:
                    leases.enter_context(state.lease(number))
                state.expire(1)
            if step.changes:
                differs += differing_totals(source, step.commit, state, number)
                told = differing_receipts(source, step.commit, state, number)
                compared += told is not None
                differs += told or ()
        progress("replay", len(steps), len(steps))
        tensors, last = differing_values(source, state, target.executor, progress)
    for one in last:
        if one not in differs:
            differs.append(one)
    if dict(source.ledger.read_options(source.ledger.head.seq)) != dict(
        state.ledger.read_options(state.ledger.head.seq)
    ):
        differs.append("how the merge is read")
    software = other_software([step.commit for step in steps if step.changes], str(target.device))
    return Replayed(
        str(state.path), not differs, len(steps), compared, tensors, tuple(differs), plan.left_out, software
    )


def _must_be_begun(state: State, steps: tuple[ReplayStep, ...]) -> None:
    """Raises Misconfigured where the records of a state are not the first of the steps."""
    made = state.ledger.log[1:]
    for number, commit in enumerate(made):
        step = steps[number] if number < len(steps) else None
        kind = None if step is None else "tune" if step.kind == "read" else step.kind
        same = step is not None and kind == commit.kind and (step.kind == "tag" or step.commit.key == commit.key)
        if not same:
            raise Misconfigured(
                f"{state.path}: its record {commit.seq} is no part of this ledger: name a new directory"
            )


class Rebuilding:
    """Makes one record after the other. `seqs`: that of each record, by its number in the ledger; `parts`: the states
    that are combined."""

    def __init__(
        self,
        source: State,
        target: Engine,
        found: Mapping[str, FoundModel],
        made: tuple[Mapping[int, int], Mapping[int, State]],
        progress: Progress,
    ) -> None:
        self.source, self.target, self.found = source, target, found
        self.seqs, self.parts = made
        self.progress = progress

    def make(self, step: ReplayStep) -> None:
        """Makes the record of a step. Raises Refuse, Retry and Halt."""
        state, entry = self.target.state, step.commit.entry
        if step.kind == "tag":
            state.tag(step.tag, self.seqs[step.commit.seq])
        elif isinstance(entry, FoldEntry):
            self._fold(step.commit, entry)
        elif isinstance(entry, UnfoldEntry):
            self._unfold(step.commit, entry)
        elif isinstance(entry, SelectEntry):
            places = {key: one.place for key, one in self.found.items()}
            choose_again(self.target, entry, places, self.progress)
        elif isinstance(entry, CombineEntry):
            engine = self.target
            combining.combine(state, self.parts[step.commit.seq], engine.rule, engine.executor, self.progress)
        else:
            state.record(entry)

    def _fold(self, commit: Commit, entry: FoldEntry) -> None:
        engine, state = self.target, self.target.state
        weight = 1.0 if entry.numbers.weight is None else entry.numbers.weight
        needed = NeededModel(commit.seq, entry.candidate, entry.digest, weight, bool(entry.numbers.tokens))
        place = self.found[entry.candidate.key].place
        assert place is not None, "it was found"
        with open_model(place) as model:
            opened = reopened(engine, model, needed)
            with state.begin(writes=engine.writes(opened)) as transaction:
                report = engine.stream(transaction, opened, state.ledger.totals, self.progress)
                if report.digest != entry.digest:
                    raise Refuse("changed", f"{place}: its files are others than a moment ago; start again")
                kept = entry.numbers
                numbers = replace(
                    report.numbers, relevance=kept.relevance, warnings=kept.warnings, evaluated=kept.evaluated
                )
                made = replace(entry, totals=report.totals, numbers=numbers, device=report.device)
                state.commit(transaction, made)

    def _unfold(self, commit: Commit, entry: UnfoldEntry) -> None:
        state, rule = self.target.state, self.target.rule
        history = [fold.commit for fold in self.source.ledger.history(commit.seq - 1)]
        gone = next(fold for fold in history if (fold.seq, fold.key) == (entry.of, entry.key))
        exact, start = not folds_again(self.source, entry), start_of(self.source, commit)
        again = [gone] if exact else [fold for fold in history if fold.seq in entry.again and fold is not gone]
        plan = Unfolding(
            seq=self.seqs[entry.of],
            name=entry.candidate.name,
            key=entry.key,
            exact=exact,
            start=None if start is None else self.seqs[start],
            again=() if state.format.form is not None else tuple(self._again(fold) for fold in again),
            read_bytes=0,
            disk_bytes=state.generation_bytes(),
        )
        take_out = subtract if rule.laws.rounds and state.format.form is None else unfolding.unfold
        take_out(self.target, plan, self.progress)

    def _again(self, fold: FoldCommit) -> Again:
        found, numbers = self.found[fold.key or ""], fold.entry.numbers
        assert found.place is not None, "it was found"
        weight = 1.0 if numbers.weight is None else numbers.weight
        return Again(
            self.seqs[fold.seq],
            fold.entry.candidate.name,
            found.place,
            fold.entry.digest,
            weight,
            fold.entry.candidate.nbytes,
            bool(numbers.tokens),
        )
