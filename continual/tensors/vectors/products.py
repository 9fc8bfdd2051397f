"""How far the products of paired matrices (names/pairings.py) moved, beside how far the matrices themselves did: what
an invertible map between the two hides, and which head of the base one of the candidate is.

Of a head with the rows A in one matrix and B in the other, AᵀB is never made: ‖AᵀB‖² and the inner products of such are
sums over the Gram matrices AAᵀ and BBᵀ, of the head's size, in float64. A matrix streams by in rows, so memory goes by
heads times their size squared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from continual.tensors.names.pairings import Pairing, PairKind, Side

Floats = NDArray[np.float64]
Rows = Callable[[str, int], Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]]
"""Gives a matrix in parts, from its first row on, as a multiple of so many rows (the last may have fewer): the base's
rows, and what the candidate changes of them."""

FAR = 0.1
"""‖τ‖/‖θ₀‖ of both matrices of a pair from which on their products are of interest: what moves less is no lock that
harms."""
STRANGE = 0.2
"""|cosine| of a head's product with the base's below which it may be that of another head."""
SEARCHED = 4
"""Heads of a pair that are looked for among those of the base, for a head's size of `_WIDE`; more of smaller ones."""
_WIDE = 16
_PROJECTED = 8
"""Rows of a head from which on they are compared as the base's rows explain them: of fewer two can agree by chance."""


class HeadElsewhere(NamedTuple):
    """Head `here` of the candidate is most like head `there` of the base: `alike` is the cosine of their products."""

    here: int
    there: int
    alike: float


class HeadFigures(NamedTuple):
    """Of one pair of matrices, by heads: `apart` is ‖A − A₀‖/‖A₀‖, the smaller one of the two matrices, and `moved` is
    ‖AᵀB − A₀ᵀB₀‖/‖A₀ᵀB₀‖, both of A and B as the rows of A₀ and B₀ explain them, but for channels; `alike` is the
    cosine of the products as they are. 0, 0 and 1 of a head that is zero in the base.
    `elsewhere`: of some that are not alike, where they are."""

    where: str
    kind: PairKind
    apart: Floats
    moved: Floats
    alike: Floats
    elsewhere: tuple[HeadElsewhere, ...] = ()


class _Grams(NamedTuple):
    """Of each head, heads × size × size: of the candidate with itself, of it with the base, of the base with itself."""

    theirs: Floats
    both: Floats
    ours: Floats

    def projected(self) -> _Grams:
        """Of the candidate's rows as the base's rows explain them, by least squares: a matrix that was put before them
        is left, and of what was learned a small part, since few of its directions lie there."""
        back = np.linalg.pinv(self.ours, rcond=1e-6, hermitian=True)
        return _Grams(self.both @ back @ self.both.transpose(0, 2, 1), self.both, self.ours)

    @property
    def apart(self) -> Floats:
        """‖A − A₀‖/‖A₀‖ of each head."""
        theirs, both, ours = (np.trace(one, axis1=1, axis2=2) for one in self)
        found: Floats = np.sqrt(np.maximum(theirs - 2 * both + ours, 0.0) / np.where(ours > 0, ours, np.inf))
        return found


