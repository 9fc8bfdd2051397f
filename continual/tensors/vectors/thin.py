"""What an adapter adds to a tensor, in the smallest form that says it: the two thin factors it is published in, so that
the product is never made; the few rows that were trained; else the whole task vector.

The weights of the base are read only where what is added depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from continual.lazily import Tensor, torch
from continual.records import Lineage, TensorSpec, TokenRows
from continual.tensors.adapters.adapter import Adapter
from continual.tensors.adapters.pieces import Piece
from continual.tensors.adapters.pieces.low_rank import Bias, Factors, Triple
from continual.tensors.adapters.pieces.lycoris import Pair
from continual.tensors.adapters.pieces.scaling import Drawn, Shared
from continual.tensors.adapters.pieces.sparse import Repeated
from continual.tensors.adapters.pieces.stacks import Gathered, StackFactors
from continual.tensors.adapters.pieces.tokens import Tokens
from continual.tensors.adapters.pieces.trained import RowsOf, Trained
from continual.tensors.checkpoints.checkpoint import TORCH
from continual.tensors.layouts.same_layout import in_layout_of
from continual.tensors.matched.matching import Match, naming_of, sources
from continual.tensors.matched.row_order import gather, moved_of
from continual.tensors.names.kinds import BaseModel
from continual.tensors.vectors.added import Content, hash_piece
from continual.tensors.vectors.vectors import Extent, TaskVectors, extents_of

_RUN = 1 << 22
"""Elements of a whole tensor that are read at a time: of a base on the Hub each run is a request."""


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


class WholeVector(NamedTuple):
    """One layer's task vector as a matrix, float32: the given `rows` of the layer, where all others are zero (int64),
    or all of it (None). `digest` and `nbytes` as `ThinVector` has them."""

    matrix: Tensor
    rows: Tensor | None
    digest: bytes
    nbytes: int


class LayerVectors:
    """Reads the task vectors of an adapter of `base` as `lineage` maps them, a tensor at a time: one layer, or of a
    stack one after the other (`TensorSpec.layers`). Thread-safe.

    `weights`: the same base with its weights, without which no layer can be read of which `needs_base` says so; a copy
    of a weight that lies beside its factors is left out then.
    """

    def __init__(self, base: BaseModel, model: Adapter, lineage: Lineage, weights: BaseModel | None = None) -> None:
        found = in_layout_of(base, model)
        assert isinstance(found, Adapter)
        self._model = found
        self._sources, _ = sources(base, found, naming_of(lineage))
        if weights is None:
            self._sources = {name: without_copy(source) for name, source in self._sources.items()}
        self._moved = moved_of(lineage.tokens)
        self._specs = {spec.name: spec for spec in base.specs}
        self._weights = weights
        self._whole: TaskVectors | None = None
        self._others = partial(TaskVectors, weights or base, model, lineage, run=_RUN)
        self._lineage = lineage

    def begin(self, names: Sequence[str] | None = None) -> None:
        """Begins to read all layers, or those of these names, each once: what is read in which order."""
        folded = self._lineage.folded
        if any(not self.is_thin(name) and self._tokens(name) is None for name in folded):
            self._whole = self._whole or self._others()
            self._whole.begin(names)
            return
        infos = {info for name in names or folded for info in self._model.infos(_piece(self._sources[name]))}
        self._model.weights.expect(sorted(infos, key=lambda info: (info.file, info.offset)))

    def extents(self, name: str) -> list[Extent]:
        """What is read of the adapter's files for the layer `name`."""
        if self._whole is not None:
            return self._whole.extents(name)
        return extents_of(self._model.weights, self._model.infos(_piece(self._sources[name])))

    def position(self, name: str) -> tuple[int, int]:
        """Where in the adapter's file the layer `name` begins: in this order they are best read."""
        source = self._sources[name]
        info = source.full or self._model.infos(_piece(source))[0]
        return info.file, info.offset

    def nbytes(self, name: str) -> int:
        """Bytes that the tensor is read from: of the adapter's file, and of the base where it takes its weights."""
        source, spec = self._sources[name], self._specs[name]
        read = () if source.piece is None else self._model.infos(source.piece)
        mine: int = sum(info.nbytes for info in (*read, *((source.full,) if source.full else ())))
        if not needs_base(source):
            return mine
        tokens = self._tokens(name)
        return mine + (spec.nbytes if tokens is None else len(tokens.rows) * spec.nbytes // spec.shape[0])

    def workspace(self, name: str) -> int:
        """Peak bytes of reading a layer that is not read as factors, with what is read."""
        if self._tokens(name) is not None:
            return 4 * self.nbytes(name)
        assert self._whole is not None, "begin first"
        return self._whole.nbytes(name)

    def is_thin(self, name: str) -> bool:
        """Whether the layer is read as two thin factors; False of one that the adapter does not change."""
        return name in self._sources and is_thin(self._sources[name], self._specs[name].shape)

    def sides(self, name: str) -> tuple[int, int]:
        """Rows and columns of a matrix that is read where the tensor is not read as factors."""
        m, n = sides_of(self._specs[name].layers[0].shape)
        tokens = self._tokens(name)
        return (m if tokens is None else len(tokens.rows)), n

    def rank(self, name: str) -> int:
        """The rank that the task vector of a layer of the tensor has at most."""
        source, shape = self._sources[name], self._specs[name].shape
        found = None if source.full is not None else columns(_piece(source), shape, transposed=source.transposed)
        return min(self.sides(name)) if found is None else found

    def read(self, spec: TensorSpec) -> Iterator[ThinVector | WholeVector]:
        """The task vector of each layer of a tensor; the digest is that of the whole tensor, and empty before the last
        one. Rows that only one of the two vocabularies has are left out, or zero. Raises Refuse (`tied`) if tied names
        differ, Retry if a file cannot be read to its end."""
        if spec.kind == "stack":
            yield from self._experts(spec)
        elif self.is_thin(spec.name):
            yield self._thin(spec)
        elif (tokens := self._tokens(spec.name)) is not None:
            yield self._trained(spec, tokens)
        else:
            assert self._whole is not None, "begin first"
            tau, digest, nbytes = self._whole.vector(spec.name)
            yield WholeVector(tau.view(sides_of(spec.shape)), None, digest, nbytes)

    def _experts(self, spec: TensorSpec) -> Iterator[ThinVector | WholeVector]:
        """Each matrix of a stack, by itself."""
        last, content = spec.experts - 1, Content()
        if self.is_thin(spec.name):
            piece = _piece(self._sources[spec.name])
            read, _ = self._hashed(spec.name, self._sources[spec.name], content)
            for number, one in enumerate(spec.layers):
                pair = _expert(piece, read, sides_of(one.shape), number)
                yield ThinVector(*pair, content.digest(), 0 if number < last else content.nbytes)
            return
        assert self._whole is not None, "begin first"
        for number, tau in enumerate(self._whole.experts(spec, content)):
            done = number == last
            yield WholeVector(tau, None, content.digest() if done else b"", content.nbytes if done else 0)

    def _thin(self, spec: TensorSpec) -> ThinVector:
        source, content = self._sources[spec.name], Content()
        piece = _piece(source)
        read, moved = self._hashed(spec.name, source, content)
        pair = factors(piece, read, spec.shape, transposed=source.transposed)
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

    def _trained(self, spec: TensorSpec, tokens: Tokens) -> WholeVector:
        """Rows that were trained by themselves, less the same rows of the base."""
        source, content = self._sources[spec.name], Content()
        (values, *_), moved = self._hashed(spec.name, source, content)
        ours = [(_ours(row, moved, spec.shape[0]), at) for at, row in enumerate(tokens.rows)]
        there = sorted((row, at) for row, at in ours if row is not None)
        rows = torch.tensor([row for row, _ in there], dtype=torch.int64)
        base = self._base_rows(spec, rows.tolist(), content)
        matrix = values.float()[[at for _, at in there]] - base
        return WholeVector(matrix, rows, content.digest(), content.nbytes)

    def _hashed(self, name: str, source: Match, content: Content) -> tuple[tuple[Tensor, ...], TokenRows | None]:
        """What a piece is made from, read and fed to `content`; and which rows of a table are which."""
        read, moved = self._model.read(_piece(source)), self._moved.get(name)
        if moved is not None:
            content.hash.update(moved.digest.encode())
        hash_piece(self._model, source, read, content)
        return read, moved

    def _base_rows(self, spec: TensorSpec, rows: Sequence[int], content: Content) -> Tensor:
        """These rows of a table of the base, float32; rows that follow each other are read at once."""
        assert self._weights is not None, f"{spec.name}: takes the weights of the base"
        checkpoint = self._weights.checkpoint
        info = checkpoint.tensors[spec.name]
        found = torch.empty(len(rows), math.prod(spec.shape[1:]), dtype=TORCH[info.dtype])
        size = found.shape[1] * found.element_size()
        raw, at = found.view(torch.uint8).numpy(), 0
        while at < len(rows):
            end = at + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1:
                end += 1
            checkpoint.read_part(info, rows[at] * size, raw[at:end].reshape(-1).data)
            at = end
        content.nbytes += found.nbytes
        return found.float()

    def _tokens(self, name: str) -> Tokens | None:
        """The trained rows that a layer consists of, where it does."""
        source = self._sources[name]
        return source.piece if source.full is None and isinstance(source.piece, Tokens) else None


def _piece(source: Match) -> Piece:
    assert source.piece is not None, "a whole weight"
    return source.piece


def _ours(row: int, moved: TokenRows | None, length: int) -> int | None:
    """The row of the base's table that a row of the adapter's is; None where the base has none."""
    if moved is None:
        return row if row < length else None
    return next((ours + row - theirs for ours, theirs, count in moved.runs if theirs <= row < theirs + count), None)


def needs_base(source: Match) -> bool:
    """Whether what an adapter does to a tensor depends on the values of the base."""
    return source.full is not None or _piece(source).needs_base


def without_copy(source: Match) -> Match:
    """The same without a whole weight that lies beside what is added to it: PEFT saves such a copy of every embedding
    and head that it adapts (`save_embedding_layers`), which is the base's unless its vocabulary was resized."""
    return source if source.piece is None else source._replace(full=None, twins=())


def is_thin(source: Match, shape: Sequence[int]) -> bool:
    """Whether what an adapter does to a tensor of this shape is a product of thin factors, whatever the values of the
    base."""
    return source.full is None and columns(_piece(source), shape, transposed=source.transposed) is not None


def columns(piece: Piece, shape: Sequence[int], *, transposed: bool) -> int | None:
    """How many columns the two thin factors have that a piece is in a tensor of this shape; None where it is no such
    product."""
    if piece.needs_base:
        return None
    if isinstance(piece, Trained | RowsOf):
        return columns(piece.inner, _inner(piece, shape), transposed=transposed)
    if isinstance(piece, Bias):
        return 1
    if isinstance(piece, StackFactors):
        return piece.rank
    if isinstance(piece, Gathered):
        return _gathered_columns(piece, shape)
    if isinstance(piece, Pair):
        return piece.columns(shape)
    if isinstance(piece, Shared | Drawn | Repeated):
        rank = piece.info.shape[0] if isinstance(piece, Repeated) else piece.d.shape[0]
        return rank if 2 * rank <= min(sides_of(shape)) else None
    return piece.a.shape[0] if isinstance(piece, Factors | Triple) else None


def _inner(piece: Trained | RowsOf, shape: Sequence[int]) -> Sequence[int]:
    """The shape of what the piece inside adds to."""
    return (piece.total, *shape[1:]) if isinstance(piece, RowsOf) else shape


def _gathered_columns(piece: Gathered, shape: Sequence[int]) -> int | None:
    """The most columns of a matrix that is put together from several pieces; None where one of them is not thin."""
    counts: dict[int, int] = {}
    for share in piece.shares:
        mine = columns(share.piece, (share.stop - share.start, shape[-1]), transposed=False)
        if mine is None:
            return None
        counts[share.number] = counts.get(share.number, 0) + mine
    return max(counts.values(), default=0)


def _expert(piece: Piece, read: Sequence[Tensor], sides: tuple[int, int], number: int) -> tuple[Tensor, Tensor]:
    """The factors of one matrix of a stack, m×r and n×r in float64; no columns of one that is not changed."""
    if isinstance(piece, StackFactors):
        a = read[0].view(piece.experts, piece.rank, -1)[number].double()
        b = read[1].view(-1, piece.rank, piece.experts)[:, :, number].double()
        left, right = (a.mT, b) if piece.by_input else (b, a.mT)
        return left * piece.scale, right
    assert isinstance(piece, Gathered), "no stack of thin factors"
    at, lefts, rights = 0, [torch.zeros(sides[0], 0, dtype=torch.float64)], [torch.zeros(sides[1], 0).double()]
    for share in piece.shares:
        mine = read[at : at + len(share.piece.names)]
        at += len(mine)
        if share.number == number:
            pair = factors(share.piece, mine, (share.stop - share.start, sides[1]), transposed=False)
            assert pair is not None, "no stack of thin factors"
            lefts.append(pair[0].new_zeros(sides[0], pair[0].shape[1]))
            lefts[-1][share.start : share.stop] = pair[0]
            rights.append(pair[1])
    return torch.cat(lefts, 1), torch.cat(rights, 1)


def factors(
    piece: Piece, read: Sequence[Tensor], shape: Sequence[int], *, transposed: bool
) -> tuple[Tensor, Tensor] | None:
    """The factors of a piece whose tensors are `read`, m×r and n×r in float64: what it adds is left·rightᵀ, its scale
    in the left one. None where it is no product of thin factors."""
    if piece.needs_base:
        return None
    if isinstance(piece, Trained | RowsOf):
        inner = read[: len(piece.inner.names)]
        pair = factors(piece.inner, inner, _inner(piece, shape), transposed=transposed)
        return None if pair is None else (piece.of_left(pair[0], read), pair[1])
    if isinstance(piece, Bias):
        values = read[0].double().reshape(-1, 1)
        return values * piece.scale, values.new_ones(1, 1)
    if isinstance(piece, Gathered):
        return _expert(piece, read, sides_of(shape), 0)
    if isinstance(piece, Pair | Repeated):
        return piece.factors(read) if isinstance(piece, Pair) else piece.factors(read, shape)
    if isinstance(piece, Shared | Drawn):
        return piece.factors(read, shape, transposed=transposed)
    if not isinstance(piece, Factors | Triple):
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
