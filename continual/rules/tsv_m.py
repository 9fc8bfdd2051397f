"""TSV-M: the leading singular triplets of every fine-tune, made orthogonal to each other.

Gargiulo et al. 2025, "Task Singular Vectors: Reducing Task Interference in Model Merging", algorithm 1: of each of T
task matrices keep the first k = ⌊p/T⌋ triplets, put them side by side, replace U and V by their polar factors,
multiply. The first k triplets are a prefix of the first k′ > k, so the state after T + 1 fine-tunes is that after T
with every block cut, and the new block: p columns for good, and the batch's result at every T ≤ p. Beyond, one triplet
each of the p fine-tunes with the largest: ours. Triplets at or below 1e-6 of their matrix's largest are left out, and
so are null directions of the polar factors. Everything that is no matrix reads as the mean.

A weight w is ours: the triplets are those of wτ. It makes their σ longer, and leaves U and V, and with them what the
polar factors do to other models, as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from continual import linalg
from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.records import SlotSpec, Totals
from continual.rules import matrices, tsv_less
from continual.rules.apart import Apart, LeftOut
from continual.rules.contract import Accumulators, Factored, Folded, Inputs, Laws, Rule, RuleRow, Sums, Triplets
from continual.rules.matrices import MatrixOptions, OnMatrices
from continual.rules.scale import ReadOptions
from continual.rules.terms import ModelTerms

U, SIGMA, V, OWNER = "u", "sigma", "v", "owner"
KEEPS = frozenset({"triplets"})
"""What a state keeps that this rule made, and the other readings of it."""
Factors = Callable[[Triplets, Totals], tuple[Tensor, Tensor]]
"""X as two factors, m×r and n×r float64, from the triplets of all fine-tunes and the totals."""
Owners = Callable[[Triplets, Totals], Sequence[int]]
"""Whose each column of such factors is."""
_MOST = (1 << 16) - 1
"""Fine-tunes that the numbers of `owner` can tell apart."""


def triplets(tau: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` singular triplets (fewer where they are null) of an m×n matrix: U (m×k), σ (k), V (n×k) in
    float64."""
    rows = linalg.tall(tau)
    sigma, v = linalg.right_singular(rows, linalg.NULL)
    k = min(count, int((sigma > 0).sum()))
    sigma, v = sigma[:k], v[:, :k]
    u = torch.cat([block @ v for _, block in linalg.in_float64(rows)]) / sigma
    return (u, sigma, v) if rows is tau else (v, sigma, u)


