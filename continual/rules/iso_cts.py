"""Iso-CTS: the directions that the sum of the fine-tunes has, and besides, of each fine-tune some that the sum has not;
all equally long.

Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", section 4.2
and the authors' code: the first k singular triplets of S = Στ_i are the common subspace; of each τ_i − U_kU_kᵀτ_i the
first s triplets are its own, (r − k)/T of them; side by side, U and V are replaced by their polar factors P and Q, and
X = σ̄·PQᵀ with σ̄ the mean of all these singular values. k is `common` of r, rounded so that every fine-tune has the
same s.

Here the τ_i are what TSV-M keeps (`tsv_m`): the first ⌊p/T⌋ triplets of each, and r is how many these are together.
That is p for whole fine-tunes, where what is cut hardly counts among the first triplets of the sum; of adapters it is
the sum of the ranks, all triplets are there, and r is that of Core Space (Panariello et al. 2025). Null directions, one
fine-tune alone and what is no matrix are as in `isotropic`. A weight makes a model's σ longer, as in a weighted sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from continual import linalg
from continual.lazily import Tensor, torch
from continual.rules import tsv_m
from continual.rules.contract import Rule, RuleRow, Triplets
from continual.rules.matrices import Include
from continual.rules.options import Number
from continual.rules.scale import ReadOptions


@dataclass(frozen=True)
class IsoCtsOptions:
    """The options of `iso-cts`."""

    common: Annotated[float, Number(above=0.0, most=1.0), "share of the directions that are those of the sum"] = 0.8
    include: Include = ()


def shares(rank: int, count: int, common: float) -> tuple[int, int]:
    """k, and the s of each of `count` fine-tunes, of `rank` directions."""
    own = min(rank // count, round((rank - int(common * rank)) / count))
    return rank - own * count, own


def factors(given: Triplets, common: float) -> tuple[Tensor, Tensor]:
    """σ̄·P and Q."""
    blocks = tsv_m.places(given)
    first, own = shares(len(given.sigma), len(blocks), common)
    u, sigma, v = tsv_m.triplets((given.u * given.sigma) @ given.v.mT, first)
    left, lengths, right = [u], [sigma], [v]
    for where in blocks:
        mine = given.u[:, where] * given.sigma[where]
        # V_i has orthonormal columns: what is left of τ_i = mine·V_iᵀ is decomposed on one side
        a, x, ch = torch.linalg.svd(mine - u @ (u.mT @ mine), full_matrices=False)
        held = min(own, int((x > linalg.NULL * given.sigma[where].max()).sum()))
        left.append(a[:, :held])
        lengths.append(x[:held])
        right.append(given.v[:, where] @ ch[:held].mT)
    return tsv_m.polar(torch.cat(left, 1)) * torch.cat(lengths).mean(), tsv_m.polar(torch.cat(right, 1))


def _make(options: IsoCtsOptions) -> Rule:
    return tsv_m.reading("iso-cts", options.include, tsv_m.of_several(lambda given: factors(given, options.common)))


ISO_CTS = RuleRow(
    name="iso-cts",
    summary="the directions of the sum, and some of each fine-tune's own, equally long",
    paper="Marczak et al. 2025, No Task Left Behind (Iso-CTS)",
    bytes_per_parameter="8 of a square matrix, 4 to 5 of long ones",
    read=ReadOptions("spread", 1.4),
    published=ReadOptions("number", 1.0),
    options=IsoCtsOptions,
    make=_make,
)
