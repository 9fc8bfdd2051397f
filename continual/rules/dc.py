"""DC-Merge: every fine-tune in the common basis of all triplets, where signs are elected entry by entry.

Zhang et al. 2026, "DC-Merge: Improving Model Merging with Directional Consistency" (CVPR 2026), and the authors' code:
the cover bases P and Q are the polar factors of the columns U and V of all fine-tunes (`tsv_m`); in them fine-tune i is
M_i = PᵀU_i·diag(σ′_i)·V_iᵀQ; of each M_i the entries of largest magnitude stay, signs are elected and what agrees is
averaged, as TIES has it (`ties`); of the result M the diagonal blocks stay, one for each fine-tune; X = P·M·Qᵀ.

σ′ are the singular values (`smooth` = `none`: the authors' code for whole fine-tunes), or these smoothed within each
fine-tune (their code for adapters): their `mean`, or their sum in shares that fall in a line from min(5, σ₁/σ_k) to 1
(`linear`).

Departures: of M_i at least as many entries stay as the fine-tune has triplets, and those within 1e-4 of the smallest of
these (a thousandth of a small core is one entry; twins have equal ones). Entries of 1e-6 of the largest or less never
do. A sum of 2⁻²⁰ of the magnitudes or less is a draw, and reads 0. Null directions, one fine-tune alone and what is no
matrix are as in `isotropic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from continual import linalg
from continual.lazily import Tensor, torch
from continual.rules import tsv_m
from continual.rules.contract import Rule, RuleRow, Triplets
from continual.rules.matrices import Include
from continual.rules.options import Choice, Number
from continual.rules.scale import ReadOptions

Smooth = Literal["none", "mean", "linear"]
SMOOTH: tuple[Smooth, ...] = get_args(Smooth)
STEEPEST = 5.0
"""The most that the first of the smoothed singular values is of the last (the authors' ρ)."""
CLOSE = 1e-4
DRAW = 2.0**-20


@dataclass(frozen=True)
class DcOptions:
    """The options of `dc`."""

    smooth: Annotated[Smooth, Choice(SMOOTH), "how singular values are smoothed within a fine-tune"] = "none"
    density: Annotated[float, Number(above=0.0, most=1.0), "share of the entries of each fine-tune that stay"] = 1e-3
    include: Include = ()


def smoothed(sigma: Tensor, how: Smooth) -> Tensor:
    """σ′ of one fine-tune, from its singular values, largest first."""
    if how == "none":
        return sigma
    if how == "mean":
        return sigma.mean().expand(len(sigma))
    steep = min(STEEPEST, float(sigma[0] / sigma[-1]))
    line = torch.linspace(steep, 1.0, len(sigma), dtype=sigma.dtype, device=sigma.device)
    return sigma.sum() * line / line.sum()


def trim(core: Tensor, least: int, density: float) -> Tensor:
    """M_i with its largest entries, `least` at least; the others become zero, in place."""
    sizes = core.abs()
    last = sizes.flatten().topk(max(least, int(density * core.numel()))).values[-1]
    return core.masked_fill_(sizes < torch.maximum(last * (1.0 - CLOSE), linalg.NULL * sizes.max()), 0.0)


def elected(plus: Tensor, minus: Tensor, counts: tuple[Tensor, Tensor]) -> Tensor:
    """The mean of the entries whose sign is that of the sum, from the sums of those above and below 0, and how many
    there are of each."""
    total = plus + minus
    found = torch.where(total > 0, plus / counts[0].clamp(min=1), minus / counts[1].clamp(min=1))
    return torch.where(total.abs() > DRAW * (plus - minus), found, 0.0)


def factors(given: Triplets, options: DcOptions) -> tuple[Tensor, Tensor]:
    """P·M and Q."""
    left, right = tsv_m.polar(given.u), tsv_m.polar(given.v)
    blocks = tsv_m.places(given)
    sums = [[left.new_zeros(where.stop - where.start, where.stop - where.start) for _ in range(4)] for where in blocks]
    for mine in blocks:
        sigma = smoothed(given.sigma[mine], options.smooth)
        near, far = left.mT @ given.u[:, mine], right.mT @ given.v[:, mine]
        core = trim((near * sigma) @ far.mT, len(sigma), options.density)
        for where, (plus, minus, above, below) in zip(blocks, sums, strict=True):
            part = core[where, where]
            plus += part.clamp(min=0)
            minus += part.clamp(max=0)
            above += part > 0
            below += part < 0
    for where, (plus, minus, above, below) in zip(blocks, sums, strict=True):
        left[:, where] = left[:, where] @ elected(plus, minus, (above, below))
    return left, right


def _make(options: DcOptions) -> Rule:
    return tsv_m.reading("dc", options.include, tsv_m.of_several(lambda given: factors(given, options)))


DC = RuleRow(
    name="dc",
    summary="the triplets of tsv-m in a common basis, where signs are elected entry by entry",
    paper="Zhang et al. 2026, DC-Merge: Improving Model Merging with Directional Consistency",
    bytes_per_parameter="8 of a square matrix, 4 to 5 of long ones",
    read=ReadOptions("spread", 1.0),
    published=ReadOptions("number", 1.0),
    options=DcOptions,
    make=_make,
)
