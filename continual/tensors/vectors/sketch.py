"""A small picture of a task vector, of constant size: how long it is in each layer, and a random projection of each
layer, by which two task vectors are compared without reading either again.

The projection is a count sketch (Charikar, Chen, Farach-Colton 2002) with fixed signs: element i of a tensor is added,
with a sign drawn by the number of its run of `width` elements, to number i mod `width`. It is linear, and the expected
inner product of two sketches is that of the task vectors; over all of `SIZE` numbers a cosine is off by about 1/64.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from continual.records import TensorSpec, depths_of
from continual.tensors.vectors import meeting
from continual.tensors.vectors.meeting import Meeting

SIZE = 4096
"""Numbers of a sketch, over all groups of layers."""
GROUPS = 64
"""Groups of layers at most: of a model with more layers, neighbours share one."""

SAMPLED = 8
"""Matrices that are looked at for a direction that stands out."""
NARROWEST = 64
"""Sides of a matrix from which on its largest singular value tells noise from training."""
PART = 0.05
"""Of ‖τ‖² of a model: what its layers have that make another a copy of these. In less two honest ones can agree."""
NUMBERS = 32
_ELEMENTS = 1 << 20
"""Elements of the first rows that are looked at."""
_STEPS = 6
_AT_ONCE = 64
"""Sketches that are compared at a time: a megabyte."""

Floats = NDArray[np.float64]


class SketchPlan(NamedTuple):
    """How the tensors of a base are sketched: the `group` of each by name, how many `groups`, and the `width` of each
    group's projection. It follows from names and depths alone, so states of one base have the same. `sampled`: the
    matrices of a candidate of which the first rows are looked at for a direction that stands out."""

    group: Mapping[str, int]
    groups: int
    width: int
    sampled: frozenset[str] = frozenset()

    @classmethod
    def of(cls, specs: Iterable[TensorSpec], folded: Sequence[str] = ()) -> SketchPlan:
        """Of the tensors of a base; those that are carried are not sketched. `folded`: what a candidate changes."""
        kept = [spec for spec in specs if spec.kind != "carried"]
        depths = depths_of(kept)
        groups = max(1, min(GROUPS, len(depths)))
        place = {depth: number * groups // len(depths) for number, depth in enumerate(depths)}
        width = 1 << (SIZE // groups).bit_length() - 1
        wide = [spec.name for spec in kept if spec.kind == "matrix" and min(_sides(spec.shape)) >= NARROWEST]
        changed = set(folded)
        some = [name for name in wide if name in changed]
        sampled = frozenset(some[number * len(some) // SAMPLED] for number in range(SAMPLED) if some)
        return cls({spec.name: place[spec.depth] for spec in kept}, groups, width, sampled)


class Projection:
    """The projection of one tensor, made as its values stream by, in any number of parts. Not thread-safe.

    `values`: float64, `width` of them."""

    def __init__(self, name: str, width: int) -> None:
        self.values: Floats = np.zeros(width)
        self._seed = np.uint64(int.from_bytes(blake3(name.encode()).digest(length=8), "little"))

    def add(self, start: int, part: NDArray[np.float32]) -> None:
        """Adds the elements of `part` (flat), of which the first is element `start` of the tensor. What is not finite
        makes the sketch so, and warns nobody."""
        width = len(self.values)
        lead = start % width
        if lead:
            part = np.concatenate([np.zeros(lead, np.float32), part])
        rows = len(part) // width
        first = start // width
        signs = _signs(self._seed, first, rows + 1)
        with np.errstate(invalid="ignore", over="ignore"):
            self.values += signs[:rows] @ part[: rows * width].reshape(rows, width)
            rest = part[rows * width :]
            self.values[: len(rest)] += signs[rows] * rest

    def add_product(self, left: Floats, right: Floats) -> None:
        """Adds left @ right, of m×k and k×n, without making it: rows and columns are each projected to √width numbers.
        It is another projection than that of `add`, to be compared with its own kind."""
        width = len(self.values)
        tall = 1 << (width.bit_length() - 1) // 2
        found = _folded(left.T, tall, self._seed).T @ _folded(right, width // tall, self._seed ^ np.uint64(1))
        self.values += found.reshape(-1)


class Picture(NamedTuple):
    """Of one tensor's task vector: its projection; and how far a direction stands out, the largest squared singular
    value of its first rows over that of random numbers of the same length: about 1 of noise and of rounding, 3 and more
    of what training changed. None of a tensor that is not sampled, and where these rows are zero or not finite.
    `meeting`: how some of these rows lie to the merge before. `grid`: on which grid of a quantisation the candidate's
    first rows lie, empty for none, None where that is not known."""

    projection: Floats
    stands_out: float | None
    meeting: Meeting = Meeting()
    grid: str | None = None


class Watched:
    """Makes the picture of one tensor's task vector as its values stream by. Not thread-safe."""

    def __init__(self, spec: TensorSpec, plan: SketchPlan) -> None:
        self._projection = Projection(spec.name, plan.width)
        rows, self._columns = _sides(spec.shape)
        rows = min(rows, max(NARROWEST, _ELEMENTS // max(1, self._columns)))
        wanted = spec.name in plan.sampled
        self._first = np.empty(rows * self._columns if wanted else 0, np.float32)
        some = min(rows, max(NARROWEST, meeting.ELEMENTS // max(1, self._columns)))
        self._before = np.empty(some * self._columns if wanted else 0, np.float32)
        self._seen = 0

    def add(self, start: int, part: NDArray[np.float32]) -> None:
        """As `Projection.add`."""
        self._projection.add(start, part)
        if start < len(self._first):
            stop = min(start + len(part), len(self._first))
            self._first[start:stop] = part[: stop - start]

    def wanted(self, start: int) -> int:
        """How many elements of the merge from number `start` on are asked for."""
        return max(0, len(self._before) - start)

    def beside(self, start: int, part: NDArray[np.float32]) -> None:
        """Hears of the merge before, flat, from element `start` on."""
        stop = min(start + len(part), len(self._before))
        self._before[start:stop] = part[: stop - start]
        self._seen += stop - start

    def picture(self, grid: str | None = None) -> Picture:
        """Of what was added, and the `grid` on which the candidate's first numbers lie."""
        return Picture(self._projection.values, self._stands_out(), self._meeting(), grid)

    def _meeting(self) -> Meeting:
        if not len(self._before) or self._seen < len(self._before):
            return Meeting()
        rows = self._before.reshape(-1, self._columns)
        return meeting.meeting_of(self._first[: len(self._before)].reshape(rows.shape), rows)

    def _stands_out(self) -> float | None:
        """By the power method, so a lower bound."""
        matrix = self._first.reshape(-1, self._columns) if len(self._first) else np.zeros((0, 1), np.float32)
        square = float(np.vdot(matrix, matrix))
        if not square or not np.isfinite(square):
            return None
        vector = _signs(np.uint64(0), 0, self._columns)
        for _ in range(_STEPS):
            vector = matrix.T @ (matrix @ (vector / (np.linalg.norm(vector) or 1.0)))
        largest = float(np.linalg.norm(vector))
        rows, columns = matrix.shape
        return largest / square * rows * columns / (math.sqrt(rows) + math.sqrt(columns)) ** 2


@dataclass(frozen=True, eq=False)
class Sketch:
    """Of one task vector, as a record keeps it. `norms`: ‖τ‖ in each group of layers; `numbers`: groups × width, 8 bits
    each, in units of a 127th of the `largest` of their group (groups × 1, float32)."""

    norms: tuple[float, ...]
    numbers: NDArray[np.int8]
    largest: NDArray[np.float32]

    @classmethod
    def of(cls, plan: SketchPlan, squares: Mapping[str, float], projections: Mapping[str, Floats]) -> Sketch:
        """From ‖τ‖² and the projection of each tensor that has a task vector, by name."""
        norms, values = np.zeros(plan.groups), np.zeros((plan.groups, plan.width))
        for name in sorted(projections):
            norms[plan.group[name]] += squares[name]
            values[plan.group[name]] += projections[name]
        return cls.rounded(tuple(float(f"{x:.6g}") for x in np.sqrt(norms)), values)

    @classmethod
    def rounded(cls, norms: tuple[float, ...], values: NDArray[np.floating]) -> Sketch:
        """From the numbers as they were summed, groups × width."""
        largest = np.abs(values).max(1, keepdims=True)
        kept = np.rint(values / np.where(largest > 0, largest, 1) * 127).astype(np.int8)
        return cls(norms, kept, largest.astype(np.float32))

    @property
    def values(self) -> NDArray[np.float32]:
        """The numbers, groups × width."""
        return self.numbers.astype(np.float32) * (self.largest / np.float32(127))

    @cached_property
    def squares(self) -> Floats:
        """The squared length of the numbers of each group."""
        values = self.values.astype(np.float64)
        found: Floats = (values * values).sum(1)
        return found

    @cached_property
    def filled(self) -> NDArray[np.intp]:
        """How many numbers of each group are not zero."""
        found: NDArray[np.intp] = np.count_nonzero(self.numbers, 1)
        return found

    def share(self, group: int) -> float:
        """The share of ‖τ‖² that one group of layers has."""
        whole = sum(norm * norm for norm in self.norms)
        return self.norms[group] ** 2 / whole if whole else 0.0

    @property
    def text(self) -> str:
        """What a record keeps besides the norms, in base64."""
        return base64.b64encode(self.largest.astype("<f4").tobytes() + self.numbers.tobytes()).decode()

    @classmethod
    def read(cls, norms: Sequence[float], text: str) -> Sketch | None:
        """From what a record keeps; None where that is no sketch."""
        try:
            found = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return None
        groups = len(norms)
        width, rest = divmod(len(found) - 4 * groups, groups) if groups else (0, 1)
        if rest or width < 1:
            return None
        largest = np.frombuffer(found, "<f4", groups).reshape(groups, 1)
        return cls(
            tuple(norms), np.frombuffer(found, np.int8, groups * width, 4 * groups).reshape(groups, width), largest
        )


class Alike(NamedTuple):
    """How like each of others a task vector is. `cosine`: 0 beside one that is zero, or that is of another shape.

    `by_layers`: where each group of layers of it may be any multiple of theirs, the root of the share of ‖τ‖² that this
    explains, 0 to 1. 1 of some layers of another, or of another whose layers were scaled, each otherwise. 0 beside one
    that has less than `PART` of its ‖τ‖² in these layers, or another shape. Groups of fewer than `NUMBERS` numbers, as
    a norm alone, agree by chance: they explain nothing.
    """

    cosine: Floats
    by_layers: Floats

    @classmethod
    def of(cls, one: Sketch, others: Sequence[Sketch]) -> Alike:
        """As their sketches say it."""
        places = [number for number, other in enumerate(others) if other.numbers.shape == one.numbers.shape]
        found = cls(np.zeros(len(others)), np.zeros(len(others)))
        if not places or not one.squares.any():
            return found
        products = _products(one, [others[number] for number in places])
        squares = np.stack([others[number].squares for number in places])
        filled = np.stack([others[number].filled for number in places])
        whole = squares.sum(1)
        lengths = np.sqrt(one.squares.sum() * whole)
        found.cosine[places] = products.sum(1) / np.where(lengths > 0, lengths, np.inf)
        theirs = np.where((one.squares > 0) & (filled >= NUMBERS), squares, 0.0)
        shares = (products**2 / np.where(theirs > 0, theirs, np.inf)).sum(1) / one.squares.sum()
        enough = (theirs.sum(1) >= PART * whole) & (whole > 0)
        found.by_layers[places] = np.sqrt(np.minimum(1.0, np.where(enough, shares, 0.0)))
        return found


def _products(one: Sketch, others: Sequence[Sketch]) -> Floats:
    """The inner products in each group of layers, others × groups: of many at a time, since every fold looks at all
    that are in the merge."""
    found = np.empty((len(others), len(one.numbers)))
    mine = one.values
    for first in range(0, len(others), _AT_ONCE):
        part = others[first : first + _AT_ONCE]
        numbers = np.stack([other.numbers for other in part]).astype(np.float32)
        largest = np.stack([other.largest[:, 0] for other in part])
        found[first : first + len(part)] = np.einsum("ngw,gw->ng", numbers, mine) * (largest / 127.0)
    return found


def explained(one: Sketch, others: Sequence[Sketch]) -> float:
    """The share of ‖τ‖² that a weighted sum of the others has, at best: 1 of a merge of them."""
    found = [other.values.reshape(-1) for other in others if other.numbers.shape == one.numbers.shape]
    mine = one.values.reshape(-1).astype(np.float64)
    square = float(mine @ mine)
    if not found or not square:
        return 0.0
    basis = np.stack(found, 1).astype(np.float64)
    weights = np.linalg.lstsq(basis, mine, rcond=None)[0]
    rest = mine - basis @ weights
    return 1.0 - float(rest @ rest) / square


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor, taken as a matrix: all sides but the first are columns."""
    return (shape[0] if shape else 1, math.prod(shape[1:]))


def _signs(seed: np.uint64, first: int, count: int) -> NDArray[np.float32]:
    """Signs of `count` runs from number `first` on: the finaliser of MurmurHash3 over their numbers."""
    found = np.arange(first, first + count, dtype=np.uint64) + seed
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        found ^= found >> np.uint64(shift)
        found *= np.uint64(factor)
    found ^= found >> np.uint64(33)
    return np.where(found & np.uint64(1), np.float32(1), np.float32(-1))


def _folded(matrix: Floats, width: int, seed: np.uint64) -> Floats:
    """The last side of a k×n matrix projected to `width` numbers."""
    k, n = matrix.shape
    rows = -(-n // width)
    padded = np.zeros((k, rows * width))
    padded[:, :n] = matrix
    signs = _signs(seed, 0, rows).astype(np.float64)
    found: Floats = np.einsum("krw,r->kw", padded.reshape(k, rows, width), signs)
    return found
