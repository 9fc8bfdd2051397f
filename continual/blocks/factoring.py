"""A rule read from triplets, as two thin factors: X = left·rightᵀ of one layer, at scale 1.

No rule is written a second time here. Where X is a weighted sum, the rule is asked for the weights. Where turning every
task vector alike turns X alike, the rule itself folds and reads small matrices: with orthonormal Q and R that span all
U_i and all V_i, the cores are QᵀU_i·Σ_i·(RᵀV_i)ᵀ, and X = Q·X′·Rᵀ. `tsv-m` works on triplets as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from continual import linalg
from continual.blocks.shelf import Stacked
from continual.lazily import Tensor, torch
from continual.records import TensorSpec, Totals
from continual.rules import Accumulators, Inputs, Rule, Triplets
from continual.rules.apart import Apart, SideVectors, weighed
from continual.rules.contract import CoreFunctions
from continual.rules.matrices import sides
from continual.rules.terms import ModelTerms

_SAFE = 1e3
"""Up to this condition, a basis by Cholesky is orthonormal to 1e-10."""


class Entrant(NamedTuple):
    """One of the chosen models, in the order in which they are folded: its weight, and the totals before it. `layers`:
    its weight in the layers of each depth, where they differ; then the rule is a sum with these weights."""

    weight: float
    before: Totals
    layers: Mapping[float, float] | None = None


@dataclass(frozen=True)
class Run:
    """The models that are read together by `rule`, one after the other, and the totals after the last."""

    rule: Rule
    entrants: Sequence[Entrant]
    totals: Totals

    def coefficients_at(self, spec: TensorSpec) -> list[float]:
        """c_i of this tensor, which reads Σ c_i·τ_i."""
        if not any(entrant.layers for entrant in self.entrants):
            return self._coefficients
        return [entrant.layers[spec.depth] if entrant.layers else entrant.weight for entrant in self.entrants]

    @cached_property
    def _coefficients(self) -> list[float]:
        """Of every tensor: what the rule makes of unit vectors, one for each model."""
        rule = self.rule
        size = len(self.entrants)
        spec = TensorSpec("", (size,), "F32", "plain")
        kept: Accumulators = {slot: torch.zeros(one.shape) for slot, one in rule.slots(spec).items()}
        for index, entrant in enumerate(self.entrants):
            unit = torch.zeros(size)
            unit[index] = 1.0
            kept = rule.fold.apply(kept, unit, Inputs(spec, entrant.weight), entrant.before).accumulators
        found: list[float] = rule.read.unit(spec, kept, self.totals).tolist()
        return found


class ThinProduct(NamedTuple):
    """An m×n matrix as left·rightᵀ, m×k and n×k float32; both have equal lengths column by column.

    `square`: the square of its length. `cut`: the square of what was cut off to get to this rank.
    """

    left: Tensor
    right: Tensor
    square: float
    cut: float = 0.0

    @property
    def error(self) -> float:
        """The length of what was cut off over the length of all."""
        whole = self.square + self.cut
        return float((self.cut / whole) ** 0.5) if whole else 0.0

    def scaled(self, factor: float) -> ThinProduct:
        """Times a number."""
        root = abs(factor) ** 0.5
        left, right = self.left * (root if factor >= 0 else -root), self.right * root
        return ThinProduct(left, right, self.square * factor * factor, self.cut * factor * factor)


def thin(rule: Rule, given: Stacked, run: Run, rank: int | None = None) -> ThinProduct:
    """X of one layer, cut to the `rank` largest singular values where one is given. The rule has `factored`."""
    m, n = sides(given.spec)
    if not given.rows:
        return ThinProduct(torch.zeros(m, 0), torch.zeros(n, 0), 0.0)
    assert rule.factored is not None
    if is_direct(rule, given):
        left, right = direct(rule, given, run)
        if rank is None or rank >= left.shape[1]:
            return _balanced(left, right)
        one, other = spanned(left.mT), spanned(right.mT)
        return _of_core(one, one.upper @ other.upper.mT, other, rank)
    one, other = spanned(given.u), spanned(given.v)
    return _of_core(one, _turned(rule, given, run, (one.upper, other.upper)), other, rank)


def dense(rule: Rule, given: Stacked, run: Run) -> Tensor:
    """X of one layer as an m×n matrix, float32. The rule has `factored`."""
    m, n = sides(given.spec)
    if not given.rows:
        return torch.zeros(m, n)
    assert rule.factored is not None
    if is_direct(rule, given):
        left, right, *_ = _balanced(*direct(rule, given, run))
    else:  # of orthonormal columns, so that rounding one side does no more than rounding X
        one, other = spanned(given.u), spanned(given.v)
        middle = _turned(rule, given, run, (one.upper, other.upper))
        left, right = one.rows.mT @ (one.back @ middle), other.rows.mT @ other.back
    return left.float() @ right.float().mT


def square(rule: Rule, given: Stacked, run: Run) -> float:
    """‖X‖² of one layer: no factor of it is made."""
    if not given.rows:
        return 0.0
    assert rule.factored is not None
    if is_direct(rule, given):
        left, right = direct(rule, given, run)
        return max(0.0, float(((left.mT @ left) * (right.mT @ right)).sum()))
    return float(_turned(rule, given, run, (spanned(given.u).upper, spanned(given.v).upper)).square().sum())


def _turned(rule: Rule, given: Stacked, run: Run, turned: tuple[Tensor, Tensor]) -> Tensor:
    """X′ of a rule that is no sum, float64, in the bases in which the columns of all models are `turned`."""
    assert rule.factored is not None
    if rule.factored.triplets is not None:
        left, right = direct(rule, given, run, turned)
        return left @ right.mT
    if rule.factored.whole is not None:
        sides_of = [SideVectors.of(columns) for columns in turned]
        found = rule.factored.whole(apart(given, run, sides_of[0], sides_of[1], []))
        if found is not None:
            return found
    assert rule.factored.cores is not None
    return core(rule.factored.cores, given, run, turned)


def apart(given: Stacked, run: Run, left: SideVectors, right: SideVectors, rests: Sequence[Totals]) -> Apart:
    """The triplets as a rule is given them. `rests`: the totals without each of the models."""
    weights = [entrant.weight for entrant in run.entrants]
    return Apart(left, given.sigma, right, given.rows, weights, run.totals, rests, sides(given.spec), given.times)


def core(functions: CoreFunctions, given: Stacked, run: Run, turned: tuple[Tensor, Tensor]) -> Tensor:
    """X′, float64: the rule over the cores. `turned` are QᵀU and RᵀV, the columns of all models."""
    kept, _ = fold_cores(functions, given, run, turned)
    found: Tensor = functions.read(kept, run.totals, sides(given.spec)).double()
    return found


def fold_cores(
    functions: CoreFunctions, given: Stacked, run: Run, turned: tuple[Tensor, Tensor]
) -> tuple[Accumulators, list[Tensor]]:
    """The rule's accumulators after all models, and the core of each of them, float32; zeros of one that did not touch
    the layer."""
    upper, lower = turned
    slots, taus = functions.slots(len(upper), len(lower)), list[Tensor]()
    kept: Accumulators = {
        slot: torch.zeros(one.shape, dtype=getattr(torch, one.dtype), device=upper.device)
        for slot, one in slots.items()
    }
    for index, entrant in enumerate(run.entrants):
        where = given.rows.get(index)
        if where is None:
            taus.append(torch.zeros(len(upper), len(lower), device=upper.device))
            continue
        taus.append((upper[:, where] * given.sigma[where] @ lower[:, where].mT).float())
        inputs = Inputs(given.spec, entrant.weight)
        kept = functions.fold(kept, taus[-1].clone(), inputs, entrant.before).accumulators
    return kept, taus


def is_direct(rule: Rule, given: Stacked) -> bool:
    """Whether the factors of X are those of a weighted sum, or follow from the inputs of the layer: `direct` has them
    without a core. The rule has `factored`."""
    assert rule.factored is not None
    return rule.factored.by_inputs is not None or rule.factored.linear(given.spec)


def direct(rule: Rule, given: Stacked, run: Run, turned: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The factors of a weighted sum, or those that the rule makes of the triplets itself: of `turned`, as `core` has
    it, where these are given."""
    if given.times is not None:
        left, right, _ = terms(rule, given, run, turned).times(dict(enumerate(given.times)))
        return left, right
    if is_direct(rule, given):
        return _summed(rule, given, run)
    assert rule.factored is not None
    assert rule.factored.triplets is not None
    return rule.factored.triplets(_handed(given, run, turned), run.totals)


