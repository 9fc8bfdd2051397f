"""What each model has in a reading: its share of the lengths, its cosine with the merged task vector, and how much that
changes without it. Exact: the reading is made again without each model, in small matrices where the rule allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from continual import linalg
from continual.blocks.factoring import Run, apart, direct, fold_cores, is_direct, spanned
from continual.blocks.merged import Merged
from continual.blocks.shelf import Stacked
from continual.lazily import Tensor, torch
from continual.records import Totals
from continual.rules import Accumulators, Inputs, ModelTerms, Triplets
from continual.rules.apart import LeftOut, SideVectors, WholeRead, Without


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
    chosen models ‖τ_i‖², ⟨τ_i, X⟩, ‖X₋ᵢ‖² and ⟨X, X₋ᵢ⟩. `lengths`: ‖X‖² and every ‖X₋ᵢ‖² by which the scale goes, where
    terms have coefficients, without which these are."""

    square: float
    taus: Sequence[float]
    dots: Sequence[float]
    squares: Sequence[float]
    inners: Sequence[float]
    lengths: tuple[float, Sequence[float]] | None = None

    @property
    def measured(self) -> tuple[float, Sequence[float]]:
        """‖X‖² and every ‖X₋ᵢ‖² by which the scale goes."""
        return (self.square, self.squares) if self.lengths is None else self.lengths


