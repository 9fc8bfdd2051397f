"""Which columns of a layer each model has: how wide the blocks are, and what a new model or one less moves.

Pure arithmetic on a few small arrays; the singular vectors themselves are not looked at.

The law of the width: w is the largest of q, ⌊q/2⌋, ⌊q/4⌋ … (at least 1) for which Σ min(r_i, w) ≤ q, over the ranks
r_i of the models in the layer; each has its first min(r_i, w) triplets. w follows from the set of models, whatever
their order. The first triplets of a block are a prefix of more of them, and w never grows when a model comes in, so
cutting later is cutting at once. With more than q models w is 1, and the q with the largest first triplet stay.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from continual.blocks.triplets import Block
from continual.lazily import numpy as np
from continual.records import SlotSpec

if TYPE_CHECKING:
    import numpy.typing as npt

CHUNK = 16
"""Columns that are written together: as many as a usual adapter has."""
MOST = (1 << 16) - 1
"""Models that the numbers of `owner` can tell apart, and the largest rank that `rank` can say."""


class Columns(NamedTuple):
    """The small arrays of a layer, q each, whose used columns come first; of a column that is free all are 0.

    `owner`: which model it is of, by its number from 1 on (uint16). `rank`: how many triplets that model had here
    before any cut (uint16). `sigma`: the singular value (float32). `energy`: ‖τ‖² of that model here before any cut
    (float64). A model's columns stand together, largest first.
    """

    owner: npt.NDArray[np.uint16]
    rank: npt.NDArray[np.uint16]
    sigma: npt.NDArray[np.float32]
    energy: npt.NDArray[np.float64]

    @staticmethod
    def empty(q: int) -> Columns:
        """q free columns."""
        return Columns(np.zeros(q, np.uint16), np.zeros(q, np.uint16), np.zeros(q, np.float32), np.zeros(q))

    @staticmethod
    def of(packed: npt.NDArray[np.float64]) -> Columns:
        """From q×4 numbers, as they lie on disk."""
        owner, rank, sigma, energy = packed.T
        return Columns(owner.astype(np.uint16), rank.astype(np.uint16), sigma.astype(np.float32), energy.copy())

    def packed(self) -> npt.NDArray[np.float64]:
        """As q×4 numbers; each is exact."""
        return np.stack([part.astype(np.float64) for part in self], 1)

    @property
    def used(self) -> int:
        """How many columns are used."""
        return int(np.count_nonzero(self.owner))

    @property
    def models(self) -> Mapping[int, slice]:
        """The columns of each model, in the order in which they lie."""
        return _models(self.owner.tobytes())

    @property
    def ranks(self) -> dict[int, int]:
        """The rank of each model before any cut."""
        return {number: int(self.rank[where.start]) for number, where in self.models.items()}

    def lost(self) -> dict[int, float]:
        """The share of each model's ‖τ‖² that was cut off here, 0 where nothing was."""
        found = {}
        for number, where in self.models.items():
            whole = where.stop - where.start == int(self.rank[where.start])
            energy, kept = float(self.energy[where.start]), float(np.square(self.sigma[where], dtype=np.float64).sum())
            found[number] = 0.0 if whole or not energy else max(0.0, 1.0 - kept / energy)
        return found


@functools.lru_cache(1 << 10)
def _models(owners: bytes) -> Mapping[int, slice]:
    """`Columns.models`: most layers of a state have the same models in the same columns."""
    owner = np.frombuffer(owners, np.uint16)
    owner = owner[: np.count_nonzero(owner)]
    begins = [0, *(np.flatnonzero(owner[1:] != owner[:-1]) + 1).tolist(), len(owner)]
    return MappingProxyType({int(owner[begin]): slice(begin, end) for begin, end in pairwise(begins) if end})


