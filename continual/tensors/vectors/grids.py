"""Whether numbers lie on the grid of a quantisation: what was rounded to 8 bits or fewer and written as floats again.

Numbers that share a scale lie on few, evenly spaced values (integers), on those of a small float (FP8, FP4), or on
those of a table (NF4, IQ4). The scale is not known, so every one is tried that the largest number of a block can have.
The distance to the nearest value of the grid, in steps of it, is 0.15 to 0.25 for numbers that were not rounded, and 0
to 0.07 for those that were, also after a conversion to half precision. A grid that the base has as well counts for
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Distance = Callable[[Floats], Floats]

BLOCK = 32
"""Numbers in a row that are compared with one scale; the smallest block of formats but those of `_SMALL`."""
_SMALL = 16
_BLOCKS, _FIRST = 64, 4
"""Blocks of a matrix that are looked at, along its rows and along its columns each; and those that are looked at before
the others, which is all of an honest model."""
_ON, _OFF = 0.1, 0.12
"""Of a step: the largest median distance of a matrix that lies on a grid, the smallest of a base that does not."""
_FEW = 6
"""Different numbers that a block has to have where many scales are tried: fewer are near one of them by chance."""

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""QLoRA (arXiv 2305.14314), appendix E."""
_FP4 = tuple(sign * value for sign in (-1.0, 1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""E2M1 of OCP's microscaling formats."""
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""IQ4_NL and IQ4_XS of llama.cpp."""


class Blocks(NamedTuple):
    """Blocks of a matrix, each of `BLOCK` numbers: of the candidate, and of the base in the candidate's dtype."""

    theirs: Floats
    ours: Floats


def grid_of(theirs: NDArray[np.float32], ours: NDArray[np.float32]) -> str | None:
    """The grid on which the first rows of a matrix lie, in words; empty where they lie on none, or the base lies on it
    too; None where there are too few numbers to tell. `theirs`, `ours`: rows × columns of candidate and base."""
    found = None
    for along in (_blocks(theirs, ours), _blocks(theirs.T, ours.T)):
        if along is None:
            continue
        found = ""
        first = along.theirs[:_FIRST]
        if not any(_median(distance(first)) <= limit for distance, limit in _COARSE):
            continue
        for name, distance in _GRIDS.items():
            if _median(distance(along.theirs)) <= _ON and _median(distance(along.ours)) > _OFF:
                return name
    return found


def _median(distances: Floats) -> float:
    """NaN where fewer than half are known."""
    known = distances[np.isfinite(distances)]
    return float(np.median(known)) if 2 * len(known) >= len(distances) else float("nan")


def _blocks(theirs: NDArray[np.float32], ours: NDArray[np.float32]) -> Blocks | None:
    """Blocks along the rows, spread over them, without those whose numbers are mostly zero, all the same or not
    finite."""
    rows, columns = theirs.shape
    each = columns // BLOCK
    if not rows * each:
        return None
    places = np.unique(np.linspace(0, rows * each - 1, min(2 * _BLOCKS, rows * each)).astype(int))
    index = places[:, None] // each, places[:, None] % each * BLOCK + np.arange(BLOCK)
    blocks = [one[index].astype(np.float64) for one in (theirs, ours)]
    good = np.logical_and.reduce(
        [np.isfinite(one).all(1) & (np.ptp(one, 1) > 0) & (2 * np.count_nonzero(one, 1) > BLOCK) for one in blocks]
    )
    if 2 * good.sum() < len(places) or good.sum() < 2 * _FIRST:
        return None
    order = np.random.default_rng(0).permutation(np.flatnonzero(good))[:_BLOCKS]
    return Blocks(*(one[order] for one in blocks))


def _different(blocks: Floats) -> Floats:
    """1 at the first of equal numbers of sorted blocks, 0 at the others."""
    found = np.ones(blocks.shape)
    found[:, 1:] = np.diff(blocks, axis=1) > 0
    return found


def _even(most: int, width: int = BLOCK, *, fitted: bool = True) -> Distance:
    """Of blocks of `width` numbers: the mean distance to evenly spaced values, in steps, of which 1 to `most` lie
    between the smallest number and the largest. `fitted`: these two may be rounded too, so spacing and beginning are
    those that fit all numbers best."""
    levels = np.arange(1.0, most + 1.0)

    def distance(blocks: Floats) -> Floats:
        values = np.sort(blocks.reshape(-1, width), 1)
        spread = values[:, -1:] - values[:, :1]
        place = ((values - values[:, :1]) / np.where(spread > 0, spread, 1.0))[:, None, :]
        weight = _different(values)[:, None, :]
        number = weight.sum(2)
        if not fitted:
            steps = place.astype(np.float32) * levels[:, None].astype(np.float32)
            steps -= np.rint(steps)
            sums = np.abs(steps, out=steps) @ weight.astype(np.float32).transpose(0, 2, 1)
            rough: Floats = sums[:, :, 0].min(1) / np.maximum(number[:, 0] - 2, 1)
            return rough
        whole = np.rint(place * levels[:, None])
        middle = (whole * weight).sum(2, keepdims=True) / number[:, :, None]
        centre = (place * weight).sum(2, keepdims=True) / number[:, :, None]
        away = (whole - middle) * weight
        square = (away * away).sum(2, keepdims=True)
        step = (away * (place - centre)).sum(2, keepdims=True) / np.where(square > 0, square, 1.0)
        step = np.where(step > 0, step, 1.0)
        off = place - centre - step * (whole - middle)
        best = (np.abs(off) / step * weight).sum(2).min(1) / np.maximum(number[:, 0] - 2, 1)
        enough = number[:, 0] >= (_FEW if most > 3 else 3)
        return np.where(enough & (spread[:, 0] > 0), best, np.nan)

    return distance


def _table(values: tuple[float, ...], width: int = BLOCK) -> Distance:
    """The same to the values of a table, of which the larger ones can be the largest of a block."""
    table = np.unique(np.array(values))
    gaps, largest = np.diff(table), table[np.abs(table) >= 0.6 * np.abs(table).max()]

    def distance(blocks: Floats) -> Floats:
        found = np.sort(blocks.reshape(-1, width), 1)
        weight = _different(found)
        top = np.where(-found[:, 0] > found[:, -1], found[:, 0], found[:, -1])
        scaled = found[:, None, :] / np.where(top != 0, top, 1.0)[:, None, None] * largest[:, None]
        left = np.clip(np.searchsorted(table, scaled) - 1, 0, len(gaps) - 1)
        within = (scaled - table[left]) / gaps[left]
        off = np.minimum(np.minimum(np.abs(within), np.abs(1.0 - within)), 0.5)
        number = weight.sum(1)
        best = (off * weight[:, None, :]).sum(2).min(1) / np.maximum(number - 1, 1)
        return np.where(number >= min(_FEW, width // 4), best, np.nan)

    return distance


def _float(bits: int) -> Distance:
    """The same to floats with so many bits behind the leading one. Numbers below 1/32 of the largest are left out: a
    narrow range of exponents may have rounded them otherwise."""
    one = 1 << bits
    largest = np.arange(one, 2 * one) / one

    def distance(blocks: Floats) -> Floats:
        found = np.abs(blocks)
        scaled = found[:, None, :] / found.max(1)[:, None, None] * largest[:, None]
        known = scaled > 1 / 32
        fraction, _ = np.frexp(np.where(known, scaled, 1.0))
        off = np.abs(2 * one * fraction - np.rint(2 * one * fraction)) * known
        best: Floats = (off.sum(2) / np.maximum(known.sum(2) - 1, 1)).min(1)
        return best

    return distance


_GRIDS: Mapping[str, Distance] = {
    "integers of 2 bits or fewer": _even(3),
    "integers of 4 bits or fewer (int4, Q4_0, Q4_K)": _even(15),
    "FP4 (MXFP4, NVFP4)": _table(_FP4, _SMALL),
    "NF4": _table(_NF4),
    "IQ4": _table(_IQ4),
    "integers of 6 bits or fewer (Q5_0, Q6_K)": _even(63, _SMALL),
    "FP8 (E5M2)": _float(2),
    "FP8 (E4M3)": _float(3),
    "integers of 8 bits or fewer (int8, Q8_0)": _even(255),
}
"""The narrower ones first: numbers on such a grid lie on wider ones as well."""
_COARSE = (
    (_float(3), _ON),
    (_even(255, fitted=False), 0.15),
    (_even(63, _SMALL, fitted=False), _ON),
    (_table(_NF4), _ON),
    (_table(_IQ4), _ON),
    (_table(_FP4, _SMALL), _ON),
)
"""What is asked of the first blocks, and the largest distance there of a matrix that may lie on a grid."""
