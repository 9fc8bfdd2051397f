"""Adds the folds of another state of the same base to a state, as if its models had been folded here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from continual.engine.block_reading import StoredLayers, cut_since
from continual.engine.blocks import put_all
from continual.engine.models_inputs import check_inputs
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.executors.contract import Executor, Progress, Task
from continual.lazily import torch
from continual.outside import counted
from continual.records import TensorSpec, Totals
from continual.rules import ReadOptions, Rule, reader, rule_of, together
from continual.state import Commit, State, Transaction
from continual.state.entries import CombineEntry
from continual.state.format import Format
from continual.state.parts import BroughtFold, FoldNumbers


class Combined(NamedTuple):
    """The record of a combination, and what it cut off to make room in a state of adapters: the share of ‖τ‖² of each
    model that lost some, by its name."""

    commit: Commit
    cut: Mapping[str, float]


def combine(state: State, other: State, rule: Rule, executor: Executor, progress: Progress) -> Combined:
    """Adds the folds in force of `other` to `state`, which is open for writing.

    Raises Misconfigured as `check`; Retry and Halt. Then the state is as it was before.
    """
    check(state, other, rule)
    if state.format.form is not None:
        return _combine_blocks(state, other, executor, progress)
    assert rule.laws.combine is not None
    totals = together(state.ledger.totals, other.ledger.totals)
    at = other.ledger.head.seq
    with other.lease(at), state.begin() as transaction:
        tasks = [
            Task(
                spec.name,
                2 * sum(slot.nbytes for slot in rule.slots(spec).values()) // max(1, spec.experts),
                partial(_add, transaction, other, rule, totals, spec, at),
            )
            for spec in state.format.tensors
            if spec.kind != "carried"
        ]
        squares: dict[str, float] = {}
        progress("combine", 0, len(tasks))
        for name, merged_sq in executor.map(tasks):
            squares[name] = merged_sq
            progress("combine", len(squares), len(tasks))
        transaction.measured(squares)
        folds = tuple(
            BroughtFold(c.entry.candidate, c.entry.digest, _kept(c.entry.numbers)) for c in other.ledger.folds()
        )
        entry = CombineEntry(
            totals=replace(totals, merged_sq=math.fsum(squares.values())),
            of=other.id,
            seq=at,
            folds=folds,
            message=f"{counted(len(folds), 'model')} of the state {other.path.absolute()}, record {at}",
            device="cpu",
        )
        return Combined(state.commit(transaction, entry), {})


def check(state: State, other: State, rule: Rule) -> None:
    """Raises Misconfigured if `other` cannot be added to `state`: folding is no addition for the rule, the states have
    other bases, rules or options, a model is in both, or nothing is folded in `other`. States of adapters keep the same
    whatever their rules: there the rule of `state` stands, and has to take the weights of the others."""
    if rule.laws.rounds:
        raise Misconfigured(
            f"{rule.name} weighs its models together: let the models of both states wait for rounds of one"
        )
    blocks = state.format.form is not None
    if rule.laws.combine is None and not blocks:
        why = "keeps of each model what there is room for among all" if rule.laws.order_free else "depends on the order"
        raise Misconfigured(
            f"{rule.name} {why}, so two of its states cannot be combined; 'continual rules' says which can"
        )
    if state.id == other.id:
        raise Misconfigured(
            f"{state.path} and {other.path} are one state, or copies of one: what they share would count twice"
        )
    ours, theirs = state.format, other.format
    their = rule_of(theirs.rule, theirs.options)
    if not blocks and (rule.name, dict(rule.options)) != (their.name, dict(their.options)):
        raise Misconfigured(
            f"{state.path} is {_named(rule.name, rule.options)} and {other.path} is "
            f"{_named(their.name, their.options)}: they have to be the same"
        )
    if ours.form != theirs.form:
        raise Misconfigured(
            f"{state.path} keeps {_form(ours)} and {other.path} keeps {_form(theirs)}: they have to be the same"
        )
    if (ours.tensors, ours.base.digests, ours.base.headers) != (
        theirs.tensors,
        theirs.base.digests,
        theirs.base.headers,
    ):
        differing = next(_differing(ours.base.digests, theirs.base.digests), None)
        raise Misconfigured(
            f"{state.path} and {other.path} are of different bases"
            + (f": tensor {differing} differs" if differing else ", or treat their tensors differently")
        )
    if not other.ledger.folds():
        raise Misconfigured(f"{other.path}: nothing is folded there")
    if both := [c for c in other.ledger.folds() if c.entry.digest and state.ledger.folded_digest(c.entry.digest)]:
        names = ", ".join(c.entry.candidate.name for c in both[:5])
        raise Misconfigured(
            f"{counted(len(both), 'model')} {'is' if len(both) == 1 else 'are'} in both states ({names}): "
            "unfold from one what is in the other, else it would count twice"
        )
    if blocks:
        check_inputs(
            state, reader(rule, _now(state).rule, blocks=True), [c.entry.candidate for c in other.ledger.folds()]
        )
    if blocks and any(weight != 1.0 for weight in _weights(other).values()):
        by = reader(rule, _now(state).rule, blocks=True)
        if even := [one.name for one in (rule, by) if not (one.laws.weighted or one.laws.rounds)]:
            raise Misconfigured(
                f"{other.path} reads some of its models with weights other than 1, which {even[0]} does not take: "
                "combine into a state of a rule that does, and that is read by one ('continual rules')"
            )


def _weights(other: State) -> dict[int, float]:
    """The weight that each adapter of a state is read with, by its number: that of its fold, of the newest round, or
    what was tuned."""
    return ReadView().chosen(other, other.ledger.head.seq, dict(_now(other).weights))


def _now(state: State) -> ReadOptions:
    return ReadOptions.from_mapping(state.ledger.read_options(state.ledger.head.seq))


def _combine_blocks(state: State, other: State, executor: Executor, progress: Progress) -> Combined:
    """Puts the adapters of `other` beside those of `state`; both keep adapters as they are, whatever their rules."""
    ours, theirs = state.ledger.folds(), other.ledger.folds()
    weights, shares = _weights(other), StoredLayers(other, other.ledger.head).cut(theirs)
    before = StoredLayers(state, state.ledger.head).cut(ours)
    taken = {fold.entry.numbers.block for fold in ours}
    free = (number for number in itertools.count(1) if number not in taken)
    places = {fold.entry.numbers.block or 0: next(free) for fold in theirs}
    generation = other.generation_of(other.ledger.head)
    assert generation is not None, "something is folded there"
    layers = state.format.layers
    writes = state.generation_bytes() + other.generation_bytes()
    with other.lease(other.ledger.head.seq), state.begin(writes=writes) as transaction:
        tasks = [
            Task(
                layer.name,
                4 * sum(slot.nbytes for slot in state.format.slots[layer.name].values()),
                partial(put_all, transaction, generation, layer.name, places),
            )
            for layer in layers
        ]
        progress("combine", 0, len(tasks))
        for done, _ in enumerate(executor.map(tasks), 1):
            progress("combine", done, len(tasks))
        folds = tuple(
            BroughtFold(
                fold.entry.candidate,
                fold.entry.digest,
                _beside(fold.entry.numbers, places, weights),
            )
            for fold in theirs
        )
        entry = CombineEntry(
            totals=together(state.ledger.totals, other.ledger.totals),
            of=other.id,
            seq=other.ledger.head.seq,
            folds=folds,
            message=f"{counted(len(folds), 'model')} of the state {other.path.absolute()}, record "
            f"{other.ledger.head.seq}",
            device="cpu",
        )
        commit = state.commit(transaction, entry)
    before |= {places[number]: share for number, share in shares.items()}
    return Combined(commit, cut_since(state, before))


def _form(made: Format) -> str:
    return "whole tensors" if made.form is None else f"adapters at width {made.form.width}"


def _add(transaction: Transaction, other: State, rule: Rule, totals: Totals, spec: TensorSpec, at: int) -> float:
    assert rule.laws.combine is not None
    if spec.kind == "stack":
        return math.fsum(_add_experts(transaction, other, rule, totals, spec, at))
    slots = rule.slots(spec)
    mine = {slot: torch.from_numpy(transaction.read(spec.name, slot)) for slot in slots}
    theirs = {slot: torch.from_numpy(other.read(spec.name, slot, at=at)) for slot in slots}
    merged_sq = rule.laws.combine(mine, theirs, totals)
    for slot, value in mine.items():
        transaction.write(spec.name, slot, value.numpy())
    return merged_sq


def _add_experts(
    transaction: Transaction, other: State, rule: Rule, totals: Totals, spec: TensorSpec, at: int
) -> Iterator[float]:
    """Adds a stack expert by expert; ‖X‖² of each after."""
    assert rule.laws.combine is not None
    shapes = {slot: one.shape for slot, one in rule.slots(spec.expert).items()}
    generation = other.generation_of(other.ledger.get(at))
    assert generation is not None, "something is folded there"
    brought = generation.parts(spec.name, spec.experts)
    for values in transaction.parts(spec.name, spec.experts):
        mine = {slot: torch.from_numpy(value).view(shapes[slot]) for slot, value in values.items()}
        theirs = {slot: torch.from_numpy(value).view(shapes[slot]) for slot, value in next(brought).items()}
        yield rule.laws.combine(mine, theirs, totals)


def _kept(numbers: FoldNumbers) -> FoldNumbers:
    return FoldNumbers(
        tau_norm=numbers.tau_norm,
        cosine=numbers.cosine,
        weight=numbers.weight,
        matrix_norm=numbers.matrix_norm,
        plain_norm=numbers.plain_norm,
        spread_norm=numbers.spread_norm,
        sketch=numbers.sketch,
    )


def _beside(numbers: FoldNumbers, called: Mapping[int, int], weights: Mapping[int, float]) -> FoldNumbers:
    """What stays of the numbers of an adapter: it has another number here, and the weight that it was read with."""
    found, number = _kept(numbers), numbers.block or 0
    weight = found.weight if weights[number] == 1.0 else weights[number]
    return replace(found, block=called[number], weight=weight)


def _named(rule: str, options: Mapping[str, object]) -> str:
    return " ".join([rule, *(f"{key}={value}" for key, value in options.items())])


def _differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Iterator[str]:
    return (name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))
