"""Chosen models of a shelf, read together by a rule at a scale: the merged task vector, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from continual.blocks import elements
from continual.blocks.elements import Seed, by_number
from continual.blocks.factoring import Entrant, Run, ThinProduct, dense, square, terms, thin
from continual.blocks.shelf import Shelf, Stacked, stacked
from continual.errors import Misconfigured
from continual.lazily import Tensor
from continual.records import WEIGHT, TensorSpec, Totals, is_weight
from continual.rules import LayerInputs, ModelTerms, ReadOptions, Rule, ScaleFactors, Size, Sums, figures_of, settle
from continual.rules.matrices import sides
from continual.rules.scale import layer_key

KnownInputs = Callable[[str], Mapping[int, LayerInputs] | None]
"""The inputs that a layer has on rows of the task of each of the chosen models, by its number; None where they are not
known."""


class Merged:
    """The models `chosen` of `shelf` read by `rule` with `options`. `chosen`: each one's weight by its number, in the
    order in which they are folded. Thread-safe once it is settled.

    Raises Misconfigured where the rule cannot be read from blocks, or not with these weights. `parts`: how long X is,
    once `settle` has found that out: the matrices, and everything else.
    """

    def __init__(
        self,
        shelf: Shelf,
        chosen: Mapping[int, float],
        rule: Rule,
        options: ReadOptions,
        seed: Seed = by_number,
        figures: Mapping[int, Sums] | None = None,
    ) -> None:
        check(rule, chosen)
        self.shelf, self.chosen, self.rule, self.options = shelf, dict(chosen), rule, options
        self._figures = _figures(shelf, self.chosen, rule) if figures is None else figures
        self.run = _run(rule, self._figures, self.chosen)
        self._seed = seed
        self.layered: Mapping[int, Mapping[float, float]] = {}
        self._inputs: KnownInputs = _unknown
        self._times: Mapping[int, Mapping[str, float]] = {}
        self._measured: dict[int, object] = {}
        self.parts: tuple[float, float] | None = None

    def by_layer(self, weights: Mapping[int, Mapping[float, float]]) -> Merged:
        """The same, with weights of some models that differ by the depth of a layer: only of a rule that reads their
        sum."""
        self.layered = weights
        numbered = zip(self.chosen, self.run.entrants, strict=True)
        entrants = [entrant._replace(layers=weights.get(number)) for number, entrant in numbered]
        self.run = replace(self.run, entrants=entrants)
        return self

    def by_inputs(self, known: KnownInputs) -> Merged:
        """The same, where the inputs of layers are known, for a rule that reads by them."""
        self._inputs = known
        return self

    def by_term(self, factors: Mapping[int, Mapping[str, float]]) -> Merged:
        """The same, with coefficients of some models' terms: by number, then by the layer (`layer_key`). The scale goes
        by X without them. Only of a rule that reads a sum of terms (`terms_of`)."""
        self._times = factors
        return self

    def times_at(self, name: str) -> list[float] | None:
        """What the term of each model in X of a layer is multiplied by, in order; None where there is no such
        number."""
        key = layer_key(name)
        found = [self._times.get(number, {}).get(key, 1.0) for number in self.chosen] if self._times else []
        return found if any(one != 1.0 for one in found) else None

    @property
    def factored(self) -> bool:
        """Whether what is read are factors; else it is dense."""
        return self.rule.factored is not None

    @property
    def totals(self) -> Totals:
        """The totals of exactly the chosen models, as a fold of their blocks would give them, but for `merged_sq`."""
        return self.run.totals

    @property
    def measures(self) -> bool:
        """Whether `settle` has to know how long X is."""
        return self.options.needs(Size())

    @property
    def settled(self) -> bool:
        """Whether it is known how long X is."""
        return self.parts is not None

    def square(self, name: str) -> float:
        """‖X‖² of one layer at scale 1, by which the scale goes: coefficients of terms do not count."""
        if self.factored:
            return square(self.rule, self.stacked(name)._replace(times=None), self.run)
        return float(self.unit(name).double().square().sum())

    def settle(self, squares: Mapping[str, float] | None = None) -> float:
        """Finds out the factor that X is multiplied by, that of the matrices where there are two. `squares`: what
        `square` says of each layer; without them it is asked here, where that is needed."""
        if self.parts is None and (self.measures or squares is not None):
            if squares is None:
                squares = {name: self.square(name) for name in self.shelf.specs}
            matrices = math.fsum(value for name, value in squares.items() if self.is_matrix(name))
            rest = math.fsum(value for name, value in squares.items() if not self.is_matrix(name))
            self.parts = (math.sqrt(matrices), math.sqrt(rest))
        return self.factors[0]

    @property
    def factors(self) -> ScaleFactors:
        """What X is multiplied by. Where `measures` says so, `settle` comes first."""
        assert not self.measures or self.parts is not None, "settle first"
        return self.options.factors(self.totals, self.size)

    @property
    def size(self) -> Size:
        """How long X is, as far as that is known."""
        size = self.rule.read.size(self.totals)
        return size if self.parts is None else Size(math.hypot(*self.parts), size.most, self.parts)

    def scale(self, name: str) -> float:
        """What X of this layer is multiplied by."""
        spec = self.shelf.specs[name]
        return self.factors.of(spec, matrix=self.is_matrix(name)) * self.options.layer(spec)

    def thin(self, name: str, rank: int | None = None) -> ThinProduct:
        """The merged task vector of one layer as factors, of the `rank` largest singular values where one is given.
        Only of rules that are `factored`."""
        return thin(self.rule, self.stacked(name), self.run, rank).scaled(self.scale(name))

    def dense(self, name: str) -> Tensor:
        """The merged task vector of one layer, float32 of its shape."""
        return self.unit(name).mul_(self.scale(name))

    def unit(self, name: str) -> Tensor:
        """X of one layer at scale 1, float32 of its shape, in new memory."""
        if self.factored:
            return dense(self.rule, self.stacked(name), self.run).view(self.shelf.specs[name].shape)
        measured = [self.measure(number) for number in self.chosen]
        seeds = [self._seed(number, name) if self.rule.needs.seeded else 0 for number in self.chosen]
        return elements.dense(self.rule, self.stacked(name), self.run, measured, seeds)

    def terms(self, name: str) -> ModelTerms:
        """X of one layer at scale 1 by the terms of the models, by their numbers, without coefficients."""
        given = self.stacked(name)._replace(times=None)
        if not given.rows:
            m, n = sides(given.spec)
            return ModelTerms(given.u.new_zeros(m, 0), given.u.new_zeros(n, 0), ())
        models, found = list(self.chosen), terms(self.rule, given, self.run)
        return found._replace(owner=[models[index] for index in found.owner])

    def stacked(self, name: str, *, exact: bool = True) -> Stacked:
        """The chosen models' triplets in one layer; without `exact` their vectors are float32, as they are kept."""
        found = stacked(self.shelf, name, list(self.chosen), exact=exact)._replace(times=self.times_at(name))
        if not self.rule.needs.inputs or not self.is_matrix(name) or (known := self._inputs(name)) is None:
            return found
        return found._replace(inputs=[known[number] for number in self.chosen])

    def without(self, number: int) -> Merged:
        """The same reading without one of the models."""
        others = {other: weight for other, weight in self.chosen.items() if other != number}
        found = Merged(self.shelf, others, self.rule, self.options, self._seed, self._figures)
        found._measured = self._measured
        return found.by_layer(self.layered).by_inputs(self._inputs).by_term(self._times)

    def weighed(self, weights: Mapping[int, float]) -> Merged:
        """The same models read alike with other weights."""
        assert weights.keys() == self.chosen.keys(), (weights, self.chosen)
        found = Merged(self.shelf, weights, self.rule, self.options, self._seed, self._figures)
        return found.by_inputs(self._inputs).by_term(self._times)

    def is_matrix(self, name: str) -> bool:
        """Whether the rule takes this layer for a matrix."""
        return _is_matrix(self.rule, self.shelf.specs[name])

    def measure(self, number: int) -> object:
        """What the rule has to measure of the whole model `number` before it reads any layer, kept from then on."""
        if number not in self._measured:
            self._measured[number] = elements.measure(self.rule, self.shelf, number, self._seed)
        return self._measured[number]


