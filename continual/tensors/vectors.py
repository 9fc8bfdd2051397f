"""The task vectors of one candidate, τ = θ_t − θ₀, one tensor at a time in float32, and the digest of what went into them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from continual.errors import Refuse
from continual.linalg import inner
from continual.records import Lineage, TensorSpec
from continual.tensors.adapter import Adapter
from continual.tensors.checkpoint import TORCH, Checkpoint
from continual.tensors.kinds import BaseModel
from continual.tensors.model import Model


class Vector(NamedTuple):
    """One tensor's task vector `tau` (float32, the base's shape, CPU), the SHA-256 of what it was made from, ‖θ₀‖² and the bytes read."""

    tau: torch.Tensor
    digest: bytes
    base_sq: float
    nbytes: int


def candidate_name(name: str, prefix: tuple[str, str]) -> str:
    """The candidate's name for the base's tensor `name`, with the leading part that differs exchanged."""
    ours, theirs = prefix
    return theirs + name.removeprefix(ours)


class TaskVectors:
    """Reads task vectors of `model` against `base` as `lineage` maps them. Thread-safe: each thread reads into buffers of its own, which it reuses."""

    def __init__(self, base: BaseModel, model: Model, lineage: Lineage) -> None:
        self._base = base
        self._model = model
        self._lineage = lineage
        self._specs = {spec.name: spec for spec in base.specs}
        self._buffers = threading.local()
        self._aliases: dict[str, list[str]] = {}
        for alias, name in base.aliases.items():
            self._aliases.setdefault(name, []).append(alias)

    def vector(self, name: str) -> Vector:
        """The task vector of the base's tensor `name`. Raises Refuse if tied aliases differ, Retry if a file cannot be read to its end."""
        spec = self._specs[name]
        theirs = candidate_name(name, self._lineage.prefix)
        if isinstance(self._model, Adapter):
            return self._from_adapter(self._model, spec, theirs)
        present = [n for n in (theirs, *(candidate_name(a, self._lineage.prefix) for a in self._aliases.get(name, []))) if n in self._model.tensors]
        vector = self._difference(self._model, present[0], spec)
        for alias in present[1:]:
            if self._digest(self._model, alias, self._read(self._model, alias, "fine-tune")) != vector.digest:
                raise Refuse("tied", f"{self._model.path}: {present[0]} and {alias} are one tensor in the base, and differ here")
        return vector

    def nbytes(self, name: str) -> int:
        """Peak bytes that `vector(name)` takes, what it returns included."""
        spec = self._specs[name]
        narrowed = spec.numel * 2 if name in self._lineage.narrowed else 0
        return 4 * spec.numel + 2 * spec.nbytes + narrowed

    def prefetch(self, name: str) -> None:
        """Asks the kernel to read what `vector(name)` will need."""
        self._base.checkpoint.prefetch(name)
        theirs = candidate_name(name, self._lineage.prefix)
        if isinstance(self._model, Checkpoint) and theirs in self._model.tensors:
            self._model.prefetch(theirs)

    def digest(self, parts: Mapping[str, bytes]) -> str:
        """The content digest of a candidate from the digests of its tensors, by the base's names: the same under another name, place or prefix."""
        whole = hashlib.sha256()
        for name in sorted(parts):
            whole.update(name.encode("utf-8", "surrogatepass") + b"\0" + parts[name])
        return f"sha256:{whole.hexdigest()}"

    def _difference(self, model: Checkpoint, theirs: str, spec: TensorSpec) -> Vector:
        info = model.tensors[theirs]
        raw = model.read(theirs) if info.dtype == "F32" else self._read(model, theirs, "fine-tune")
        digest = self._digest(model, theirs, raw)
        base = self._read(self._base.checkpoint, spec.name, "base")
        base_sq = inner(base, base)
        nbytes = info.nbytes + spec.nbytes
        # narrower than the base: cast θ₀ as the publisher cast θ_t, so that an untouched weight gives exactly zero
        origin = base.to(TORCH[info.dtype]) if spec.name in self._lineage.narrowed else base
        if (rows := self._lineage.rows.get(spec.name)) is not None:
            tau = torch.zeros(spec.shape)
            tau[:rows] = raw[:rows]
            tau[:rows].sub_(origin[:rows])
        else:
            tau = raw.float()
            tau.sub_(origin)
        return Vector(tau, digest, base_sq, nbytes)

    def _from_adapter(self, model: Adapter, spec: TensorSpec, theirs: str) -> Vector:
        if theirs in model.saved:
            vector = self._difference(model.weights, model.saved[theirs], spec)
            if theirs not in model.factors:
                return vector
            raise Refuse("adapter-kind", f"{model.path}: {theirs} has factors and is in modules_to_save as well")
        factors = model.factors[theirs]
        part = hashlib.sha256(f"lora {factors.scale!r} {factors.embedding} {model.transposed}".encode())
        for name in (factors.a, factors.b):
            part.update(self._digest(model.weights, name, model.weights.read(name)))
        base = self._read(self._base.checkpoint, spec.name, "base")
        nbytes = spec.nbytes + sum(model.weights.tensors[n].nbytes for n in (factors.a, factors.b))
        return Vector(model.product(theirs).reshape(spec.shape), part.digest(), inner(base, base), nbytes)

    def _read(self, model: Checkpoint, name: str, use: str) -> torch.Tensor:
        """A tensor in this thread's buffer for `use`: valid until the thread reads the next for the same use."""
        need = model.tensors[name].nbytes
        buffer: Any = getattr(self._buffers, use, None)
        if buffer is None or buffer.numel() < need:
            buffer = torch.empty(need, dtype=torch.uint8)
            setattr(self._buffers, use, buffer)
        return model.read(name, buffer)

    @staticmethod
    def _digest(model: Checkpoint, name: str, tensor: torch.Tensor) -> bytes:
        info = model.tensors[name]
        part = hashlib.sha256(f"{info.dtype} {info.shape}".encode())
        if info.nbytes:
            part.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        return part.digest()