class Shares(NamedTuple):
    """The shares of every model by its number: `whole` of the merged model, also of a model of which all was cut off;
    `layers` of each layer, or each group of layers, that a model has touched."""

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
        given = self.merged.stacked(name, exact=False)
        found = self._products(name, given)
        if given.times is None:
            return found
        plain = self._products(name, given._replace(times=None))
        return found._replace(lengths=plain.measured)

    def _products(self, name: str, given: Stacked) -> Products:
        runs = [rest.run for rest in self.rests]
        if not given.rows:
            return _nothing(len(runs))
        found = self.merged.rule.factored
        if found is None:
            return self._dense(name, given)
        if given.inputs is not None:
            return _by_factors(self.merged, given, runs)
        if is_direct(self.merged.rule, given):
            return _linear(self.merged, given, runs)
        return _Turned(self.merged, given, runs).products()

    def shares(
        self, products: Mapping[str, Products] | None = None, group: Callable[[str], str] | None = None
    ) -> Shares:
        """The shares, from what `products` says of every layer of the shelf. Layers for which `group` gives one name
        are counted together under it."""
        found = {name: self.products(name) for name in self.merged.shelf.specs} if products is None else products
        self.merged.settle({name: one.measured[0] for name, one in found.items()})
        for index, rest in enumerate(self.rests):
            rest.settle({name: one.measured[1][index] for name, one in found.items()})
        layers = {name: self._scaled(name, one) for name, one in found.items() if any(one.taus)}
        weights = list(self.merged.chosen.values())
        grouped: dict[str, list[Products]] = {}
        for name, one in layers.items():
            grouped.setdefault(name if group is None else group(name), []).append(one)
        return Shares(
            self._shares(_added(list(layers.values()), len(weights)), weights, absent=True),
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

    def _shares(self, one: Products, weights: Sequence[float], *, absent: bool = False) -> dict[int, ModelShare]:
        """The shares in some layers; also of models that have nothing there, where these are wanted: they can count
        all the same, as in a mean."""
        lengths = [weight * math.sqrt(tau) for weight, tau in zip(weights, one.taus, strict=True)]
        total, length = math.fsum(lengths), math.sqrt(one.square)
        found = {}
        for index, number in enumerate(self.merged.chosen):
            if not one.taus[index] and not absent:
                continue
            both = math.sqrt(one.taus[index]) * length
            left = one.square + one.squares[index] - 2 * one.inners[index]
            found[number] = ModelShare(
                lengths[index] / total if total else 0.0,
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
    columns = [list(zip(*column, strict=True)) for column in list(zip(*parts, strict=True))[1:5]]
    taus, dots, squares, inners = ([math.fsum(values) for values in column] for column in columns)
    return Products(math.fsum(part.square for part in parts), taus, dots, squares, inners)


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
    each = linalg.gram(given.u) * linalg.gram(given.v) * given.sigma[:, None] * given.sigma
    which = torch.zeros(len(given.sigma), count, dtype=torch.float64, device=given.u.device)
    for index, where in given.rows.items():
        which[where, index] = 1.0
    inner = which.mT @ each @ which
    times = torch.ones(count, dtype=torch.float64) if given.times is None else torch.tensor(given.times).double()
    whole = torch.tensor(merged.run.coefficients_at(given.spec), dtype=torch.float64) * times
    rests = torch.zeros(count, count, dtype=torch.float64)
    for index, run in enumerate(runs):
        found = torch.tensor(run.coefficients_at(given.spec), dtype=torch.float64)
        rests[index, :index], rests[index, index + 1 :] = found[:index], found[index:]
        rests[index] *= times
    inner = inner.cpu()
    dots = inner @ whole
    return Products(
        max(0.0, float(whole @ dots)),
        inner.diagonal().tolist(),
        dots.tolist(),
        [max(0.0, float(rest @ inner @ rest)) for rest in rests],
        (rests @ dots).tolist(),
    )


def _by_factors(merged: Merged, given: Stacked, runs: Sequence[Run]) -> Products:
    """Where X has factors that lie in no span of the task vectors': of each reading, and of each task vector."""
    rule, whole = merged.rule, direct(merged.rule, given, merged.run)
    rests = [direct(rule, given.without(index), run) for index, run in enumerate(runs)]
    taus = [given.factors(index) for index in range(len(runs))]
    return Products(
        _product(whole, whole),
        [_product(tau, tau) for tau in taus],
        [_product(tau, whole) for tau in taus],
        [_product(rest, rest) for rest in rests],
        [_product(rest, whole) for rest in rests],
    )


def _product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """⟨L·Rᵀ, L′·R′ᵀ⟩."""
    (left, right), (ahead, behind) = ([side.double() for side in pair] for pair in (one, other))
    return float(((left.mT @ ahead) * (right.mT @ behind)).sum())


class _Turned:
    """One layer in small coordinates: the triplets in orthonormal bases of what they span. What a rule reads there is
    what it reads in the layer, turned."""

    def __init__(self, merged: Merged, given: Stacked, runs: Sequence[Run]) -> None:
        assert merged.rule.factored is not None
        self.merged, self.given, self.runs, self.factored = merged, given, runs, merged.rule.factored
        rests = [run.totals for run in runs]
        self.apart = apart(given, merged.run, _vectors(given.u), _vectors(given.v), rests)

    def products(self) -> Products:
        """The inner products. Where the rule knows a quicker way than to read again, it goes first."""
        found = LeftOut(None, [None] * len(self.runs))
        if self.factored.without is not None:
            found = self.factored.without(self.apart)
        if isinstance(found.whole, torch.Tensor):
            self._whole = found.whole
        told = found.whole if isinstance(found.whole, WholeRead) else self._told()
        left = [self._less(index) if one is None else one for index, one in enumerate(found.rests)]
        sigma, rows = self.apart.sigma, self.apart.rows
        along = sigma * told.along
        nothing = slice(0, 0)
        return Products(
            told.square,
            [float(sigma[rows.get(index, nothing)].square().sum()) for index in range(len(left))],
            [float(along[rows.get(index, nothing)].sum()) for index in range(len(left))],
            [one.square for one in left],
            [one.inner for one in left],
        )

    def _told(self) -> WholeRead:
        along = (self.apart.u * (self._whole @ self.apart.v)).sum(0)
        return WholeRead(float(self._whole.square().sum()), along)

    @cached_property
    def _cores(self) -> tuple[Accumulators, list[Tensor]]:
        """The accumulators of all cores, and each of them."""
        assert self.factored.cores is not None
        return fold_cores(self.factored.cores, self.given, self.merged.run, (self.apart.u, self.apart.v))

    @cached_property
    def _whole(self) -> Tensor:
        """X′, read where the rule has not told it."""
        if self.factored.cores is None:
            return self._again(range(len(self.runs)), self.merged.run.totals)
        return self.factored.cores.read(_copy(self._cores[0]), self.merged.run.totals, self.apart.sides).double()

    def _less(self, index: int) -> Without:
        """X′ without one model: it is taken out again where the rule can do that, else the others are read again."""
        run, functions = self.runs[index], self.factored.cores
        if functions is None:
            rest = self._again([other for other in range(len(self.runs)) if other != index], run.totals)
            return Without(float(rest.square().sum()), float((rest * self._whole).sum()))
        left = _copy(self._cores[0])
        if index in self.given.rows and self.merged.rule.laws.combine is not None:
            inputs = Inputs(self.given.spec, -self.merged.run.entrants[index].weight)
            tau = self._cores[1][index].clone()
            left = functions.fold(left, tau, inputs, self.merged.run.totals).accumulators
        elif index in self.given.rows:
            left, _ = fold_cores(functions, self.given.without(index), run, (self.apart.u, self.apart.v))
        rest = functions.read(left, run.totals, self.apart.sides).double()
        return Without(float(rest.square().sum()), float((rest * self._whole).sum()))

    def _again(self, kept: Iterable[int], totals: Totals) -> Tensor:
        """X′ of some models by a rule that works on triplets."""
        assert self.factored.triplets is not None
        given, kept = self.apart.weighed(), list(kept)
        u, sigma, v, rows = given.u, given.sigma, given.v, given.rows
        mine = [(place, rows[index]) for place, index in enumerate(kept, 1) if index in rows]
        owner = [place for place, where in mine for _ in range(where.start, where.stop)]
        columns = [column for _, where in mine for column in range(where.start, where.stop)]
        kept_of = Triplets(owner, u[:, columns], sigma[columns], v[:, columns], self.apart.sides)
        left, right = self.factored.triplets(kept_of, totals)
        if given.times is None:
            return left @ right.mT
        assert self.factored.owners is not None, "a rule whose triplets are terms"
        owners = [kept[place - 1] for place in self.factored.owners(kept_of, totals)]
        left, right, _ = ModelTerms(left, right, owners).times(dict(enumerate(given.times)))
        return left @ right.mT


def _vectors(rows: Tensor) -> SideVectors:
    """SideVectors as what a rule asks for of them: in the basis of the whole space where it is no larger than there are
    vectors."""

    def columns(found: SideVectors) -> Tensor:
        return rows.mT.double() if rows.shape[1] <= len(rows) else spanned(rows, found.gram).upper

    return SideVectors(lambda: linalg.gram(rows), columns)


def _copy(kept: Accumulators) -> Accumulators:
    return {slot: value.clone() for slot, value in kept.items()}
