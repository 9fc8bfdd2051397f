"""A rule read from triplets, as two thin factors: X = left·rightᵀ of one layer, at scale 1.

No rule is written a second time here. Where X is a weighted sum, the rule is asked for the weights. Where turning every
task vector alike turns X alike, the rule itself folds and reads small matrices: with orthonormal Q and R that span all
U_i and all V_i, the cores are QᵀU_i·Σ_i·(RᵀV_i)ᵀ, and X = Q·X′·Rᵀ. `tsv-m` works on triplets as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from continual import linalg
from continual.blocks.shelf import Stacked
from continual.records import TensorSpec, Totals
from continual.rules import Accumulators, Inputs, Rule, Triplets
from continual.rules.contract import CoreFunctions
from continual.rules.matrices import sides


class Entrant(NamedTuple):
    """One of the chosen models, in the order in which they are folded: its weight, and the totals before it."""

    weight: float
    before: Totals


class Run(NamedTuple):
    """The models that are read together, one after the other, and the totals after the last."""

    entrants: Sequence[Entrant]
    totals: Totals

    def coefficients(self, rule: Rule) -> list[float]:
        """c_i of a tensor that reads Σ c_i·τ_i: what the rule makes of unit vectors, one for each model."""
        size = len(self.entrants)
        spec = TensorSpec("", (size,), "F32", "plain")
        kept: Accumulators = {slot: torch.zeros(one.shape) for slot, one in rule.slots(spec).items()}
        for index, entrant in enumerate(self.entrants):
            unit = torch.zeros(size)
            unit[index] = 1.0
            kept = rule.fold.apply(kept, unit, Inputs(spec, entrant.weight), entrant.before).accumulators
        found: list[float] = rule.read.unit(spec, kept, self.totals).tolist()
        return found


class Thin(NamedTuple):
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

    def scaled(self, factor: float) -> Thin:
        """Times a number."""
        root = abs(factor) ** 0.5
        left, right = self.left * (root if factor >= 0 else -root), self.right * root
        return Thin(left, right, self.square * factor**2, self.cut * factor**2)

    def dense(self) -> Tensor:
        """The matrix, float32."""
        return self.left @ self.right.mT


def thin(rule: Rule, given: Stacked, run: Run, rank: int | None = None) -> Thin:
    """X of one layer, cut to the `rank` largest singular values where one is given. The rule has `factored`."""
    m, n = sides(given.spec)
    if not given.rows:
        return Thin(torch.zeros(m, 0), torch.zeros(n, 0), 0.0)
    assert rule.factored is not None
    if rule.factored.linear(given.spec) or rule.factored.triplets is not None:
        left, right = _direct(rule, given, run)
        if rank is None or rank >= left.shape[1]:
            return _balanced(left, right)
        (q, upper), (r, lower) = torch.linalg.qr(left), torch.linalg.qr(right)
        return _of_core(q, upper @ lower.mT, r, rank)
    assert rule.factored.cores is not None
    (q, upper), (r, lower) = torch.linalg.qr(given.u.mT), torch.linalg.qr(given.v.mT)
    return _of_core(q, core(rule.factored.cores, given, run, upper, lower), r, rank)


def square(rule: Rule, given: Stacked, run: Run) -> float:
    """‖X‖² of one layer: no factor of it is made."""
    if not given.rows:
        return 0.0
    assert rule.factored is not None
    if rule.factored.linear(given.spec) or rule.factored.triplets is not None:
        left, right = _direct(rule, given, run)
        return max(0.0, float(((left.mT @ left) * (right.mT @ right)).sum()))
    assert rule.factored.cores is not None
    upper, lower = (torch.linalg.qr(side.mT, mode="r").R for side in (given.u, given.v))
    return float(core(rule.factored.cores, given, run, upper, lower).square().sum())


def core(functions: CoreFunctions, given: Stacked, run: Run, upper: Tensor, lower: Tensor) -> Tensor:
    """X′, float64: the rule over the cores. `upper` and `lower` are QᵀU and RᵀV, the columns of all models."""
    slots = functions.slots(len(upper), len(lower))
    kept: Accumulators = {
        slot: torch.zeros(one.shape, dtype=getattr(torch, one.dtype), device=upper.device)
        for slot, one in slots.items()
    }
    for index, entrant in enumerate(run.entrants):
        if index in given.rows:
            where = given.rows[index]
            tau = (upper[:, where] * given.sigma[where] @ lower[:, where].mT).float()
            kept = functions.fold(kept, tau, Inputs(given.spec, entrant.weight), entrant.before).accumulators
    found: Tensor = functions.read(kept, run.totals, sides(given.spec)).double()
    return found


def _direct(rule: Rule, given: Stacked, run: Run) -> tuple[Tensor, Tensor]:
    """The factors of a weighted sum, or those that the rule makes of the triplets itself."""
    assert rule.factored is not None
    if rule.factored.linear(given.spec):
        weights, coefficients = torch.zeros_like(given.sigma), run.coefficients(rule)
        for index, where in given.rows.items():
            weights[where] = coefficients[index] * given.sigma[where]
        return given.u.mT * weights, given.v.mT
    assert rule.factored.triplets is not None
    owner = [index + 1 for index, where in given.rows.items() for _ in range(where.start, where.stop)]
    return rule.factored.triplets(Triplets(owner, given.u.mT, given.sigma, given.v.mT), run.totals)


def _balanced(left: Tensor, right: Tensor) -> Thin:
    lengths, others = left.norm(dim=0), right.norm(dim=0)
    held = (lengths > 0) & (others > 0)
    factor = torch.where(held, (others / lengths).sqrt(), 0.0)
    back = torch.where(held, 1.0 / factor, 0.0)
    total = max(0.0, float(((left.mT @ left) * (right.mT @ right)).sum()))
    return Thin((left * factor).float(), (right * back).float(), total)


def _of_core(q: Tensor, middle: Tensor, r: Tensor, rank: int | None) -> Thin:
    """Q·X′·Rᵀ over the singular values of X′ that are not null, the largest `rank` of them."""
    w, sigma, zh = torch.linalg.svd(middle, full_matrices=False)
    held = int((sigma > linalg.NULL * sigma[0]).sum()) if len(sigma) else 0
    k = held if rank is None else min(rank, held)
    root, total = sigma[:k].sqrt(), float(sigma[:k].square().sum())
    cut = float(sigma[k:held].square().sum())
    return Thin((q @ (w[:, :k] * root)).float(), (r @ (zh[:k].mT * root)).float(), total, cut)
