"""What a Frank-Wolfe round decided, written into a state that keeps adapters: who enters stands beside the others, who
leaves is taken out, and a weight is a number in the record.

Every model of such a state can be weighed in every round. Those that a round has no place for move together, as what is
not weighed any more does in a state of whole tensors, and keep a weight each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from continual.engine.blocks import block_of, exchange, free_numbers, room
from continual.engine.engine import Engine
from continual.engine.outcomes import Outcome
from continual.errors import Refuse
from continual.executors.contract import Progress, Task
from continual.gates import Numbers
from continual.records import TensorSpec, Totals
from continual.selection.active import Active, active_at
from continual.selection.commit import OpenRound, entry, kept, kept_out, mean, totals, with_those_that_leave
from continual.selection.frank_wolfe import Chosen, SearchSpace, together, wide
from continual.selection.members import Member, Opened, opened, over
from continual.state import Commit, State, Transaction
from continual.state.entries import RefuseEntry
from continual.state.parts import BroughtFold, FoldNumbers, MemberFate
from continual.tensors import ThinVector, digest_of

Weights = dict[str, tuple[float, ...]]


class NoRoom(Exception):
    """The width leaves too little of a member, which is refused by now: the round has to choose again without it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


class _Lost(NamedTuple):
    """What cuts took of a model's ‖τ‖²: of `all` of it, and of what was changed by more than thin factors (`whole`)."""

    all: float
    whole: float


class _Move(NamedTuple):
    """How the blocks change: the numbers of those that go, and who comes, opened, under which numbers."""

    gone: Sequence[int]
    coming: Mapping[int, Opened]


def write(under_way: OpenRound, space: SearchSpace, chosen: Chosen, progress: Progress) -> Commit:
    """Makes the choice one durable step, with the fate of every member: a generation where a model enters or leaves,
    else a record alone. Raises Refuse where a member's files are gone by now, Retry; then nothing is settled. Raises
    NoRoom."""
    engine = space.model.engine
    state = engine.state
    now = active_at(state)
    weighed = chosen.active
    entering = [member for member in under_way.members if member.key in weighed.weights]
    digests = _digests(engine, entering, progress)
    weights, twins = _without_twins(state, weighed, _all(now, space.now, weighed), digests)
    out = [key for key in now.members if key not in weights]
    rows = kept_out(with_those_that_leave(under_way, now, out, chosen), chosen)
    shown = chosen._replace(active=weighed._replace(weights=weights))
    rows = [*(kept(shown, key) for key in weighed.weights if key in weights), *twins, *rows]
    ended = entry(under_way, rows, chosen.figures)
    if weights == now.weights:
        return state.record(ended)
    members = {key: member for key, member in {**now.members, **weighed.members}.items() if key in weights}
    after = Active(weights, (), members, {**now.norms, **weighed.norms})
    ended = dataclasses.replace(ended, totals=totals(after, 0.0), active=weights, rest=(), folds=(), out=tuple(out))
    entered = [member for member in entering if member.key in weights]
    if not entered and not out:
        return state.record(ended)
    called = dict(zip(free_numbers(state, len(entered)), entered, strict=True))
    gone = [fold.entry.numbers.block or 0 for fold in state.ledger.folds() if fold.entry.candidate.key in out]
    with ExitStack() as files:
        coming = {number: files.enter_context(opened(engine, member)) for number, member in called.items()}
        transaction = files.enter_context(state.begin(writes=_writes(engine, coming.values())))
        lost = _blocks(engine, transaction, _Move(gone, coming), progress)
        engine.go_on("the round")
        folds = []
        for number, member in called.items():
            norm = after.norms[member.key]
            square = norm**2 or 1.0
            _has_room(engine, member, lost[number].whole / square)
            found = FoldNumbers(
                tau_norm=norm, weight=mean(weights[member.key]), block=number, cut=lost[number].all / square
            )
            folds.append(BroughtFold(member.candidate, digests[member.key], found))
        return state.commit(transaction, dataclasses.replace(ended, folds=tuple(folds)))


def _writes(engine: Engine, coming: Iterable[Opened]) -> int:
    """Bytes that a round writes at most: what is there anew, and what comes."""
    specs = {spec.name: spec for spec in engine.base.specs}
    layers = [(member.files.layers, member.changed) for member in coming]
    new = [room(engine.state, mine, [specs[name] for name in changed]).nbytes for mine, changed in layers if mine]
    return engine.state.generation_bytes() + sum(new)


