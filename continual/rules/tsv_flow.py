"""Flow of triplets: the flow of `flow`, of what `tsv-m` keeps of each fine-tune.

`flow` reads X = B·f(A), f(λ) = (1 − e^{−sλ})/λ, from sums that take three times the state of `tsv-m` (Wei et al. 2026,
"Closed-Form Spectral Regularization for Multi-Task Model Merging", SWUDI). Here its fine-tunes are those of TSV-M: the
first ⌊p/T⌋ triplets of each. Side by side they are U, σ and V, and with D = diag(σ/‖σ_i‖), ‖σ_i‖ being the length of
what is kept of the fine-tune that a column is of, A = V·D²·Vᵀ and B = U·D²·diag(σ)·Vᵀ. So

    X = U·diag(σ)·D·f(D·VᵀV·D)·D·Vᵀ    on the right side,    X = U·D·f(D·UᵀU·D)·D·diag(σ)·Vᵀ    on the left,

since f(WWᵀ)·W = W·f(WᵀW): nothing is inverted, no polar factor is taken, and no matrix is larger than p×p. Two-sided is
the mean of both. The time s is in units of one over the mean of all n (or m) eigenvalues of A, as in `flow`.

X is a sum with a term of each fine-tune, that of its own part of B. Null directions stay out as `tsv-m` leaves them
out, one fine-tune alone reads as it is, and everything that is no matrix reads as the mean. A weight makes a model's σ
longer, and with them its part of B; A knows no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from continual import linalg
from continual.lazily import Tensor, torch
from continual.records import Totals
from continual.rules import tsv_m
from continual.rules.contract import Rule, RuleRow, Triplets
from continual.rules.matrices import Include
from continual.rules.options import Number
from continual.rules.scale import ReadOptions


@dataclass(frozen=True)
class TsvFlowOptions:
    """The options of `tsv-flow`."""

    time: Annotated[float, Number(above=0.0), "when the flow stops, in units of one over the mean eigenvalue"] = 5.0
    include: Include = ()


def cores(given: Triplets, time: float) -> tuple[Tensor, Tensor]:
    """K and K′, r×r float64, of r triplets: X = U·(K + K′)·Vᵀ, K of the right side and K′ of the left."""
    sides = given.sides or (len(given.u), len(given.v))
    sigma = given.sigma.double()
    share = sigma.clone()
    blocks = tsv_m.places(given)
    for mine in blocks:
        share[mine] /= sigma[mine].norm()
    longer = share * sigma / 2
    right = longer[:, None] * _stopped(given.v, share, time * sides[1] / len(blocks)) * share
    left = share[:, None] * _stopped(given.u, share, time * sides[0] / len(blocks)) * longer
    return right, left


def _stopped(columns: Tensor, share: Tensor, time: float) -> Tensor:
    """f of the inner products of some columns, each times its share, for the flow up to this time."""
    gram = linalg.gram(columns.mT)
    values, vectors = torch.linalg.eigh(gram.mul_(share).mul_(share[:, None]))
    gone = values.clamp(min=0) * time
    held = gone > 0
    rate = torch.where(held, -torch.expm1(-gone) / torch.where(held, gone, 1.0), 1.0) * time
    found: Tensor = (vectors * rate) @ vectors.mT
    return found


def factors(given: Triplets, time: float) -> tuple[Tensor, Tensor]:
    """X as two factors, of which each fine-tune has its columns twice: its own part of B, behind the function of the
    right Gram, and before that of the left one."""
    right, left = cores(given, time)
    return torch.cat([given.u, given.u @ left], 1), torch.cat([given.v @ right.mT, given.v], 1)


def owners(given: Triplets, totals: Totals) -> Sequence[int]:
    """Whose each column of the factors is."""
    found = tsv_m.owners(given, totals)
    return found if totals.count == 1 else [*found, *found]


def merged(given: Triplets, totals: Totals, time: float) -> Tensor:
    """X, m×n float32. What is made of the shorter side is multiplied first, and no float64 copy of the longer one is
    made: nothing is inverted, so that float32 will do there."""
    found = tsv_m.staying(given, totals)
    u, v = found.u, found.v
    if not found.owner:
        return u.new_zeros(len(u), len(v))
    if totals.count == 1:
        core = found.sigma.double().diag()
    else:
        right, left = cores(found, time)
        core = right + left
    if len(u) >= len(v):
        return u @ (core @ v.double().mT).float()
    return (u.double() @ core).float() @ v.mT


def _make(options: TsvFlowOptions) -> Rule:
    return tsv_m.reading(
        "tsv-flow",
        options.include,
        tsv_m.of_several(lambda given: factors(given, options.time)),
        owners=owners,
        forms=tsv_m.Forms(lambda given, totals: merged(given, totals, options.time), wide=2),
    )


TSV_FLOW = RuleRow(
    name="tsv-flow",
    summary="the flow of flow, of the triplets that tsv-m keeps",
    paper="Wei et al. 2026, SWUDI, in closed form; of the triplets of TSV-M is ours",
    bytes_per_parameter="8 of a square matrix, 4 to 5 of long ones",
    read=ReadOptions("spread", 1.0),
    published=ReadOptions("number", 1.0),
    options=TsvFlowOptions,
    make=_make,
)
