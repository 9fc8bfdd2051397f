"""What an adapter adds to a tensor as the two thin factors it is published in: the product is never made, and no weight
of the base is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from continual.records import Lineage, TensorSpec
from continual.tensors.adapter import Adapter
from continual.tensors.added import Content, hash_piece
from continual.tensors.kinds import BaseModel
from continual.tensors.matching import Match, naming_of, sources
from continual.tensors.pieces import Piece
from continual.tensors.pieces.low_rank import Bias, Factors, Triple
from continual.tensors.pieces.trained import RowsOf, Trained
from continual.tensors.row_order import gather, moved_of
from continual.tensors.same_layout import in_layout_of


def sides_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a layer: a convolution is out × rest; a vector has one column, a scalar is 1 × 1."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


class ThinVector(NamedTuple):
    """One layer's task vector left·rightᵀ, m×r and n×r in float64; the BLAKE3 hash of what it was made from, as
    `TaskVectors` has it, and the bytes read."""

    left: Tensor
    right: Tensor
    digest: bytes
    nbytes: int


class ThinVectors:
    """Reads the task vectors of an adapter of `base` as `lineage` maps them, a layer at a time. Thread-safe. A tensor
    that is asked for has to be one that it `has`."""

    def __init__(self, base: BaseModel, model: Adapter, lineage: Lineage) -> None:
        found = in_layout_of(base, model)
        assert isinstance(found, Adapter)
        self._model = found
        self._sources, _ = sources(base, found, naming_of(lineage))
        self._moved = moved_of(lineage.tokens)

    def has(self, name: str) -> bool:
        """Whether the layer's task vector is a product of thin factors."""
        return name in self._sources and is_thin(self._sources[name])

    def position(self, name: str) -> tuple[int, int]:
        """Where in the adapter's file the layer `name` begins: in this order they are best read."""
        info = self._model.infos(self._piece(name))[0]
        return info.file, info.offset

    def nbytes(self, name: str) -> int:
        """Bytes of the layer's factors in the adapter's file."""
        return sum(info.nbytes for info in self._model.infos(self._piece(name)))

    def rank(self, name: str) -> int:
        """How many columns the layer's factors have: its task vector has at most this rank."""
        piece = self._piece(name)
        while isinstance(piece, Trained | RowsOf):
            piece = piece.inner
        return 1 if isinstance(piece, Bias) else self._model.infos(piece)[0].shape[0]

    def read(self, spec: TensorSpec) -> ThinVector:
        """The task vector of one layer. Rows that only one of the two vocabularies has are left out, or zero. Raises
        Refuse (`tied`) if tied names differ, Retry if the file cannot be read to its end."""
        source = self._sources[spec.name]
        piece, content = self._piece(spec.name), Content()
        read = self._model.read(piece)
        moved = self._moved.get(spec.name)
        if moved is not None:
            content.hash.update(moved.digest.encode())
        hash_piece(self._model, source, read, content)
        pair = factors(piece, read, transposed=source.transposed)
        assert pair is not None, f"{spec.name}: not thin"
        left, right = pair
        rows, _ = sides_of(spec.shape)
        if moved is not None:
            theirs, left = left, left.new_empty(rows, left.shape[1])
            gather(moved, theirs, left)
        elif len(left) != rows:
            both = min(len(left), rows)
            left = torch.cat([left[:both], left.new_zeros(rows - both, left.shape[1])])
        return ThinVector(left, right, content.digest(), content.nbytes)

    def _piece(self, name: str) -> Piece:
        piece = self._sources[name].piece
        assert piece is not None, f"{name}: not thin"
        return piece


def is_thin(source: Match) -> bool:
    """Whether what an adapter does to a tensor is a product of thin factors, whatever the values of the base."""
    piece = source.piece
    while isinstance(piece, Trained | RowsOf) and not piece.needs_base:
        piece = piece.inner
    return source.full is None and isinstance(piece, Factors | Triple | Bias) and not piece.needs_base


def factors(piece: Piece, read: Sequence[Tensor], *, transposed: bool) -> tuple[Tensor, Tensor] | None:
    """The factors of a piece whose tensors are `read`, m×r and n×r in float64: what it adds is left·rightᵀ, its scale
    in the left one. None where it is no product of thin factors."""
    if isinstance(piece, Trained | RowsOf):
        pair = None if piece.needs_base else factors(piece.inner, read[: len(piece.inner.names)], transposed=transposed)
        return None if pair is None else (piece.of_left(pair[0], read), pair[1])
    if isinstance(piece, Bias):
        values = read[0].double().reshape(-1, 1)
        return values * piece.scale, values.new_ones(1, 1)
    if not isinstance(piece, Factors | Triple) or piece.needs_base:
        return None
    rank = read[0].shape[0]
    a, b = read[0].double().reshape(rank, -1), read[1].double().reshape(-1, rank)
    if isinstance(piece, Triple):
        a = a * read[2].double()
        turned = transposed
    else:
        turned = piece.embedding or transposed
    left, right = (a.mT, b) if turned else (b, a.mT)
    return left * piece.scale, right
