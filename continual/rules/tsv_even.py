"""TSV-M with singular values that are the more alike the fewer directions fine-tunes have for themselves.

LoRA whose first factor is frozen, and one for all, has right singular vectors that span the same few directions in
every fine-tune. TSV-M finds no room to make them orthogonal there: what one reads most all of them read, and X is long
along that alone. With P and Q the polar factors of the columns U and V, of ranks p and q, X = PΣQᵀ = AΛBᵀ and
e = √(min(p, q)/max(p, q)), this reads λ₁·A(Λ/λ₁)^e·Bᵀ. Where as many directions are read as are written e is 1, and it
is TSV-M; where T fine-tunes share a frozen factor e is 1/√T (ops/decisions/0109).

X is a sum with a term of each fine-tune, AΛ^eBᵀ = AΛBᵀ·BΛ^(e−1)Bᵀ. Null directions, one fine-tune alone, what is no
matrix and weights are as in `tsv_m`.
"""

from __future__ import annotations

import math

from continual import linalg
from continual.lazily import Tensor, torch
from continual.records import Totals
from continual.rules import tsv_less, tsv_m
from continual.rules.apart import Apart, LeftOut, SideVectors
from continual.rules.contract import Rule, RuleRow, Triplets
from continual.rules.matrices import MatrixOptions
from continual.rules.scale import ReadOptions


def factors(given: Triplets, totals: Totals) -> tuple[Tensor, Tensor]:
    """X as two factors over the triplets that stay with so many fine-tunes: m×r and n×r, float64."""
    found = tsv_m.kept(given, totals)
    if not found.owner:
        return found.u, found.v
    (left, p), (right, q) = tsv_m.ranked(found.u), tsv_m.ranked(found.v)
    left = left * found.sigma
    return (left, right) if p == q else (left, evened(left, right, min(p, q), math.sqrt(min(p, q) / max(p, q))))


def evened(left: Tensor, right: Tensor, rank: int, power: float) -> Tensor:
    """The second factor of a matrix of this rank at most (m×r, n×r) that takes its singular values, as shares of the
    largest, to a power."""
    (_, one), (basis, other) = torch.linalg.qr(left), torch.linalg.qr(right)
    _, sigma, turned = torch.linalg.svd(one @ other.mT, full_matrices=False)
    rank = min(rank, int((sigma > linalg.NULL * sigma[0]).sum()))
    directions = basis @ turned[:rank].mT
    longer = (sigma[:rank] / sigma[0]).pow(power - 1)
    found: Tensor = directions @ (longer[:, None] * (directions.mT @ right))
    return found


def without(given: Apart) -> LeftOut:
    """X without each of the models: as `tsv_m` where no direction is about to be null, then X is that of it with any of
    the models and without; else it is read again."""
    if _apart(given.left) and _apart(given.right):
        return tsv_m.without(given)
    return LeftOut(None, [None] * len(given.weights))


def _apart(side: SideVectors) -> bool:
    """Whether the vectors of a side are far from depending on each other."""
    values = torch.linalg.eigvalsh(side.gram)
    return not len(values) or float(values[0]) > tsv_less.SAFE * float(values[-1])


def _make(options: MatrixOptions) -> Rule:
    def whole(given: Triplets, totals: Totals) -> Tensor:
        left, right = factors(given, totals)
        return left.float() @ right.float().mT

    forms = tsv_m.Forms(whole, without)
    return tsv_m.reading("tsv-even", options.include, factors, owners=tsv_m.owners, forms=forms)


TSV_EVEN = RuleRow(
    name="tsv-even",
    summary="tsv-m, with more equal singular values where fine-tunes share a frozen factor",
    paper="TSV-M where factors are shared; of our own",
    bytes_per_parameter="8 of a square matrix, 4 to 5 of long ones",
    read=ReadOptions("spread", 1.0),
    published=ReadOptions("number", 1.0),
    options=MatrixOptions,
    make=_make,
)
