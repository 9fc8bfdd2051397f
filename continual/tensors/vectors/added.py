"""What an adapter adds to each tensor of the base, multiplied out: and what the digest of a task vector is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from blake3 import blake3

from continual.errors import Refuse
from continual.lazily import torch
from continual.records import Lineage, TensorSpec
from continual.tensors.adapters.adapter import Adapter
from continual.tensors.adapters.pieces import Piece
from continual.tensors.checkpoints.checkpoint import Checkpoint
from continual.tensors.matched.matching import Match
from continual.tensors.matched.row_order import InOrderOf, gather, moved_of, scatter
from continual.timing.clock import stage


class Content:
    """What a tensor's task vector was made from: the BLAKE3 hash of it all, and the bytes read for it, the base's
    included."""

    def __init__(self) -> None:
        self.hash = blake3()
        self.shipped: blake3 | None = None
        self.nbytes = 0

    def digest(self) -> bytes:
        """The hash; of what was shipped beside the weights as well, where that was read."""
        return (
            blake3(self.hash.digest() + self.shipped.digest()).digest()
            if self.shipped is not None
            else self.hash.digest()
        )


class AddedPieces:
    """What `model` adds to the tensors of `base`, as `lineage` maps them. Thread-safe."""

    def __init__(self, base: Checkpoint, model: Adapter, lineage: Lineage) -> None:
        self._base = base
        self._model = model
        self._moved = moved_of(lineage.tokens)

    def write(self, spec: TensorSpec, source: Match, out: torch.Tensor, content: Content | None) -> None:
        """What the adapter adds to the tensor into the flat `out`; rows that only one of the two has get nothing.
        Raises Refuse (`tied`) where it says two things of one table, Retry."""
        piece = source.piece
        assert piece is not None
        shape = self._shape(spec, source, piece)
        read = self._model.read(piece)
        base = self._added_to(spec, source, shape[0]) if piece.needs_base else None
        rows = self._moved.get(spec.name)
        added = out.view(shape) if shape == spec.shape and rows is None else torch.empty(shape)
        piece.add(read, base, added, transposed=source.transposed)
        if rows is not None:
            gather(rows, added, out.view(spec.shape))
        elif added.data_ptr() != out.data_ptr():
            both = min(added.numel(), out.numel())
            out[:both] = added.view(-1)[:both]
            out[both:] = 0.0
        if content is None:
            return
        if rows is not None:
            content.hash.update(rows.digest.encode())
        hash_piece(self._model, source, read, content)
        content.nbytes += spec.nbytes if base is not None and source.full is None else 0

    def nbytes(self, spec: TensorSpec, source: Match) -> int:
        """Bytes that `write` takes besides `out`."""
        piece = source.piece
        assert piece is not None
        read = self._model.infos(piece)
        shape = self._shape(spec, source, piece)
        need = sum(info.nbytes + 4 * math.prod(info.shape) for info in read) + piece.workspace(shape)
        elsewhere = shape != spec.shape or spec.name in self._moved
        return need + 4 * math.prod(shape) * (elsewhere + 2 * piece.needs_base)

    def _shape(self, spec: TensorSpec, source: Match, piece: Piece) -> tuple[int, ...]:
        """The shape of what the adapter adds; of a vocabulary of another size it is not that of the base's tensor."""
        against = source.full.shape if source.full else spec.shape
        if source.full is not None and spec.name in self._moved:
            against = (self._moved[spec.name].theirs, *spec.shape[1:])
        return piece.fit(spec.name, against, transposed=source.transposed)

    def _added_to(self, spec: TensorSpec, source: Match, length: int) -> torch.Tensor:
        """The weight that an adapter adds to, a table of `length` rows in the order of the adapter."""
        weights = self._model.weights
        if source.full is not None:
            name = source.full.name
            return (weights.plain(name) if isinstance(weights, InOrderOf) else weights.read(name)).float()
        rows = self._moved.get(spec.name)
        base = self._base.read(spec.name).float()
        return base if rows is None else scatter(rows, base, length)


def hash_piece(model: Adapter, source: Match, read: Sequence[torch.Tensor], content: Content) -> None:
    """Feeds what an adapter adds to a tensor, the tensors `read` of its piece, to `content`. Raises Refuse (`tied`)
    where it stands there under tied names, and differs."""
    assert source.piece is not None
    for other in source.again:
        _check_again(model, source.piece, other, read)
    content.hash.update(source.piece.settings(transposed=source.transposed).encode())
    for info, part in zip(model.infos(source.piece), read, strict=True):
        content.hash.update(f" {info.dtype} {info.shape} ".encode())
        with stage("hash", info.nbytes):
            content.hash.update(raw(part))
        content.nbytes += info.nbytes


def _check_again(model: Adapter, piece: Piece, other: Piece, read: Sequence[torch.Tensor]) -> None:
    """Raises Refuse (`tied`) unless a second piece, which is about the same table under its other name, says the same:
    the same tensors, or, for a table's factors and a head's, each the other's transpose."""
    found = model.read(other)
    turned = [tensor.T for tensor in reversed(found)] if all(tensor.dim() == 2 for tensor in found) else []
    for tensors in (found, turned):
        if len(read) == len(tensors) and all(map(torch.equal, read, tensors)):
            return
    raise Refuse(
        "tied",
        f"{model.place}: {piece.names[0]} and {other.names[0]} are about one table of the base, and differ: fold it "
        "into a state made with 'continual init --tied untie'",
    )


def raw(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
