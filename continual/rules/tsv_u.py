"""TSV-M on the side of the outputs alone: what the fine-tunes write is made orthogonal, and what they read stays.

TSV-M (`tsv_m`, Gargiulo et al. 2025) puts the leading triplets of all fine-tunes side by side and makes the columns of
U and of V orthogonal. Here it is those of U alone: with P the polar factor of U,

    X = P·diag(σ)·Vᵀ.

So every triplet goes on reading its input along the direction that it was trained with, and what it writes is moved
least, so that no two write the same. Ours. Adapters whose first factors began alike are why (ops/decisions/0101): their
V have nearly the same few directions, and what an orthogonal V tells them apart by is noise. Where the V of all
fine-tunes are orthogonal already it is TSV-M; where all have the same span, it is TSV-M times a number.

X is a sum with a term of each fine-tune. Null directions of U stay out as in `tsv_m`, one fine-tune alone reads as it
is, and everything that is no matrix reads as the mean. A weight makes a model's σ longer, and moves no direction.
"""

from __future__ import annotations

from continual import linalg
from continual.lazily import Tensor, torch
from continual.records import Totals
from continual.rules import tsv_less, tsv_m
from continual.rules.apart import Apart, LeftOut
from continual.rules.contract import Rule, RuleRow, Triplets
from continual.rules.matrices import MatrixOptions
from continual.rules.scale import ReadOptions


def factors(given: Triplets, totals: Totals) -> tuple[Tensor, Tensor]:
    """polar(U) diag(σ) and V over the triplets that stay with so many fine-tunes: m×r and n×r, float64."""
    found = tsv_m.kept(given, totals)
    return (tsv_m.polar(found.u) * found.sigma if found.owner else found.u), found.v


def merged(given: Triplets, totals: Totals) -> Tensor:
    """X, m×n float32: U·(UᵀU)^{-1/2}·diag(σ)·Vᵀ. What is made of the shorter side is multiplied first, and no float64
    copy of the longer one is made."""
    found = tsv_m.staying(given, totals)
    u, v = found.u, found.v
    x = u.new_empty(len(u), len(v))
    if not found.owner:
        return x.zero_()
    core, mild = tsv_m.root(u)
    core *= found.sigma.double()
    if len(u) < len(v):
        return torch.matmul((u.double() @ core).float(), v.mT, out=x)
    back = core @ v.mT.double()
    if mild:
        back = back.float()
    linalg.through(u, lambda block: block @ back, x, single=mild)
    return x


def without(given: Apart) -> LeftOut:
    """X without each of the models."""
    given = given.weighed()
    return tsv_less.without(given, (tsv_m.polar, None), tsv_m.choosing(given))


def _make(options: MatrixOptions) -> Rule:
    forms = tsv_m.Forms(merged, without)
    return tsv_m.reading("tsv-u", options.include, factors, owners=tsv_m.owners, forms=forms)


TSV_U = RuleRow(
    name="tsv-u",
    summary="the triplets of tsv-m with what they write made orthogonal, and what they read as it is",
    paper="TSV-M on the side of the outputs; of our own",
    bytes_per_parameter="8 of a square matrix, 4 to 5 of long ones",
    read=ReadOptions("spread", 1.0),
    published=ReadOptions("number", 1.0),
    options=MatrixOptions,
    make=_make,
)