def choose(owner: Sequence[int], sigma: Sequence[float], count: int, p: int) -> list[int]:
    """Which columns stay with `count` fine-tunes: of each its first ⌊p/count⌋; where that is none, the first of each,
    of those the p largest."""
    width, place, chosen = max(1, p // count), dict.fromkeys(owner, 0), []
    for column, number in enumerate(owner):
        if number and place[number] < width:
            place[number] += 1
            chosen.append(column)
    return sorted(sorted(chosen, key=lambda c: -sigma[c])[:p]) if len(chosen) > p else chosen


def polar(columns: Tensor) -> Tensor:
    """U_kV_kᵀ of an m×r matrix over its k directions that are not null; float64."""
    return ranked(columns)[0]


def ranked(columns: Tensor) -> tuple[Tensor, int]:
    """The same, and k."""
    if columns.shape[0] < columns.shape[1]:
        found, rank = ranked(columns.mT)
        return found.mT, rank
    sigma, v = linalg.right_singular(columns, linalg.NULL)
    rank = int((sigma > 0).sum())
    turned = linalg.together(columns.shape, v[:, :rank] / sigma[:rank], v[:, :rank].mT)
    return turned(columns), rank


def product(u: Tensor, sigma: Tensor, v: Tensor, tau: Tensor) -> float:
    """⟨τ, U diag(σ) Vᵀ⟩ of an m×n matrix, of m×k and n×k: by blocks of rows, in float32 and their sums in float64."""
    total = torch.zeros(len(sigma), dtype=torch.float64, device=tau.device)
    for rows in linalg.row_blocks(len(tau), max(tau.shape[1], len(sigma))):
        total += (tau[rows] @ v).mul_(u[rows]).sum(0)
    return float(total @ sigma.double())


def fold_matrix(accumulators: Accumulators, tau: Tensor, totals: Totals, weight: float) -> Folded:
    """Puts the triplets of an m×n task vector, times its weight, beside what is kept, and cuts every block to the new
    width; in place."""
    count = int(totals.count) + 1
    if count > _MOST:
        raise Misconfigured(f"tsv-m: {_MOST} fine-tunes are the most that its state can tell apart")
    sigma, owner = accumulators[SIGMA], accumulators[OWNER]
    u, v, p, tau_sq = accumulators[U], accumulators[V], len(sigma), linalg.inner(tau, tau)
    owners = owner.tolist()
    held = sum(number > 0 for number in owners)
    dot, top_sq = product(u[:, :held], sigma[:held], v[:, :held], tau) if held else 0.0, tau_sq
    if 0.0 < tau_sq < math.inf:
        rows = linalg.tall(tau)
        found, right = linalg.right_singular(rows, linalg.NULL)
        top_sq, found = float(found[0]) ** 2, found[: min(max(1, p // count), int((found > 0).sum()))]
        lengths = torch.cat([sigma, (found * weight).float()]).tolist()
        chosen = choose(owners + [count] * len(found), lengths, count, p)
        stay = [column for column in chosen if column < p]
        new = len(chosen) - len(stay)
        left, other = (u, v) if rows is tau else (v, u)
        _put(left, stay, _ahead(rows, found[:new], right[:, :new]))
        _put(other, stay, ((part, right[part, :new]) for part in linalg.row_blocks(*other.shape)))
        for slot, values in ((sigma, lengths), (owner, owners + [count] * new)):
            filled = [values[column] for column in chosen] + [0] * (p - len(chosen))
            slot.copy_(torch.tensor(filled, dtype=slot.dtype, device=slot.device))
    merged_sq = linalg.inner(sigma, sigma)
    return Folded(accumulators, Sums(tau_sq, dot, merged_sq, tau_sq, top_sq))


def _ahead(rows: Tensor, sigma: Tensor, v: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """U = τV/σ of an m×n matrix by blocks of its rows. In float32, which U is kept in, where σ is about the average or
    more: rounding in the product is to U as the average σ to this one."""
    average = float(linalg.inner(rows, rows) / rows.shape[1]) ** 0.5
    short = int((sigma > average / 4).sum())
    back = v / sigma
    near, far = back[:, :short].float(), back[:, short:]
    if not far.shape[1]:
        yield from ((part, rows[part] @ near) for part in linalg.row_blocks(*rows.shape))
        return
    for part, block in linalg.in_float64(rows):
        yield part, torch.cat([rows[part] @ near, (block @ far).float()], 1)


def _put(kept: Tensor, stay: Sequence[int], new: Iterable[tuple[slice, Tensor]]) -> None:
    """Columns beside those that stay of what is kept, by blocks of rows; the rest becomes zeros."""
    places = None if list(stay) == list(range(len(stay))) else torch.tensor(stay, device=kept.device)
    for rows, values in new:
        if places is not None:
            kept[rows, : len(stay)] = kept[rows].index_select(1, places)
        end = len(stay) + values.shape[1]
        kept[rows, len(stay) : end] = values
        kept[rows, end:] = 0.0


def staying(given: Triplets, totals: Totals) -> Triplets:
    """The triplets that stay with so many fine-tunes; blocks that a later one did not touch are cut here."""
    p = min(given.sides or (len(given.u), len(given.v)))
    chosen = choose(given.owner, given.sigma.tolist(), max(1, int(totals.count)), p)
    places = slice(len(chosen)) if chosen == list(range(len(chosen))) else chosen
    owner = [given.owner[column] for column in chosen]
    return Triplets(owner, given.u[:, places], given.sigma[places], given.v[:, places], given.sides)


def kept(given: Triplets, totals: Totals) -> Triplets:
    """The same in float64."""
    owner, u, sigma, v, sides = staying(given, totals)
    return Triplets(owner, u.double(), sigma.double(), v.double(), sides)


def owners(given: Triplets, totals: Totals) -> Sequence[int]:
    """Whose each of the triplets is that stay with so many fine-tunes: the columns of factors that have one each."""
    return staying(given, totals).owner


def places(given: Triplets) -> list[slice]:
    """The columns of each fine-tune, which lie side by side."""
    ends = [column for column, owner in enumerate(given.owner) if given.owner[column + 1 : column + 2] != [owner]]
    return [slice(start, end + 1) for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def merged(given: Triplets, totals: Totals) -> Tensor:
    """X, m×n float32: U·(UᵀU)^{-1/2}·diag(σ)·(VᵀV)^{-1/2}·Vᵀ. What lies between U and V is multiplied first: no polar
    factor of the longer one is made, and no float64 copy of it."""
    owner, u, sigma, v, _ = staying(given, totals)
    if not owner:
        return u.new_zeros(len(u), len(v))
    (core, mild), (after, other_mild) = root(u), root(v)
    core = core * sigma.double() @ after
    del after  # what follows is large itself
    rows, short, single = (u, v, mild) if len(u) >= len(v) else (v, u, other_mild)
    back = (core if rows is u else core.mT) @ short.double().mT
    if single:
        back = back.float()
    del core
    found = u.new_empty(len(u), len(v))
    linalg.through(rows, lambda block: block @ back, found if rows is u else found.mT, single=single)
    return found


def root(columns: Tensor) -> tuple[Tensor, bool]:
    """(CᵀC)^{-1/2} of an m×r matrix C over its directions that are not null, r×r float64, and whether a product of C
    with it may be made in float32."""
    sigma, v = linalg.right_singular(columns, linalg.NULL)
    rank = int((sigma > 0).sum())
    sigma, v = sigma[:rank], v[:, :rank]
    return v / sigma @ v.mT, linalg.mild(sigma)


def factors(given: Triplets, totals: Totals) -> tuple[Tensor, Tensor]:
    """polar(U) diag(σ) and polar(V) over the triplets that stay with so many fine-tunes: m×r and n×r, float64."""
    found = kept(given, totals)
    return (polar(found.u) * found.sigma, polar(found.v)) if found.owner else (found.u, found.v)


def of_several(make: Callable[[Triplets], tuple[Tensor, Tensor]]) -> Factors:
    """Another reading, by what `make` makes of the triplets that stay; one fine-tune alone reads as it is
    (ops/decisions/0050)."""

    def read(given: Triplets, totals: Totals) -> tuple[Tensor, Tensor]:
        found = kept(given, totals)
        return make(found) if found.owner and totals.count != 1 else (found.u * found.sigma, found.v)

    return read


def without(given: Apart) -> LeftOut:
    """X without each of the models."""
    given = given.weighed()
    return tsv_less.without(given, (polar, polar), choosing(given))


def choosing(given: Apart) -> tsv_less.Choose:
    """Which of its triplets stay."""
    p, sigma = min(given.sides), given.sigma.tolist()
    return lambda owner, count: choose(owner, sigma, max(1, int(count)), p)


def slots(m: int, n: int) -> dict[str, SlotSpec]:
    """p = min(m, n) columns of triplets, and which fine-tune each is of (0: none)."""
    p = min(m, n)
    return {U: SlotSpec((m, p)), SIGMA: SlotSpec((p,)), V: SlotSpec((n, p)), OWNER: SlotSpec((p,), "uint16")}


def workspace(m: int, n: int) -> int:
    """A decomposition, and U times 1/σ before it is multiplied."""
    return linalg.workspace(m, n) + 12 * min(m, n) ** 2


def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
    """One matrix of a fine-tune."""
    return fold_matrix(accumulators, tau.flatten(1), totals, inputs.weight)


class Forms(NamedTuple):
    """What a reading has besides its factors: `whole`, X at once, and `without`, X without each of the models, where
    there is a quicker way than reading again; `wide`: how many columns of the factors come of one triplet."""

    whole: Callable[[Triplets, Totals], Tensor]
    without: Callable[[Apart], LeftOut] | None = None
    wide: int = 1


def reading(
    name: str,
    include: Sequence[str],
    factors: Factors,
    *,
    weighted: bool = True,
    owners: Owners | None = None,
    forms: Forms | None = None,
) -> Rule:
    """A rule that keeps the triplets and reads matrices by `factors`. Unless it is `weighted` every weight is 1.
    `owners`: whose each column of the factors is, where X is a sum with a term of each fine-tune."""

    def stored(accumulators: Accumulators) -> Triplets:
        u, sigma, v, owner = (accumulators[slot] for slot in (U, SIGMA, V, OWNER))
        return Triplets(owner.tolist(), u, sigma, v)

    def read(accumulators: Accumulators, totals: Totals) -> Tensor:
        given = stored(accumulators)
        if forms is not None:
            return forms.whole(given, totals)
        left, right = factors(given, totals)
        return left.float() @ right.float().mT

    def told_apart(accumulators: Accumulators, totals: Totals) -> ModelTerms:
        given = stored(accumulators)
        assert owners is not None
        return ModelTerms(*factors(given, totals), owners(given, totals))

    without, wide = (forms.without, forms.wide) if forms else (None, 1)
    factored = Factored(triplets=factors, without=without, owners=owners, wide=wide)
    on = OnMatrices(fold, read, workspace, slots, factored, True, terms=owners and told_apart)
    return matrices.rule(name, include, on, Laws(weighted=weighted, keeps=KEEPS))


def _make(options: MatrixOptions) -> Rule:
    return reading("tsv-m", options.include, factors, owners=owners, forms=Forms(merged, without))


TSV_M = RuleRow(
    name="tsv-m",
    summary="the leading singular triplets of every fine-tune, made orthogonal",
    paper="Gargiulo et al. 2025, Task Singular Vectors (TSV-M)",
    bytes_per_parameter="8 of a square matrix, 4 to 5 of long ones",
    read=ReadOptions("spread", 1.0),
    published=ReadOptions("number", 1.0),
    options=MatrixOptions,
    make=_make,
)
