"""Triplets made orthogonal with a weight each, so that strong ones stay as they are and weak ones give way: ESM, and
TSV-M with ESM's weights.

"Essential Subspace Merging for Training-Free Multi-Task Learning" (CVPR 2026; the authors' code, kiddo127/ESM, says the
rest): of each task the leading directions E_i of its output shifts, the eigenvectors of τ_iCτ_iᵀ with C the second
moments of the inputs, and v_i = E_iᵀτ_i, times ‖v_i‖²; side by side, τ = s·polar(E)·polar(V). With C = I, which asks
for no data, E_i are the left singular vectors, and v_i the right ones, each as long as its singular value.

So with P = polar(U) and Q = polar(V·diag(d)), d_j = σ_j^power: `esm` reads σ̄·PQᵀ, and `tsv-w` P·diag(σ)·Qᵀ, which is
TSV-M where `power` is 0. The polar factor of V·diag(d) is the matrix with orthonormal columns that is nearest to V when
every column's distance counts d_j² times.

Departures from the authors' code, each of them measured (ops/decisions/0054): the square by which v is multiplied is
that of each column and not of the whole task's; s is the mean singular value; no scale for each input, which depends on
the basis of the inputs, no λ^0.15, no length for each family of layers. d_j is at least 1e-3 of the largest: below that
the order of weak columns would say more than what they are. Null directions, one fine-tune alone and what is no matrix
are as in `isotropic`. A weight makes a model's σ longer, and with them its d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from continual.lazily import Tensor
from continual.rules import tsv_m
from continual.rules.contract import Rule, RuleRow, Triplets
from continual.rules.matrices import Include
from continual.rules.options import Number
from continual.rules.scale import ReadOptions

LEAST = 1e-3
"""The smallest weight of a column, as a share of the largest."""
Power = Annotated[float, Number(least=0.0, most=16.0), "a column of V has its singular value to this power as weight"]


@dataclass(frozen=True)
class WeighedOptions:
    """The options of both."""

    power: Power = 3.0
    include: Include = ()


def weighed(given: Triplets, power: float) -> tuple[Tensor, Tensor]:
    """polar(U) and polar(V·diag(σ^power))."""
    weights = (given.sigma / given.sigma.max()).pow(power).clamp(min=LEAST)
    return tsv_m.polar(given.u), tsv_m.polar(given.v * weights)


def _esm(options: WeighedOptions) -> Rule:
    def flat(given: Triplets) -> tuple[Tensor, Tensor]:
        left, right = weighed(given, options.power)
        return left * given.sigma.mean(), right

    return tsv_m.reading("esm", options.include, tsv_m.of_several(flat), owners=tsv_m.owners)


def _tsv_w(options: WeighedOptions) -> Rule:
    def long(given: Triplets) -> tuple[Tensor, Tensor]:
        left, right = weighed(given, options.power)
        return left * given.sigma, right

    return tsv_m.reading("tsv-w", options.include, tsv_m.of_several(long), owners=tsv_m.owners)


ESM = RuleRow(
    name="esm",
    summary="the triplets of tsv-m made orthogonal so that the strong stay as they are, with equal singular values",
    paper="2026, Essential Subspace Merging (ESM), without data",
    bytes_per_parameter="8 of a square matrix, 4 to 5 of long ones",
    read=ReadOptions("spread", 1.4),
    published=ReadOptions("number", 1.0),
    options=WeighedOptions,
    make=_esm,
)
TSV_W = RuleRow(
    name="tsv-w",
    summary="the triplets of tsv-m made orthogonal so that the strong stay as they are, with their own singular values",
    paper="TSV-M with the weights of ESM; of our own",
    bytes_per_parameter="8 of a square matrix, 4 to 5 of long ones",
    read=ReadOptions("spread", 0.9),
    published=ReadOptions("number", 1.0),
    options=WeighedOptions,
    make=_tsv_w,
)