def terms(rule: Rule, given: Stacked, run: Run, turned: tuple[Tensor, Tensor] | None = None) -> ModelTerms:
    """X by the terms of the models, by the index of each, without coefficients. Only where the rule reads such a
    sum."""
    if is_direct(rule, given):
        owner = [-1] * len(given.sigma)
        for index, where in given.rows.items():
            owner[where] = [index] * (where.stop - where.start)
        return ModelTerms(*_summed(rule, given, run), owner)
    assert rule.factored is not None
    assert rule.factored.triplets is not None
    assert rule.factored.owners is not None, "a rule whose triplets are terms"
    handed = _handed(given, run, turned)
    owners = rule.factored.owners(handed, run.totals)
    return ModelTerms(*rule.factored.triplets(handed, run.totals), [one - 1 for one in owners])


def _summed(rule: Rule, given: Stacked, run: Run) -> tuple[Tensor, Tensor]:
    """The factors where `is_direct`: a column for each triplet."""
    assert rule.factored is not None
    if rule.factored.by_inputs is None or given.inputs is None:
        return given.u.mT * weighed(given.sigma, given.rows, run.coefficients_at(given.spec)), given.v.mT
    weights = [entrant.weight for entrant in run.entrants]
    across = any(one.rows for one in given.inputs)
    near, far = (given.u, given.v) if across else (given.v, given.u)
    solved = rule.factored.by_inputs(near.mT.double(), given.rows, given.inputs, weights)
    ahead = far.mT * weighed(given.sigma, given.rows, weights)
    return (solved, ahead) if across else (ahead, solved)