class Arrangement(NamedTuple):
    """What the columns of a layer become.

    `keep`: the old columns that stay, in their order. `take`: how many of the new block's triplets stand behind them.
    `width`: w of the law, by which no block is wider.
    """

    keep: tuple[int, ...]
    take: int
    width: int

    @property
    def used(self) -> int:
        """How many columns are used after."""
        return len(self.keep) + self.take

    @property
    def first(self) -> int:
        """The first column that is another one after; those before stay as they are on disk."""
        if not self.keep or self.keep[-1] == len(self.keep) - 1:  # they ascend, so none is left out
            return len(self.keep)
        moved = (place for place, column in enumerate(self.keep) if place != column)
        return next(moved, len(self.keep))

    @property
    def moved(self) -> tuple[int, ...]:
        """The old columns that stay and stand in another place after: from `first` on, before the new ones."""
        return self.keep[self.first :]

    def cut(self, old: Columns) -> dict[int, float]:
        """What goes of the square of the length of each model that was there, of those that lose something."""
        if len(self.keep) == old.used:
            return {}
        goes = np.ones(old.used, bool)
        goes[list(self.keep)] = False
        lost = {n: float(np.square(old.sigma[at][goes[at]], dtype=np.float64).sum()) for n, at in old.models.items()}
        return {number: square for number, square in lost.items() if square}

    def columns(self, old: Columns, number: int = 0, block: Block | None = None) -> Columns:
        """The small arrays after, with the new `block` of the model `number` where one is taken."""
        found = Columns.empty(len(old.owner))
        kept = np.array(self.keep, np.intp)
        found.owner[: len(kept)], found.rank[: len(kept)] = old.owner[kept], old.rank[kept]
        found.sigma[: len(kept)], found.energy[: len(kept)] = old.sigma[kept], old.energy[kept]
        if self.take:
            assert block is not None
            mine = slice(len(kept), self.used)
            found.owner[mine], found.rank[mine] = number, min(block.rank, MOST)
            found.sigma[mine], found.energy[mine] = block.sigma[: self.take].numpy(), block.energy
        return found


def slots(m: int, n: int, q: int) -> dict[str, SlotSpec]:
    """The arrays of an m×n layer with q columns: the columns are the first axis. `columns` has the small arrays side by
    side: owner, rank, sigma, energy."""
    return {
        "u": SlotSpec((q, m), rows=CHUNK),
        "v": SlotSpec((q, n), rows=CHUNK),
        "columns": SlotSpec((q, len(Columns._fields)), "float64"),
    }


def width(ranks: Iterable[int], q: int) -> int:
    """w of the law for models of these ranks in q columns, at least 1."""
    listed, w = np.fromiter(ranks, np.int64), q
    while w > 1 and np.minimum(listed, w).sum() > q:
        w //= 2
    return w


def plan(old: Columns, number: int, block: Block) -> Arrangement:
    """What the columns become when the model `number`, which has none, comes in with `block`."""
    assert 0 < number <= MOST, f"{number}: a model's number is from 1 to {MOST}"
    assert number not in old.models, f"the model {number} has columns already"
    q = len(old.owner)
    w, keep = _kept(old.owner.tobytes(), old.rank.tobytes(), block.rank)
    take = min(len(block.sigma), w)
    if len(keep) + take <= q:
        return Arrangement(keep, take, w)
    # more than q models, with one column each
    lengths = [*old.sigma[list(keep)].tolist(), float(block.sigma[0])]
    largest = sorted(sorted(range(len(lengths)), key=lambda place: -lengths[place])[:q])
    return Arrangement(tuple(keep[place] for place in largest if place < len(keep)), int(largest[-1] == len(keep)), w)


def without(old: Columns, number: int) -> Arrangement:
    """What the columns become when the model `number` goes. Blocks that were cut for its sake stay cut."""
    left = {other: rank for other, rank in old.ranks.items() if other != number}
    mine = old.models.get(number, slice(0, 0))
    keep = [column for column in range(old.used) if not mine.start <= column < mine.stop]
    return Arrangement(tuple(keep), 0, width(left.values(), len(old.owner)))


@functools.lru_cache(1 << 10)
def _kept(owners: bytes, ranks: bytes, rank: int) -> tuple[int, tuple[int, ...]]:
    """w with a model of this rank besides, and the columns that are left of those that are there."""
    models, there = _models(owners), np.frombuffer(ranks, np.uint16)
    w = width([*(int(there[where.start]) for where in models.values()), rank], len(there))
    return w, tuple(_cut(models, w))


def _cut(models: Mapping[int, slice], w: int) -> list[int]:
    """The columns that are left of every block at the width w."""
    return [column for where in models.values() for column in range(where.start, min(where.stop, where.start + w))]