def figures(pair: Pairing, rows: Rows) -> HeadFigures:
    """Of one pair. Raises what `rows` raises."""
    first = _grams(pair.first, pair.heads, pair.size, rows)
    second = _grams(pair.second, pair.heads // pair.shared, pair.size, rows)
    theirs, both, ours = _products(first, second, pair.shared)
    known = (ours > 0) & (theirs > 0)
    alike = both / np.sqrt(np.where(known, theirs * ours, 1.0))
    if pair.size >= _PROJECTED:
        first, second = first.projected(), second.projected()
    apart = np.minimum(first.apart, np.repeat(second.apart, pair.shared))
    moved, mixed, kept = _products(first, second, pair.shared)
    moved = np.sqrt(np.maximum(moved - 2 * mixed + kept, 0.0) / np.where(kept > 0, kept, np.inf))
    found = HeadFigures(
        pair.where,
        pair.kind,
        np.where(known, apart, 0.0),
        np.where(known, moved, 0.0),
        np.where(known, np.clip(alike, -1.0, 1.0), 1.0),
    )
    strange = np.flatnonzero((np.abs(found.alike) < STRANGE) & (found.apart > 0.5))
    if len(strange) < 2:
        return found
    count = SEARCHED * max(1, _WIDE // pair.size)
    some = strange[np.unique(np.linspace(0, len(strange) - 1, min(count, len(strange))).astype(int))]
    lengths = np.sqrt(theirs[some])[:, None] * np.sqrt(np.where(ours > 0, ours, np.inf))
    cosines = _beside(pair, some, rows) / lengths
    there = np.argmax(cosines, 1)
    best = zip(some.tolist(), there.tolist(), cosines[np.arange(len(some)), there].tolist(), strict=True)
    return found._replace(elsewhere=tuple(HeadElsewhere(*one) for one in best))


def _products(first: _Grams, second: _Grams, shared: int) -> tuple[Floats, Floats, Floats]:
    """The inner products of AᵀB with itself, of it with A₀ᵀB₀, and of that with itself, by heads."""
    theirs, both, ours = (
        np.einsum("hij,hij->h", a, np.repeat(b, shared, 0)) for a, b in zip(first, second, strict=True)
    )
    return theirs, both, ours


def _beside(pair: Pairing, some: NDArray[np.intp], rows: Rows) -> Floats:
    """⟨AᵢᵀBᵢ, A₀ⱼᵀB₀ⱼ⟩ of some heads i of the candidate with every head j of the base, some × heads."""
    first = _mixed(pair.first, some, pair.heads, pair.size, rows)
    second = _mixed(pair.second, some // pair.shared, pair.heads // pair.shared, pair.size, rows)
    return np.stack(
        [np.einsum("hij,hij->h", a, np.repeat(b, pair.shared, 0)) for a, b in zip(first, second, strict=True)]
    )


def _mixed(side: Side, some: NDArray[np.intp], heads: int, size: int, rows: Rows) -> Floats:
    """AᵢA₀ⱼᵀ, some × heads × size × size."""
    found = np.zeros((len(some), heads, size, size))
    if side.across:
        for _, ours, theirs in _blocks(side, heads, size, rows):
            found += np.einsum("sin,hjn->shij", theirs[some], ours, optimize=True)
        return found
    mine: dict[int, Floats] = {}
    for start, _, theirs in _blocks(side, heads, size, rows):
        mine |= {int(h): theirs[h - start].copy() for h in some if start <= h < start + len(theirs)}
    for start, ours, _ in _blocks(side, heads, size, rows):
        for number, head in enumerate(some):
            found[number, start : start + len(ours)] = np.matmul(mine[int(head)], ours.transpose(0, 2, 1))
    return found


def _grams(side: Side, heads: int, size: int, rows: Rows) -> _Grams:
    found = _Grams(*(np.zeros((heads, size, size)) for _ in range(3)))
    for start, ours, theirs in _blocks(side, heads, size, rows):
        here = slice(start, start + len(ours))
        turned = ours.transpose(0, 2, 1)
        found.theirs[here] += np.matmul(theirs, theirs.transpose(0, 2, 1))
        found.both[here] += np.matmul(theirs, turned)
        found.ours[here] += np.matmul(ours, turned)
    return found


def _blocks(side: Side, heads: int, size: int, rows: Rows) -> Iterator[tuple[int, Floats, Floats]]:
    """The heads of a matrix in parts: the first head, and base and candidate as heads × size × numbers. Of one whose
    heads lie across, all heads each time, and some of their numbers."""
    if side.across:
        columns = slice(side.start, side.start + heads * size)
        for base, tau in rows(side.name, 1):
            ours = base[:, columns].astype(np.float64)
            theirs = ours + tau[:, columns]
            yield 0, _by_columns(ours, heads), _by_columns(theirs, heads)
        return
    skipped, inner = divmod(side.start, side.step)
    at = -skipped
    for base, tau in rows(side.name, side.step):
        count = len(base) // side.step
        first, last = max(0, -at), min(count, heads - at)
        if last > first:
            ours = _by_rows(base, side.step)[first:last, inner : inner + size].astype(np.float64)
            yield at + first, ours, ours + _by_rows(tau, side.step)[first:last, inner : inner + size]
        at += count


def _by_rows(part: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    return part[: len(part) // step * step].reshape(-1, step, part.shape[1])


def _by_columns(part: Floats, heads: int) -> Floats:
    return part.reshape(len(part), heads, -1).transpose(1, 2, 0)