def _handed(given: Stacked, run: Run, turned: tuple[Tensor, Tensor] | None) -> Triplets:
    """The triplets as a rule is given them, of which each model's number is its index and one."""
    owner = [index + 1 for index, where in given.rows.items() for _ in range(where.start, where.stop)]
    # a model that was left out has its vectors there still
    rows = [row for where in given.rows.values() for row in range(where.start, where.stop)]
    sigma = weighed(given.sigma, given.rows, [entrant.weight for entrant in run.entrants])
    u, v = (given.u.mT, given.v.mT) if turned is None else turned
    if len(rows) != len(sigma):
        u, sigma, v = u[:, rows], sigma[rows], v[:, rows]
    return Triplets(owner, u, sigma, v, sides(given.spec))


def _balanced(left: Tensor, right: Tensor) -> ThinProduct:
    lengths, others = left.norm(dim=0), right.norm(dim=0)
    held = (lengths > 0) & (others > 0)
    factor = torch.where(held, (others / lengths).sqrt(), 0.0)
    back = torch.where(held, 1.0 / factor, 0.0)
    total = max(0.0, float(((left.mT @ left) * (right.mT @ right)).sum()))
    return ThinProduct((left * factor).float(), (right * back).float(), total)


class Basis(NamedTuple):
    """An orthonormal basis Q of what K vectors span, as products of them: `rows` (K×m) are the vectors, Q = rowsᵀ·back
    (K×k) and rowsᵀ = Q·upper (k×K)."""

    rows: Tensor
    upper: Tensor
    back: Tensor


def spanned(rows: Tensor, gram: Tensor | None = None) -> Basis:
    """A basis of what some vectors span, from their Gram; `gram`, where that is there already.

    By Cholesky where that is safe, else by eigenvectors, without those directions in which the vectors lie within
    `linalg.NULL`: no reading has more than that there.
    """
    gram = linalg.gram(rows) if gram is None else gram
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not int(failed):
        unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        back = torch.linalg.solve_triangular(factor.mT, unit, upper=True)
        if float(back.norm() * factor.norm()) < _SAFE * len(gram):
            return Basis(rows, factor.mT, back)
    values, vectors = torch.linalg.eigh(gram)
    held = values > linalg.NULL**2 * values[-1]
    root, vectors = values[held].sqrt(), vectors[:, held]
    return Basis(rows, root[:, None] * vectors.mT, vectors / root)


def _of_core(one: Basis, middle: Tensor, other: Basis, rank: int | None) -> ThinProduct:
    """Q·X′·Rᵀ over the singular values of X′ that are not null, the largest `rank` of them."""
    if rank is None or not middle.numel():
        w, sigma, zh = torch.linalg.svd(middle, full_matrices=False)
        z = zh.mT
        held = k = int((sigma > linalg.NULL * sigma[0]).sum()) if len(sigma) else 0
    else:  # the largest are as exact from the Gram, at half of the cost
        rows = linalg.tall(middle)
        sigma, z = linalg.right_singular(rows)
        held = int((sigma > 0).sum())
        k = min(rank, held)
        w = rows @ (z[:, :k] / sigma[:k])
        if rows is not middle:
            w, z = z, w
    root, total = sigma[:k].sqrt(), float(sigma[:k].square().sum())
    cut = float(sigma[k:held].square().sum())
    left, right = one.back @ (w[:, :k] * root), other.back @ (z[:, :k] * root)
    return ThinProduct((one.rows.mT @ left).float(), (other.rows.mT @ right).float(), total, cut)
