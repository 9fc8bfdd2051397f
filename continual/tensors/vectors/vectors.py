"""The task vectors of one candidate, τ = θ_t − θ₀, one tensor at a time in float32, and the digest of what went into
them.

A tensor is read in runs into small buffers that each thread keeps: whole tensors are in memory only where the caller
wants them whole, or where factors have to be multiplied out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from blake3 import blake3

from continual.errors import Refuse
from continual.lazily import torch
from continual.records import Lineage, TensorSpec
from continual.tensors.adapters.adapter import Adapter
from continual.tensors.adapters.pieces.low_rank import Factors
from continual.tensors.adapters.pieces.stacks import Gathered, StackFactors, part_of, runs_of
from continual.tensors.checkpoints.checkpoint import TORCH, Checkpoint
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.layouts.same_layout import checkpoint_in_layout_of, in_layout_of
from continual.tensors.matched.matching import Match, naming_of, sources
from continual.tensors.matched.row_order import InOrderOf, matches, tables_of, turned
from continual.tensors.names.kinds import BaseModel
from continual.tensors.names.tied import can_untie
from continual.tensors.vectors.added import AddedPieces, Content, hash_piece, raw
from continual.tensors.vectors.grids import grid_of
from continual.timing.clock import stage

RUN = 1 << 18
"""Elements read at a time: the four buffers of a thread, 1 MiB in float32, stay in its cache."""

_ROWS = 64
"""Rows of a matrix in which a grid is looked for."""


class Extent(NamedTuple):
    """Bytes of a model's file: its name, the first byte, how many."""

    file: str
    start: int
    nbytes: int


def extents_of(checkpoint: Checkpoint, infos: Sequence[TensorInfo]) -> list[Extent]:
    """What is read of a model's files for these of its tensors."""
    return [Extent(checkpoint.files[file].name, *rest) for file, *rest in checkpoint.extents(infos)]


class TaskVector(NamedTuple):
    """One tensor's task vector `tau` (float32, the base's shape, CPU), the BLAKE3 hash of what it was made from, and
    the bytes read."""

    tau: torch.Tensor
    digest: bytes
    nbytes_read: int


