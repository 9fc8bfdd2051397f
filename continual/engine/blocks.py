"""What a fold writes of a layer in a state that keeps adapters as they are: singular triplets beside the others'. The
blocks of other adapters are not read, unless they are cut; nor is the base, but where what an adapter adds depends on
its weights. Which process folds which layers is the matter of block_orders.py."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from continual import linalg
from continual.blocks import (
    CHUNK,
    MOST,
    Arrangement,
    Block,
    Columns,
    Layer,
    decomposed,
    plan,
    triplets,
    without,
)
from continual.errors import Misconfigured
from continual.executors.device import turn
from continual.lazily import torch
from continual.records import TensorSpec
from continual.state import State, storing
from continual.state.arrays import Array
from continual.state.generation import Generation
from continual.state.writing import Writing
from continual.tensors import LayerVectors, ThinVector, WholeVector
from continual.tensors.vectors.sketch import Floats, Projection
from continual.tensors.vectors.thin import sides_of

_CHECKSUM = 4
"""Bytes of the checksum behind each chunk."""


class Cut(NamedTuple):
    """What a fold cut off in a layer: of the ‖τ‖² of the model that came (`own`), and of those that were there, by
    their numbers (`others`)."""

    own: float
    others: Mapping[int, float]


class Room(NamedTuple):
    """What a fold takes on the disk, in bytes of whole blocks of the file system, and in how many layers it cuts blocks
    of models, its own or others'."""

    nbytes: int
    cut: int


def block_of(vector: ThinVector | WholeVector, spec: TensorSpec, width: int, device: torch.device) -> Block:
    """The singular triplets of one layer, at most `width` of what is no product of thin factors; computed on `device`,
    given on the CPU."""
    m, n = sides_of(spec.shape)
    if isinstance(vector, ThinVector):
        with turn(device, 8 * 8 * (m + n) * vector.left.shape[1]) as here:
            return _on_cpu(triplets(vector.left.to(here), vector.right.to(here)))
    with turn(device, 3 * 4 * m * n + linalg.workspace(m, n)) as here:
        found = _on_cpu(decomposed(vector.matrix.to(here), width))
    if vector.rows is None:
        return found
    u = found.u.new_zeros(len(found.u), m)
    u[:, vector.rows] = found.u
    return found._replace(u=u)


def _on_cpu(block: Block) -> Block:
    return block._replace(u=block.u.cpu(), sigma=block.sigma.cpu(), v=block.v.cpu())


def projection_of(block: Block, name: str, width: int) -> Floats:
    """The projection of one layer's task vector, made from its triplets."""
    found = Projection(name, width)
    u, sigma, v = (part.double().numpy() for part in (block.u, block.sigma, block.v))
    found.add_product(u.T * sigma, v)
    return found.values


def room(state: State, vectors: LayerVectors, specs: Iterable[TensorSpec]) -> Room:
    """What folding these tensors writes at most: the chunks from the first column that is another one on, which is the
    very first where blocks are cut, and the small arrays."""
    assert state.format.form is not None
    generation, width = state.generation_of(state.ledger.head), state.format.form.width
    nbytes = cut = 0
    for spec in specs:
        rank = vectors.rank(spec.name)
        for layer in spec.layers:
            used = 0 if generation is None else Columns.of(generation.read(layer.name, "columns")).used
            cuts = used + rank > width
            nbytes += _written(state, layer, used, rank, cuts)
            cut += cuts
    return Room(nbytes, cut)


def most(state: State, vectors: LayerVectors, specs: Iterable[TensorSpec]) -> int:
    """The bytes of `room` or a few more: nothing is read for it."""
    assert state.format.form is not None
    generation, width = state.generation_of(state.ledger.head), state.format.form.width
    nbytes = 0
    for spec in specs:
        rank = vectors.rank(spec.name)
        for layer in spec.layers:
            chunks = 0 if generation is None else generation.count(layer.name, "u")
            # the last chunk may be full or not
            nbytes += _written(state, layer, max(0, CHUNK * chunks - 1), rank + 1, CHUNK * chunks + rank > width)
    return nbytes