def _all(now: Active, searched: Active, weighed: Active) -> Weights:
    """The weights of all models: those that were weighed, and those that moved together."""
    found = dict(weighed.weights)
    for key, before in now.weights.items():
        if key in searched.weights:
            continue
        width = max(len(before), len(searched.rest), len(weighed.rest))
        shares = zip(*(wide(each or (0.0,), width) for each in (before, searched.rest, weighed.rest)), strict=True)
        after = tuple(weight * (left / all_) if all_ else 0.0 for weight, all_, left in shares)
        if any(after):
            found[key] = after
    return found


def _digests(engine: Engine, members: Sequence[Member], progress: Progress) -> dict[str, str]:
    """The content digests of members that enter. Raises Refuse where one is gone, Retry."""
    specs = {spec.name: spec for spec in engine.base.specs}

    def look(_: Member, found: Opened) -> str:
        found.files.begin()
        return digest_of({name: [*found.files.vectors_of(specs[name])][-1].digest for name in found.changed})

    digests: dict[str, str] = {}
    for key, digest in over(engine, members, look, "hash", progress).items():
        if isinstance(digest, Refuse):
            raise digest
        digests[key] = digest
    return digests


def _without_twins(
    state: State, weighed: Active, weights: Weights, digests: Mapping[str, str]
) -> tuple[Weights, list[MemberFate]]:
    """Gives the weight of a model that is in the state already, under another name, to the one that is there; the sum
    does not change. Returns the weights, and the fates of the twins."""
    seen: dict[str, str] = {}
    twins: list[MemberFate] = []
    for key, digest in digests.items():
        known = state.ledger.folded_digest(digest)
        first = known.entry.candidate.key if known else seen.setdefault(digest, key)
        if first == key:
            continue
        weight = weights.pop(key)
        weights[first] = together(weights.get(first, (0.0,)), weight, len(weight))
        name = weighed.members[key].name
        of = known.entry.candidate.name if known else weighed.members[first].name
        twins.append(MemberFate(key, name, "refused", "duplicate", f"{name}: duplicate of {of}: the same tensors"))
    return weights, twins


def _has_room(engine: Engine, member: Member, cut: float) -> None:
    """Settles a member of which the width leaves too little. Raises NoRoom then."""
    try:
        engine.gates.at_numbers(Numbers(member.name, 1.0, None, Totals(), cut))
    except Refuse as refusal:
        by, said = dict(refusal.settings) or None, str(refusal)
        refused = RefuseEntry(candidate=member.candidate, reason=refusal.reason, message=said, settings=by)
        commit = engine.state.record(refused)
        raise NoRoom(Outcome("refused", member.name, said, refusal.reason, commit)) from None


def _blocks(engine: Engine, transaction: Transaction, move: _Move, progress: Progress) -> dict[int, _Lost]:
    """Writes every layer; of each model that comes what cuts took of its ‖τ‖². Raises Refuse, Retry, Abandoned."""
    form = engine.state.format.form
    assert form is not None
    for member in move.coming.values():
        member.files.begin()

    def one(spec: TensorSpec) -> dict[int, _Lost]:
        each = {n: member.files.vectors_of(spec) for n, member in move.coming.items() if spec.name in member.changed}
        found: dict[int, _Lost] = {}
        for layer in spec.layers:
            engine.go_on("the round")
            vectors = {n: next(mine) for n, mine in each.items()}
            coming = {n: block_of(vector, layer, form.width, engine.device) for n, vector in vectors.items()}
            for n, cut in exchange(transaction, layer.name, move.gone, coming).items():
                whole = 0.0 if isinstance(vectors[n], ThinVector) else cut
                before = found.get(n, _Lost(0.0, 0.0))
                found[n] = _Lost(before.all + cut, before.whole + whole)
        return found

    specs = [spec for spec in engine.base.specs if spec.kind != "carried"]
    slots = engine.state.format.slots
    needs = [4 * sum(slot.nbytes for slot in slots[spec.layers[0].name].values()) for spec in specs]
    tasks = [Task(spec.name, need, partial(one, spec)) for spec, need in zip(specs, needs, strict=True)]
    lost = dict.fromkeys(move.coming, _Lost(0.0, 0.0))
    progress("fold", 0, len(tasks))
    for done, (_, found) in enumerate(engine.executor.map(tasks), 1):
        for number, cut in found.items():
            lost[number] = _Lost(lost[number].all + cut.all, lost[number].whole + cut.whole)
        progress("fold", done, len(tasks))
    for member in move.coming.values():
        member.check_unchanged()
    return lost