class TaskVectors:
    """Reads task vectors of `model` against `base` as `lineage` maps them, at most `run` elements at a time. `shipped`
    has values beside the weights, by the same names. Thread-safe. `buffers` may be shared by models that a thread reads
    one after the other, each to its end. Of the tensors that are `looked` at, `grids` has on which grid the first
    numbers lie (`grid_of`), once they were read."""

    def __init__(
        self,
        base: BaseModel,
        model: Checkpoint | Adapter,
        lineage: Lineage,
        *,
        run: int = RUN,
        shipped: Checkpoint | None = None,
        buffers: threading.local | None = None,
    ) -> None:
        model = in_layout_of(base, model)
        found, _ = sources(base, model, naming_of(lineage))
        tables = tables_of(base.checkpoint, found, lineage)
        model = turned(base.checkpoint, model, tables)
        self.run = run
        self._shipped = None
        if shipped is not None:
            alike = checkpoint_in_layout_of(base, shipped)
            self._shipped = InOrderOf.beside(base.checkpoint, alike, tables) if tables else alike
        self._base = base.checkpoint
        self._model = model
        self._weights = model.weights if isinstance(model, Adapter) else model
        self._lineage = lineage
        self._folded = frozenset(lineage.folded)
        self._specs = {spec.name: spec for spec in base.specs}
        self._added = AddedPieces(base.checkpoint, model, lineage) if isinstance(model, Adapter) else None
        self._sources = matches(found, tables) if tables else found
        self._buffers = buffers or threading.local()
        self.looked: frozenset[str] = frozenset()
        self.grids: dict[str, str | None] = {}
        self.begin()

    def begin(self, names: Sequence[str] | None = None) -> None:
        """Begins a pass over the candidate, or over tensors of these names: what will be read of it, and in which
        order."""
        wanted = self._lineage.folded if names is None else [name for name in names if self.has(name)]
        for checkpoint, infos in self._reads(wanted):
            checkpoint.expect(sorted(infos, key=lambda info: (info.file, info.offset)))

    def extents(self, name: str) -> list[Extent]:
        """What is read of the candidate's files for the base's tensor `name`."""
        return [extent for checkpoint, infos in self._reads([name]) for extent in extents_of(checkpoint, infos)]

    def has(self, name: str) -> bool:
        """Whether the candidate changes the base's tensor `name`, as far as its headers say."""
        return name in self._folded

    def spec(self, name: str) -> TensorSpec:
        """The base's tensor `name`."""
        return self._specs[name]

    def _reads(self, names: Sequence[str]) -> Iterator[tuple[Checkpoint, list[TensorInfo]]]:
        """All that is read of these tensors of the candidate in one pass, and where."""
        found, full = list[TensorInfo](), list[str]()
        for source in map(self._sources.__getitem__, names):
            full += [source.full.name] if source.full else []
            found += [*([source.full] if source.full else ()), *source.twins]
            for piece in (source.piece, *source.again) if source.piece is not None else ():
                found += [self._weights.tensors[part] for part in piece.names]
        yield self._weights, found
        if self._shipped is not None:
            yield self._shipped, [self._shipped.tensors[name] for name in full]

    def position(self, name: str) -> tuple[int, int]:
        """Where in the candidate's files the base's tensor `name` begins: in this order they are best read. What the
        candidate lacks comes last."""
        source = self._sources.get(name)
        if source is None:
            return (1 << 62, 0)
        info = source.full or (self._weights.tensors[source.piece.names[0]] if source.piece else None)
        assert info is not None
        return (info.file, info.offset)

    def vector(self, name: str, into: torch.Tensor | None = None) -> TaskVector:
        """The task vector of the base's tensor `name`, in new memory or in that of the float32 `into`, which has as
        many elements. Raises Refuse if tied names differ, Retry if a file cannot be read to its end."""
        shape, content = self._specs[name].shape, Content()
        tau = torch.empty(shape) if into is None else into.view(shape)
        flat = tau.view(-1)
        for start, stop, values in self.runs(name, content, flat):
            if values.data_ptr() != flat[start:stop].data_ptr():
                flat[start:stop] = values
        return TaskVector(tau, content.digest(), content.nbytes)

    def experts(self, spec: TensorSpec, content: Content) -> Iterator[torch.Tensor]:
        """The task vector of a stack, one expert after the other, each in new memory; `content` is complete after the
        last. Raises as `vector`."""
        one = spec.expert
        tau, filled = torch.empty(one.numel), 0
        for _, _, values in self.runs(spec.name, content):
            while len(values):
                part, values = values[: one.numel - filled], values[one.numel - filled :]
                tau[filled : filled + len(part)] = part
                filled += len(part)
                if filled == one.numel:
                    yield tau.view(one.shape)
                    tau, filled = torch.empty(one.numel), 0

    def moments(self, name: str, start: int, stop: int, content: Content) -> torch.Tensor:
        """What was shipped for a range of elements of the base's tensor `name`: float32, valid until the thread asks
        for the next range.

        Rows beyond the vocabulary in common weigh nothing. Raises Refuse where a value is negative or not finite.
        """
        spec, source = self._specs[name], self._sources[name]
        assert self._shipped is not None
        assert source.full is not None
        info = self._shipped.tensors[source.full.name]
        rows = self._lineage.rows.get(name)
        folded = spec.numel if rows is None else rows * math.prod(spec.shape[1:])
        values = self._buffer("moments", stop - start, torch.float32)
        given = max(0, min(stop, folded) - start)
        values[given:] = 0.0
        if given:
            read = self._read("shipped", self._shipped, info, start, given)
            content.shipped = content.shipped or blake3()
            with stage("hash", read.nbytes):
                content.shipped.update(raw(read))
            content.nbytes += read.nbytes
            values[:given] = read
            _check_moments(values[:given], f"{self._shipped.where}: {info.name}")
        return values

    def runs(
        self, name: str, content: Content | None, into: torch.Tensor | None = None, share: float = 1.0
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The task vector of the base's tensor `name` in flat runs: (first element, one past the last, values).

        The values are float32 on the CPU; the next run reuses their memory, unless it is that of the flat `into`.

        `content` is complete once the last run was asked for; without one nothing is hashed, and twins are not
        compared. With `share` below 1 only the beginning of each run is read, that share of its elements and at least
        one.
        """
        spec, source = self._specs[name], self._sources[name]
        product = None
        if isinstance(source.piece, (StackFactors, Gathered)) and into is None and not _together(source):
            assert isinstance(self._model, Adapter)
            read = self._model.read(source.piece)
            if content is not None:
                hash_piece(self._model, source, read, content)
            yield from runs_of(source.piece, read, spec.shape, self._ranges(spec.numel, share), self._buffer)
            return
        if source.piece is not None:
            product = into if into is not None and source.full is None else torch.empty(spec.numel)
            assert self._added is not None
            self._added.write(spec, source, product, content)
        if source.full is None:
            assert product is not None, f"{name} is not among the tensors that this fine-tune changes"
            for start, stop in self._ranges(spec.numel, share):
                yield start, stop, product[start:stop]
            return
        rows = self._lineage.rows.get(name)
        shape = source.full.shape if rows is None else (rows, *spec.shape[1:])
        folded = math.prod(shape)
        if content is not None:
            content.hash.update(f"{source.full.dtype} {shape}".encode())
            content.nbytes += spec.nbytes + source.full.nbytes + sum(twin.nbytes for twin in source.twins)
        for start, stop in self._ranges(spec.numel, share):
            tau = self._buffer("tau", stop - start, torch.float32) if into is None else into[start:stop]
            given = max(0, min(stop, folded) - start)
            tau[given:] = 0.0
            if given:
                self._difference(spec, source, start, tau[:given], content)
            if product is not None:
                tau += product[start:stop]
            yield start, stop, tau

    def nbytes(self, name: str, *, whole: bool = True) -> int:
        """Peak bytes that `vector(name)` takes, what it returns included; or `runs(name)`."""
        spec, source = self._specs[name], self._sources[name]
        kinds = 1 if self._shipped is None else 2  # of what is read: task vectors, and what is shipped for them
        need = 4 * (3 + kinds) * self.run + (4 * kinds * spec.numel if whole else 0)
        if source.piece is not None and self._added is not None:
            one_by_one = isinstance(source.piece, (StackFactors, Gathered)) and not _together(source)
            added = math.prod(part_of(spec.shape)) if one_by_one else spec.numel
            need += self._added.nbytes(spec, source)
            need += 4 * added if source.full or not whole else 0
        if source.full is not None and isinstance(self._weights, InOrderOf):
            need += kinds * self._weights.workspace(source.full.name)
        return need

    def rank(self, name: str) -> int | None:
        """How many directions the task vector of `name` has at most, where it is a product of thin factors."""
        piece = self._sources[name].piece
        thin = self._sources[name].full is None and isinstance(piece, Factors) and not piece.needs_base
        return piece.rank if thin and isinstance(piece, Factors) else None

    def prefetch(self, name: str) -> None:
        """Asks the kernel to read what `vector(name)` will need."""
        source = self._sources[name]
        if source.full is None:
            return
        if self._shipped is not None:
            self._shipped.prefetch(self._shipped.tensors[source.full.name])
        self._base.prefetch(self._base.tensors[name])
        for info in (source.full, *source.twins):
            self._weights.prefetch(info)

    def digest(self, parts: Mapping[str, bytes]) -> str:
        """As `digest_of`."""
        return digest_of(parts)

    def _ranges(self, numel: int, share: float) -> Iterator[tuple[int, int]]:
        return (
            (start, start + max(1, int(share * min(self.run, numel - start)))) for start in range(0, numel, self.run)
        )

    def _difference(
        self, spec: TensorSpec, source: Match, start: int, tau: torch.Tensor, content: Content | None
    ) -> None:
        """Fills `tau` with θ_t − θ₀ from element `start` on and feeds the candidate's bytes to `content`."""
        assert source.full is not None
        base = self._read("base", self._base, self._base.tensors[spec.name], start, len(tau))
        values = self._read("fine-tune", self._weights, source.full, start, len(tau))
        if content is not None:
            with stage("hash", values.nbytes):
                content.hash.update(raw(values))
        for twin in source.twins if content is not None else ():
            if raw(self._read("twin", self._weights, twin, start, len(tau))) != raw(values):
                raise _differing(self._model, self._base, source.full.name, twin.name)
        # narrower than the base: θ₀ is cast as the publisher cast θ_t, so that an untouched weight gives exactly zero
        if spec.name in self._lineage.narrowed:
            base = base.to(TORCH[self._lineage.narrowed[spec.name]])
        if content is not None and start == 0 and spec.name in self.looked:
            self.grids[spec.name] = _grid_of(values, base, spec.shape)
        if values.dtype == base.dtype == tau.dtype:
            torch.sub(values, base, out=tau)
        else:
            tau.copy_(values).sub_(base)

    def _read(self, use: str, checkpoint: Checkpoint, info: TensorInfo, start: int, count: int) -> torch.Tensor:
        """`count` elements of a tensor in this thread's buffer for `use`: valid until the thread reads the next for the
        same use."""
        values = self._buffer(use, count, TORCH[info.dtype])
        checkpoint.read_part(info, start * values.element_size(), raw(values))
        return values

    def _buffer(self, use: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        buffer: torch.Tensor | None = getattr(self._buffers, use, None)
        if buffer is None:
            buffer = torch.empty(self.run)
            setattr(self._buffers, use, buffer)
        return buffer.view(dtype)[:count]


def _differing(model: Checkpoint | Adapter, base: Checkpoint, full: str, twin: str) -> Refuse:
    """Why two tensors cannot both be what is in the base's place: of tied tables, or twice of one weight."""
    if isinstance(model, Adapter) and any({full, twin} <= {*names} for names in model.saved.values()):
        said = f"{full} and {twin} are one weight, saved twice, and differ: load the adapter with PEFT, and save it"
        return Refuse("adapter-kind", f"{model.place}: {said} again")
    apart = "; an embedding and its head are kept apart in a state made with 'continual init --tied untie'"
    return Refuse(
        "tied",
        f"{model.place}: {full} and {twin} are one tensor in the base, "
        f"and differ here{apart if can_untie(base.config) else ': a model of another kind'}",
    )


def _together(source: Match) -> bool:
    """Whether what an adapter adds to a stack has to be multiplied out for all experts at once."""
    assert source.piece is not None
    return source.full is not None or bool(source.again) or source.piece.needs_base


def _grid_of(values: torch.Tensor, base: torch.Tensor, shape: Sequence[int]) -> str | None:
    """The grid of the first rows of a matrix, of a run of its elements from the first on."""
    columns = math.prod(shape[1:])
    rows = min(len(values) // columns, _ROWS) if columns else 0
    theirs, ours = (one[: rows * columns].float().numpy().reshape(rows, columns) for one in (values, base))
    return grid_of(theirs, ours) if rows else None


def _check_moments(values: torch.Tensor, what: str) -> None:
    if not (float(values.min()) >= 0.0 and math.isfinite(float(values.max()))):
        raise Refuse("moments", f"{what} has values that are negative or not finite; what weighs has to be at least 0")


def digest_of(parts: Mapping[str, bytes]) -> str:
    """The content digest of a candidate from the digests of its tensors, by the base's names: the same under another
    name, place or prefix."""
    whole = blake3()
    for name in sorted(parts):
        whole.update(name.encode() + b"\0" + parts[name])
    return f"blake3:{whole.hexdigest()}"