def _written(state: State, layer: TensorSpec, used: int, rank: int, cuts: bool) -> int:
    """The bytes that a fold of this rank takes on the disk in a layer of so many used columns: each file is as many
    whole blocks of the file system as hold it."""
    assert state.format.form is not None
    chunks = -(-min(state.format.form.width, used + rank) // CHUNK) - (0 if cuts else used // CHUNK)
    block = storing.block(state.path)
    small, *sides = (
        -(-(nbytes + _CHECKSUM) // block) * block
        for nbytes in (
            state.format.slots[layer.name]["columns"].nbytes,
            *(4 * side * CHUNK for side in sides_of(layer.shape)),
        )
    )
    return small + chunks * sum(sides)


def put(transaction: Writing, name: str, number: int, block: Block) -> Cut:
    """Writes one layer with the model `number` besides; what was cut off for it."""
    old = Columns.of(transaction.read(name, "columns"))
    after = plan(old, number, block)
    if not after.take and after.first == old.used:
        transaction.keep(name)
        return Cut(block.energy, {})
    rearrange(transaction, name, old, after, number, block)
    own = max(0.0, block.energy - block.first(after.take).kept) if after.take < block.rank else 0.0
    return Cut(own, after.cut(old))


def take_out(transaction: Writing, name: str, number: int) -> None:
    """Writes one layer without the model `number`."""
    old = Columns.of(transaction.read(name, "columns"))
    if number not in old.models:
        transaction.keep(name)
        return
    after = without(old, number)
    if after.used:
        rearrange(transaction, name, old, after)


def put_all(transaction: Writing, other: Generation, name: str, called: Mapping[int, int]) -> None:
    """Writes one layer with all models of another state's besides; `called`: their numbers there to those here."""
    brought = layer_of(other, name)
    if not brought.columns.used:
        transaction.keep(name)
        return
    before = _layer_before(transaction, name)
    layer = before
    for number, block in brought.blocks().items():
        layer = layer.folded(called[number], block)
    _write(transaction, name, before, layer)


def exchange(transaction: Writing, name: str, gone: Collection[int], coming: Mapping[int, Block]) -> dict[int, float]:
    """Writes one layer without the models of the numbers `gone`, and with those that are `coming` besides; what the cut
    took of the ‖τ‖² of each of these."""
    before = _layer_before(transaction, name)
    layer = before
    for number in gone:
        layer = layer.without(number) if number in layer.columns.models else layer
    for number, block in coming.items():
        layer = layer.folded(number, block)
    if layer is before:
        transaction.keep(name)
        return {}
    if layer.columns.used:
        _write(transaction, name, before, layer)
    there = layer.columns.models
    return {number: layer.block(number).cut if number in there else block.energy for number, block in coming.items()}


def _write(transaction: Writing, name: str, before: Layer, layer: Layer) -> None:
    """Writes a layer as it is now; columns before the first that is another one stay as they are on disk."""
    old = before.columns
    kept = np.nonzero((layer.columns.packed() != old.packed()).any(1))[0]
    first, used = int(kept[0]) if len(kept) else old.used, layer.columns.used
    for slot, rows in (("u", layer.u), ("v", layer.v)):
        transaction.write_rows(name, slot, first, rows[first:used].numpy())
    transaction.write(name, "columns", layer.columns.packed())


def layer_of(generation: Generation, name: str) -> Layer:
    """The blocks of one layer in a generation, read whole."""
    columns = Columns.of(generation.read(name, "columns"))
    u, v = (generation.read_rows(name, slot, 0, columns.used) for slot in ("u", "v"))
    return _layer(columns, u, v)


def _layer_before(transaction: Writing, name: str) -> Layer:
    columns = Columns.of(transaction.read(name, "columns"))
    u, v = (transaction.read_rows(name, slot, 0, columns.used) for slot in ("u", "v"))
    return _layer(columns, u, v)


def _layer(columns: Columns, u: Array, v: Array) -> Layer:
    """A layer of all its columns, from the rows that are used."""
    rows = len(columns.owner)
    full = [torch.zeros(rows, part.shape[1]) for part in (u, v)]
    for whole, part in zip(full, (u, v), strict=True):
        whole[: len(part)] = torch.from_numpy(part)
    return Layer(columns, *full)


def rearrange(
    transaction: Writing,
    name: str,
    old: Columns,
    after: Arrangement,
    number: int = 0,
    block: Block | None = None,
) -> None:
    """Writes a layer as `after` has it: columns before the first that is another one stay as they are on disk."""
    moved = list(after.moved)
    for slot in ("u", "v"):
        rows = []
        if moved:
            begin, end = moved[0], moved[-1] + 1
            rows.append(transaction.read_rows(name, slot, begin, end)[[place - begin for place in moved]])
        if after.take:
            assert block is not None
            rows.append(getattr(block, slot)[: after.take].numpy())
        values = np.concatenate(rows or [transaction.read_rows(name, slot, 0, 0)]) if len(rows) != 1 else rows[0]
        transaction.write_rows(name, slot, after.first, values)
    transaction.write(name, "columns", after.columns(old, number, block).packed())


def free_numbers(state: State, count: int) -> list[int]:
    """The `count` smallest numbers that no adapter in force has. Raises Misconfigured where there are not so many."""
    taken = {fold.entry.numbers.block for fold in state.ledger.folds()}
    numbers = list(itertools.islice((n for n in range(1, MOST + 1) if n not in taken), count))
    if len(numbers) < count:
        raise Misconfigured(f"{state.path}: {MOST} adapters are the most that a state can keep")
    return numbers
