"""What each model has in a reading: its share of the lengths, its cosine with the merged task vector, and how much that
changes without it. Exact: the reading is made again without each model, in small matrices where the rule allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from continual.blocks.factoring import Run, direct, fold_cores, spanned
from continual.blocks.merged import Merged
from continual.blocks.shelf import Stacked
from continual.rules import Accumulators, Inputs
from continual.rules.contract import CoreFunctions
from continual.rules.matrices import sides


class ModelShare(NamedTuple):
    """What one model has in a layer, or in the whole.

    `norm`: the length of its task vector, times its weight, over the sum of all models' lengths. `cosine`: between its
    task vector and the merged one. `change`: the length of the difference that leaving it out makes, over that of the
    merged task vector; both are read with the same options, each at its own scale.
    """

    norm: float
    cosine: float
    change: float


class Products(NamedTuple):
    """The inner products of one layer that shares follow from, X and X₋ᵢ at scale 1: `square` ‖X‖², and of each of the
    chosen models ‖τ_i‖², ⟨τ_i, X⟩, ‖X₋ᵢ‖² and ⟨X, X₋ᵢ⟩."""

    square: float
    taus: Sequence[float]
    dots: Sequence[float]
    squares: Sequence[float]
    inners: Sequence[float]


class Shares(NamedTuple):
    """The shares of every model by its number: `whole` of the merged model, `layers` of each layer, or each group of
    layers, that a model has touched."""

    whole: Mapping[int, ModelShare]
    layers: Mapping[str, Mapping[int, ModelShare]]


class Explaining:
    """What the chosen models of `merged` have in it. Layers are independent of each other: `products` may be asked on
    several threads."""

    def __init__(self, merged: Merged) -> None:
        self.merged = merged
        self.rests = [merged.without(number) for number in merged.chosen]

    def products(self, name: str) -> Products:
        """The inner products of one layer."""
        given = self.merged.stacked(name)
        runs = [rest.run for rest in self.rests]
        if not given.rows:
            return _nothing(len(runs))
        found = self.merged.rule.factored
        if found is None:
            return self._dense(name, given)
        if found.linear(given.spec):
            return _linear(self.merged, given, runs)
        if found.triplets is not None:
            return _direct(self.merged, given, runs)
        assert found.cores is not None
        return _cores(self.merged, found.cores, given, runs)

    def shares(
        self, products: Mapping[str, Products] | None = None, group: Callable[[str], str] | None = None
    ) -> Shares:
        """The shares, from what `products` says of every layer of the shelf. Layers for which `group` gives one name
        are counted together under it."""
        found = {name: self.products(name) for name in self.merged.shelf.specs} if products is None else products
        self.merged.settle({name: one.square for name, one in found.items()})
        for index, rest in enumerate(self.rests):
            rest.settle({name: one.squares[index] for name, one in found.items()})
        layers = {name: self._scaled(name, one) for name, one in found.items() if any(one.taus)}
        weights = list(self.merged.chosen.values())
        grouped: dict[str, list[Products]] = {}
        for name, one in layers.items():
            grouped.setdefault(name if group is None else group(name), []).append(one)
        return Shares(
            self._shares(_added(list(layers.values()), len(weights)), weights),
            {name: self._shares(_added(parts, len(weights)), weights) for name, parts in grouped.items()},
        )

    def _scaled(self, name: str, one: Products) -> Products:
        """The products of the merged task vectors as they are read, each at its scale."""
        s, scales = self.merged.scale(name), [rest.scale(name) for rest in self.rests]
        return Products(
            s * s * one.square,
            one.taus,
            [s * dot for dot in one.dots],
            [r * r * square for r, square in zip(scales, one.squares, strict=True)],
            [s * r * inner for r, inner in zip(scales, one.inners, strict=True)],
        )

    def _shares(self, one: Products, weights: Sequence[float]) -> dict[int, ModelShare]:
        lengths = [weight * math.sqrt(tau) for weight, tau in zip(weights, one.taus, strict=True)]
        total, length = math.fsum(lengths), math.sqrt(one.square)
        found = {}
        for index, number in enumerate(self.merged.chosen):
            if not one.taus[index]:
                continue
            both = math.sqrt(one.taus[index]) * length
            left = one.square + one.squares[index] - 2 * one.inners[index]
            found[number] = ModelShare(
                lengths[index] / total,
                one.dots[index] / both if both else 0.0,
                math.sqrt(max(0.0, left)) / length if length else 0.0,
            )
        return found

    def _dense(self, name: str, given: Stacked) -> Products:
        whole = self.merged.unit(name).double().flatten()
        rests = [rest.unit(name).double().flatten() for rest in self.rests]
        taus = [
            given.block(index).dense().double().flatten() if index in given.rows else torch.zeros_like(whole)
            for index in range(len(rests))
        ]
        return _products(whole, taus, rests)


def _nothing(count: int) -> Products:
    zeros = [0.0] * count
    return Products(0.0, zeros, zeros, zeros, zeros)


def _added(parts: Sequence[Products], count: int) -> Products:
    """The products of the whole model."""
    if not parts:
        return _nothing(count)
    square, *columns = zip(*parts, strict=True)
    sums = [[math.fsum(values) for values in zip(*column, strict=True)] for column in columns]
    return Products(math.fsum(square), *sums)


def _products(whole: Tensor, taus: Sequence[Tensor], rests: Sequence[Tensor]) -> Products:
    """Of vectors, or of matrices that were all turned alike."""
    return Products(
        float((whole * whole).sum()),
        [float((tau * tau).sum()) for tau in taus],
        [float((tau * whole).sum()) for tau in taus],
        [float((rest * rest).sum()) for rest in rests],
        [float((rest * whole).sum()) for rest in rests],
    )


def _linear(merged: Merged, given: Stacked, runs: Sequence[Run]) -> Products:
    """Where X is Σ c_i τ_i all of them follow from the ⟨τ_i, τ_j⟩."""
    count = len(runs)
    each = (given.u @ given.u.mT) * (given.v @ given.v.mT) * given.sigma[:, None] * given.sigma
    which = torch.zeros(len(given.sigma), count, dtype=torch.float64, device=given.u.device)
    for index, where in given.rows.items():
        which[where, index] = 1.0
    inner = which.mT @ each @ which
    whole = torch.tensor(merged.run.coefficients, dtype=torch.float64)
    rests = torch.zeros(count, count, dtype=torch.float64)
    for index, run in enumerate(runs):
        found = torch.tensor(run.coefficients, dtype=torch.float64)
        rests[index, :index], rests[index, index + 1 :] = found[:index], found[index:]
    inner = inner.cpu()
    dots = inner @ whole
    return Products(
        max(0.0, float(whole @ dots)),
        inner.diagonal().tolist(),
        dots.tolist(),
        [max(0.0, float(rest @ inner @ rest)) for rest in rests],
        (rests @ dots).tolist(),
    )


def _direct(merged: Merged, given: Stacked, runs: Sequence[Run]) -> Products:
    """From the factors that the rule makes of the triplets."""

    def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
        return float(((one[0].mT @ other[0]) * (one[1].mT @ other[1])).sum())

    whole = direct(merged.rule, given, merged.run)
    rests = [direct(merged.rule, given.without(index), run) for index, run in enumerate(runs)]
    taus = [given.factors(index) for index in range(len(runs))]
    return Products(
        max(0.0, inner(whole, whole)),
        [inner(tau, tau) for tau in taus],
        [inner(tau, whole) for tau in taus],
        [max(0.0, inner(rest, rest)) for rest in rests],
        [inner(rest, whole) for rest in rests],
    )


def _cores(merged: Merged, functions: CoreFunctions, given: Stacked, runs: Sequence[Run]) -> Products:
    """In the small matrices. Where the rule knows a quicker way than to read again it goes first."""
    turned = (spanned(given.u).upper, spanned(given.v).upper)
    kept, taus = fold_cores(functions, given, merged.run, turned)
    found_whole: Tensor | None = None
    quick: Sequence[tuple[float, float] | None] = [None] * len(runs)
    if functions.without is not None:
        terms = [_term(merged, given, turned, index) for index in range(len(runs))]
        found_whole, quick = functions.without(kept, terms)
    whole = found_whole
    if whole is None:
        whole = functions.read(_copy(kept), merged.run.totals, sides(given.spec)).double()
    left = [
        found or _again(whole, _read_without(merged, functions, given, (kept, taus, turned), index, runs[index]))
        for index, found in enumerate(quick)
    ]
    exact = [tau.double() for tau in taus]
    return Products(
        float((whole * whole).sum()),
        [float((tau * tau).sum()) for tau in exact],
        [float((tau * whole).sum()) for tau in exact],
        [square for square, _ in left],
        [inner for _, inner in left],
    )


def _again(whole: Tensor, rest: Tensor) -> tuple[float, float]:
    return float((rest * rest).sum()), float((rest * whole).sum())


def _term(merged: Merged, given: Stacked, turned: tuple[Tensor, Tensor], index: int) -> tuple[Tensor, Tensor]:
    """The core of a model with its weight, as two factors; without columns where it did not touch the layer."""
    where = given.rows.get(index, slice(0, 0))
    return turned[0][:, where] * (given.sigma[where] * merged.run.entrants[index].weight), turned[1][:, where]


def _read_without(
    merged: Merged,
    functions: CoreFunctions,
    given: Stacked,
    cores: tuple[Accumulators, Sequence[Tensor], tuple[Tensor, Tensor]],
    index: int,
    run: Run,
) -> Tensor:
    """X′ without one model: it is taken out again where the rule can do that, else the others are folded again."""
    kept, taus, turned = cores
    left = _copy(kept)
    if index in given.rows and merged.rule.laws.combine is not None:
        weight = merged.run.entrants[index].weight
        left = functions.fold(left, taus[index].clone(), Inputs(given.spec, -weight), merged.run.totals).accumulators
    elif index in given.rows:
        left, _ = fold_cores(functions, given.without(index), run, turned)
    return functions.read(left, run.totals, sides(given.spec)).double()


def _copy(kept: Accumulators) -> Accumulators:
    return {slot: value.clone() for slot, value in kept.items()}
