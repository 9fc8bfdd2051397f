"""The task vectors of one candidate, τ = θ_t − θ₀, one tensor at a time in float32, and the digest of what went into them.

A tensor is read in blocks into small buffers that each thread keeps, so that beyond τ itself hardly anything is in memory.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from continual.errors import Refuse
from continual.linalg import inner
from continual.records import ITEMSIZE, Lineage, TensorSpec
from continual.tensors.adapter import Adapter
from continual.tensors.checkpoint import TORCH, Checkpoint
from continual.tensors.header import TensorInfo
from continual.tensors.kinds import BaseModel
from continual.tensors.matching import Source, sources

BLOCK = 1 << 18
"""Elements read at a time: 1 MiB of float32."""
_WORKSPACE = 8 * 4 * BLOCK


class Piece(NamedTuple):
    """One tensor's task vector `tau` (float32, the base's shape, CPU), the SHA-256 of what it was made from, ‖θ₀‖² and the bytes read."""

    tau: torch.Tensor
    digest: bytes
    base_sq: float
    nbytes_read: int


class TaskVectors:
    """Reads task vectors of `model` against `base` as `lineage` maps them. Thread-safe."""

    def __init__(self, base: BaseModel, model: Checkpoint | Adapter, lineage: Lineage) -> None:
        self._base = base.checkpoint
        self._model = model
        self._weights = model.weights if isinstance(model, Adapter) else model
        self._lineage = lineage
        self._specs = {spec.name: spec for spec in base.specs}
        self._sources, _ = sources(base, model, lineage.prefix)
        self._buffers = threading.local()

    def vector(self, name: str) -> Piece:
        """The task vector of the base's tensor `name`. Raises Refuse if tied names differ, Retry if a file cannot be read to its end."""
        spec, source = self._specs[name], self._sources[name]
        tau = torch.zeros(spec.shape) if source.full is None or name in self._lineage.rows else torch.empty(spec.shape)
        content = hashlib.sha256()
        base_sq = self._differences(spec, source, tau.view(-1), content)
        nbytes = spec.nbytes + sum(info.nbytes for info in (source.full, *source.twins) if info is not None)
        if source.factors is not None:
            nbytes += self._add_product(source, tau, content)
        return Piece(tau, content.digest(), base_sq, nbytes)

    def nbytes(self, name: str) -> int:
        """Peak bytes that `vector(name)` takes, what it returns included."""
        spec, source = self._specs[name], self._sources[name]
        need = 4 * spec.numel + _WORKSPACE
        if source.factors is not None:
            read = [self._weights.tensors[n] for n in (source.factors.a, source.factors.b)]
            need += sum(info.nbytes + 4 * math.prod(info.shape) for info in read) + (4 * spec.numel if source.full else 0)
        return need

    def prefetch(self, name: str) -> None:
        """Asks the kernel to read what `vector(name)` will need."""
        source = self._sources[name]
        self._base.prefetch(self._base.tensors[name])
        for info in (source.full, *source.twins):
            if info is not None:
                self._weights.prefetch(info)

    def digest(self, parts: Mapping[str, bytes]) -> str:
        """The content digest of a candidate from the digests of its tensors, by the base's names: the same under another name, place or prefix."""
        whole = hashlib.sha256()
        for name in sorted(parts):
            whole.update(name.encode() + b"\0" + parts[name])
        return f"sha256:{whole.hexdigest()}"

    def _differences(self, spec: TensorSpec, source: Source, tau: torch.Tensor, content: Any) -> float:
        """Fills the flat `tau` with θ_t − θ₀ where the candidate has a full tensor, feeds its bytes to `content` and returns ‖θ₀‖²."""
        folded = 0
        if source.full is not None:
            rows = self._lineage.rows.get(spec.name)
            shape = source.full.shape if rows is None else (rows, *spec.shape[1:])
            folded = math.prod(shape)
            content.update(f"{source.full.dtype} {shape}".encode())
        narrower = TORCH[self._lineage.narrowed[spec.name]] if spec.name in self._lineage.narrowed else None
        squares = []
        for start in range(0, spec.numel, BLOCK):
            stop = min(start + BLOCK, spec.numel)
            origin = self._block("base", self._base, self._base.tensors[spec.name], start, stop)
            squares.append(inner(origin, origin))
            if source.full is None or start >= folded:
                continue
            stop = min(stop, folded)
            values = self._block("fine-tune", self._weights, source.full, start, stop)
            content.update(_raw(values))
            for twin in source.twins:
                if _raw(self._block("twin", self._weights, twin, start, stop)) != _raw(values):
                    raise Refuse(
                        "tied", f"{self._model.path}: {source.full.name} and {twin.name} are one tensor in the base, and differ here"
                    )
            # narrower than the base: θ₀ is cast as the publisher cast θ_t, so that an untouched weight gives exactly zero
            if narrower is not None:
                origin = origin.to(narrower)
            tau[start:stop] = values
            tau[start:stop] -= origin[: stop - start]
        return math.fsum(squares)

    def _add_product(self, source: Source, tau: torch.Tensor, content: Any) -> int:
        """Adds scale·B·A to `tau`. Returns the bytes read."""
        assert isinstance(self._model, Adapter)
        assert source.factors is not None
        flat = tau.view(self._model.shape(source.factors, source.transposed))
        product = flat if source.full is None else torch.empty_like(flat)
        read = self._model.product(source.factors, source.transposed, product)
        if source.full is not None:
            flat += product
        content.update(f"lora {source.factors.scale!r} {source.factors.embedding} {source.transposed}".encode())
        for name, factor in read:
            info = self._weights.tensors[name]
            content.update(f" {info.dtype} {info.shape} ".encode())
            content.update(_raw(factor))
        return sum(self._weights.tensors[name].nbytes for name, _ in read)

    def _block(self, use: str, checkpoint: Checkpoint, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of a tensor in this thread's buffer for `use`: valid until the thread reads the next for the same use."""
        buffer: torch.Tensor | None = getattr(self._buffers, use, None)
        if buffer is None:
            buffer = torch.empty(8 * BLOCK, dtype=torch.uint8)
            setattr(self._buffers, use, buffer)
        size = ITEMSIZE[info.dtype]
        raw = buffer[: (stop - start) * size]
        checkpoint.read_part(info, start * size, raw.numpy().data)
        return raw.view(TORCH[info.dtype])


def _raw(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
