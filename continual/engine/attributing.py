"""What each model has in a merge of whole tensors, which keeps no model apart: as far as the records of the folds and
the sketches in them tell. It only reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from continual.engine.models_read import ModelRead, models_read
from continual.engine.reading import Reading
from continual.executors.contract import Executor, Progress, Task
from continual.records import TensorSpec
from continual.tensors.names.kinds import layer_in
from continual.tensors.vectors.sketch import Projection, Sketch, SketchPlan

Floats = NDArray[np.float64]


class ToldShare(NamedTuple):
    """What is told of one model: `norm`, its share of the lengths of all task vectors, each times its weight; `cosine`
    between its task vector and the merged one, an estimate; None where that is not known."""

    model: ModelRead
    norm: float
    cosine: float | None


class ToldLayer(NamedTuple):
    """The same of the tensors of one depth, by the layers there; models without a task vector in it are left out."""

    name: str
    depth: float
    shares: Sequence[ToldShare]


class ToldShares(NamedTuple):
    """Of the whole merge, and of each depth; no layers where a model has no sketch. `error`: the standard error of a
    cosine of the whole, and of a layer; None where none is known."""

    whole: Sequence[ToldShare]
    layers: Sequence[ToldLayer]
    error: tuple[float, float] | None


class Sketched:
    """The models of a merge of whole tensors, with their lengths and their sketches."""

    def __init__(self, reading: Reading) -> None:
        """Raises Damaged."""
        self.reading, self.models = reading, models_read(reading)
        self.specs = [spec for spec in reading.state.format.tensors if spec.kind != "carried"]
        self.plan = SketchPlan.of(self.specs)
        numbers = [fold.entry.numbers for fold in reading.state.ledger.folds(at=reading.commit.seq)]
        self.weights = [1.0 if model.weight is None else model.weight for model in self.models]
        self._lengths = [one.tau_norm for one in numbers]
        kept = [None if one.sketch is None else Sketch.read(one.sketch.norms, one.sketch.values) for one in numbers]
        fit = [one for one in kept if one is not None and one.values.shape == (self.plan.groups, self.plan.width)]
        self.sketches = fit if len(fit) == len(kept) else []

    def sums(self) -> Floats | None:
        """The sketch of the merged task vector, up to a factor, where it is a sum: that of the sketches. None where it
        is none."""
        read, options = self.reading.rule.factored, self.reading.options
        scaled = options.lines or options.layers or options.terms or self.reading.rule.options.get("before")
        if not self.sketches or scaled or read is None or not all(map(read.linear, self.specs)):
            return None
        parts = [w * one.values.astype(float) for w, one in zip(self.weights, self.sketches, strict=True)]
        return np.asarray(np.sum(parts, axis=0), float)

    def read(self, executor: Executor, progress: Progress) -> Floats | None:
        """The sketch of the merged task vector, which is read once for it; None where the models have none. The reading
        is settled. Raises Retry and Damaged."""
        if not self.sketches:
            return None
        tasks = [
            Task(spec.name, self.reading.need(spec) + 4 * spec.numel, partial(self._part, spec)) for spec in self.specs
        ]
        parts: dict[str, Floats] = {}
        progress("explain", 0, len(tasks))
        for name, part in executor.map(tasks):
            parts[name] = part
            progress("explain", len(parts), len(tasks))
        found = np.zeros((self.plan.groups, self.plan.width))
        for spec in self.specs:  # in one order, whoever was ready first
            found[self.plan.group[spec.name]] += parts[spec.name]
        return found

    def _part(self, spec: TensorSpec) -> Floats:
        found = Projection(spec.name, self.plan.width)
        found.add(0, self.reading.vector(spec).view(-1).numpy())
        return found.values

    def told(self, merged: Floats | None) -> ToldShares:
        """What is told of each model, beside the sketch of the merged task vector, where that is known."""
        own = [one.values.astype(float) for one in self.sketches]
        along = None if merged is None else [_cosine(one.reshape(-1), merged.reshape(-1)) for one in own]
        whole = self._shares(self._lengths, along)
        layers = []
        for group, (depth, name) in layer_groups(self.specs, self.plan).items() if own else ():
            along = None if merged is None else [_cosine(one[group], merged[group]) for one in own]
            shares = self._shares([one.norms[group] for one in self.sketches], along)
            layers.append(ToldLayer(name, depth, [share for share in shares if share.norm]))
        error = None if merged is None else (merged.size**-0.5, merged.shape[1] ** -0.5)
        return ToldShares(whole, layers, error)

    def _shares(self, lengths: Sequence[float], along: Sequence[float | None] | None) -> list[ToldShare]:
        weighed = [weight * length for weight, length in zip(self.weights, lengths, strict=True)]
        total = math.fsum(weighed)
        cosines = along or [None] * len(weighed)
        shares = [length / total if total else 0.0 for length in weighed]
        return list(map(ToldShare, self.models, shares, cosines))


def layer_groups(specs: Sequence[TensorSpec], plan: SketchPlan) -> Mapping[int, tuple[float, str]]:
    """The first depth and the layers of each group of the sketches, by its number. `specs` are those that `plan` is
    of."""
    inside: dict[int, tuple[float, dict[str, None]]] = {}
    for spec in sorted(specs, key=lambda spec: (spec.depth, spec.name)):
        inside.setdefault(plan.group[spec.name], (spec.depth, {}))[1][layer_in(spec.name)] = None
    return {group: (depth, _called(list(names))) for group, (depth, names) in inside.items()}


def _cosine(one: Floats, other: Floats) -> float | None:
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length else None


def _called(names: Sequence[str]) -> str:
    """A few names of layers; what is in none is counted with the layer beside it."""
    layers = [name for name in names if name.rpartition(".")[2].isdigit()] or list(names)
    return ", ".join(layers[:2]) + (f" and {len(layers) - 2} more" if len(layers) > 2 else "")