def check(rule: Rule, chosen: Mapping[int, float]) -> None:
    """Raises Misconfigured where `rule` cannot be read from blocks, or not with these weights."""
    if rule.needs.shipped is not None:
        raise Misconfigured(
            f"{rule.name} needs the file {rule.needs.shipped} of every model, of which an adapter's blocks keep nothing"
        )
    for weight in chosen.values():
        if not is_weight(weight):
            raise Misconfigured(
                f"a weight of {weight:g}: a weight is {WEIGHT}; to have a model count nothing, leave it out"
            )
        if weight != 1.0 and not (rule.laws.weighted or rule.laws.rounds):
            raise Misconfigured(
                f"{rule.name} reads every model with weight 1, not {weight:g}; --weight '*=1' gives each of them that"
            )


def _unknown(_name: str) -> None:
    return None


def _is_matrix(rule: Rule, spec: TensorSpec) -> bool:
    return rule.read.matrix is not None and rule.read.matrix(spec)


def _figures(shelf: Shelf, chosen: Mapping[int, float], rule: Rule) -> dict[int, Sums]:
    """What each model adds to the figures of the whole, from the singular values alone."""
    start = Sums(matrix_sq=0.0, top_sq=0.0) if rule.read.matrix else Sums()
    parts = {number: [start] for number in chosen}
    for name, spec in shelf.specs.items():
        columns = shelf.columns(name)
        for number, where in columns.models.items():
            if number in parts:
                sigma = columns.sigma[where].astype(float)
                total, top = float((sigma * sigma).sum()), float(sigma[0]) ** 2
                parts[number].append(Sums(total, 0.0, 0.0, *((total, top) if _is_matrix(rule, spec) else ())))
    return {number: Sums.total(found) for number, found in parts.items()}


def _run(rule: Rule, figures: Mapping[int, Sums], chosen: Mapping[int, float]) -> Run:
    """The totals before each model and after the last."""
    totals, found = Totals(), []
    for number, weight in chosen.items():
        found.append(Entrant(weight, totals))
        totals = replace(settle(totals, figures[number], weight), merged_sq=0.0)
    each = tuple(mine for number in chosen if (mine := figures_of(figures[number])) is not None)
    return Run(rule, found, replace(totals, each=each))
