"""What each model has in a reading: over the whole model, and layer by layer. A state of adapters tells it exactly, a
merge of whole tensors what attributing.py finds. It only reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from continual.blocks import Explaining, ModelShare, Products
from continual.engine.attributing import Sketched, ToldShare, ToldShares
from continual.engine.block_reading import BlockReading, CutModel
from continual.engine.reading import Reading
from continual.executors.contract import Executor, Progress, Task, silent
from continual.records import TensorSpec
from continual.tensors.names.kinds import layer_in

_LONG = 4000
"""Layers times models above which an export finds shares of sums alone: some twelve CPU seconds under `iso-c`."""


@dataclass(frozen=True, slots=True)
class ExplainedModel:
    """What one model has in a reading. `seq`: the record of its fold; `weight`: what it is read with.

    `norm`: the length of its task vector, times its weight, over the sum of all models' lengths. `cosine`: between its
    task vector and the merged one. `change`: how much leaving it out changes the merged task vector, over its length.
    None where nobody can tell.
    """

    name: str
    seq: int
    weight: float
    norm: float
    cosine: float | None
    change: float | None


@dataclass(frozen=True, slots=True)
class ExplainedLayer:
    """The same in one layer of the model, by its `name`; `depth`: its place in the stack, from 0 to 1. Models that did
    not touch it are left out."""

    name: str
    depth: float
    models: tuple[ExplainedModel, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The shares of every model that is read, the largest change (or else share) first, and the same `layers`, by their
    depth. `view`: what was asked for; nothing where all is as the state has it. `cut`: the models of which the state
    has cut off a part, which no figure counts. `error`: where cosines are estimates, the standard error of one of the
    whole and of one of a layer."""

    seq: int
    rule: str
    scale: str
    view: Mapping[str, object]
    models: tuple[ExplainedModel, ...]
    layers: tuple[ExplainedLayer, ...]
    cut: tuple[CutModel, ...] = ()
    error: tuple[float, float] | None = None


def explain(reading: Reading, executor: Executor, progress: Progress = silent) -> Explanation:
    """What each model has in what `reading` reads. Raises Retry and Damaged."""
    if not isinstance(reading, BlockReading):
        found = Sketched(reading)
        if found.sketches:
            reading.settle(executor, progress)
        return _of_told(reading, found.told(found.read(executor, progress)))
    return _of_blocks(reading, executor, progress)


def _of_blocks(reading: BlockReading, executor: Executor, progress: Progress) -> Explanation:
    """Of a state of adapters."""
    found = Explaining(reading.merged)
    if not reading.factored:
        for number in reading.chosen:
            reading.merged.measure(number)
    specs = [spec for spec in reading.shelf.specs.values() if reading.columns(spec)]
    tasks = [Task(spec.name, _need(reading, spec), partial(found.products, spec.name)) for spec in specs]
    products: dict[str, Products] = {}
    progress("explain", 0, len(tasks))
    for done, (name, one) in enumerate(executor.map(tasks), 1):
        products[name] = one
        progress("explain", done, len(tasks))
    shares = found.shares({spec.name: products[spec.name] for spec in specs}, layer_in)
    depths = {layer_in(spec.name): spec.depth for spec in specs}
    named = _named(reading)
    layers = [
        ExplainedLayer(name, depths[name], _models(named, reading.chosen, models))
        for name, models in shares.layers.items()
    ]
    return Explanation(
        reading.commit.seq,
        reading.rule.name,
        str(replace(reading.options, rule=None)),
        reading.view.described(),
        _models(named, reading.chosen, shares.whole),
        tuple(sorted(layers, key=lambda layer: layer.depth)),
        reading.cut(),
    )


def _of_told(reading: Reading, told: ToldShares) -> Explanation:
    """Of a merge of whole tensors."""

    def models(shares: Sequence[ToldShare]) -> tuple[ExplainedModel, ...]:
        found = (
            ExplainedModel(m.name, m.seq, 1.0 if m.weight is None else m.weight, norm, cosine, None)
            for m, norm, cosine in shares
        )
        return tuple(sorted(found, key=lambda model: -model.norm))

    return Explanation(
        reading.commit.seq,
        reading.rule.name,
        str(replace(reading.options, rule=None)),
        reading.view.described(),
        models(told.whole),
        tuple(ExplainedLayer(layer.name, layer.depth, models(layer.shares)) for layer in told.layers),
        error=told.error,
    )


def shares_of(reading: Reading, executor: Executor, *, all_of_it: bool = False) -> Explanation | None:
    """What an export says of each model: as `explain`, unless finding it would take long; with `all_of_it` whatever it
    takes. Of a state of adapters it takes long where the rule is no sum, and there are many layers and models, or it
    has no quicker way to leave one out than to read again, or has to fold again: then it is None. Of a merge of whole
    tensors nothing is read, and cosines are known of sums alone. Raises Retry and Damaged."""
    if all_of_it:
        return explain(reading, executor)
    if not isinstance(reading, BlockReading):
        found = Sketched(reading)
        return _of_told(reading, found.told(found.sums())) if found.models else None
    if not reading.chosen or reading.rule.factored is None:
        return None
    specs = [spec for spec in reading.shelf.specs.values() if reading.columns(spec)]
    if not all(reading.rule.factored.linear(spec) for spec in specs):
        quick = reading.rule.factored.without is not None and reading.rule.laws.order_free
        if not quick or len(specs) * len(reading.chosen) > _LONG:
            return None
    return explain(reading, executor)


def _models(
    named: Mapping[int, tuple[str, int]], weights: Mapping[int, float], shares: Mapping[int, ModelShare]
) -> tuple[ExplainedModel, ...]:
    found = [ExplainedModel(*named[number], weights[number], *share) for number, share in shares.items()]
    return tuple(sorted(found, key=lambda model: -(model.change or 0.0)))


def _named(reading: BlockReading) -> dict[int, tuple[str, int]]:
    """Name and record of each model, by its number among the blocks."""
    found = {}
    for fold in reading.state.ledger.folds(at=reading.commit.seq):
        assert fold.entry.numbers.block is not None, "a fold of a state of adapters"
        found[fold.entry.numbers.block] = fold.entry.candidate.name, fold.seq
    return found


def _need(reading: BlockReading, spec: TensorSpec) -> int:
    """Bytes that the products of one tensor take at their peak."""
    if not reading.factored:
        return 8 * spec.numel * (2 * len(reading.chosen) + 2)
    return 2 * (reading.need(spec) - 4 * spec.numel)
