"""Isotropic TSV: the merge of TSV-M with equal singular values.

Panariello et al. 2025, "Accurate and Efficient Low-Rank Model Merging in Core Space", where this pair is the best of
those tried: the triplets are merged as Gargiulo et al. 2025 do (`tsv_m`), then every singular value of the result is
replaced by their mean, as Marczak et al. 2025 do with the sum (`iso_c`). With P and Q the polar factors of the columns
U and V, X = σ̄·polar(PΣQᵀ), which is σ̄·PQᵀ where neither has null directions. Core Space merges in the small bases of
what the adapters span; a state of adapters does so under every rule that sees matrices, and reads the same in the whole
space.

Departures: singular values at or below 1e-6 of the largest stay null; one fine-tune alone reads as it is. A weight
would change σ̄ alone, and no direction: every weight is 1. Everything that is no matrix reads as the mean.
"""

from __future__ import annotations

from continual import linalg
from continual.lazily import Tensor
from continual.rules import tsv_m
from continual.rules.contract import Rule, RuleRow, Triplets
from continual.rules.matrices import MatrixOptions
from continual.rules.scale import ReadOptions


def flat(given: Triplets) -> tuple[Tensor, Tensor]:
    """The factors of σ̄·polar(PΣQᵀ)."""
    left, right = tsv_m.polar(given.u), tsv_m.polar(given.v)
    if all(round(float(side.square().sum())) == len(given.sigma) for side in (left, right)):
        held = given.sigma > linalg.NULL * given.sigma.max()
        return left[:, held] * given.sigma[held].mean(), right[:, held]
    # P maps the range of PᵀP to columns at right angles; there PΣQᵀ is this, of the triplets' own size
    core = (left.mT @ left * given.sigma) @ (right.mT @ right)
    sigma, v = linalg.right_singular(core, linalg.NULL)
    rank = int((sigma > 0).sum())
    turned = core @ (v[:, :rank] / sigma[:rank])
    return left @ (turned * sigma[:rank].mean()), right @ v[:, :rank]


def _make(options: MatrixOptions) -> Rule:
    return tsv_m.reading("isotropic", options.include, tsv_m.of_several(flat), weighted=False)


ISOTROPIC = RuleRow(
    name="isotropic",
    summary="the merge of tsv-m with equal singular values",
    paper="Panariello et al. 2025, Low-Rank Model Merging in Core Space (TSV, then isotropic)",
    bytes_per_parameter="8 of a square matrix, 4 to 5 of long ones",
    read=ReadOptions("spread", 1.3),
    published=ReadOptions("number", 1.0),
    options=MatrixOptions,
    make=_make,
)
