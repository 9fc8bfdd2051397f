"""What tells two merges apart: how long the difference of their merged task vectors is and which way it goes, tensor by
tensor and layer by layer, and which models came and went. It only reads, and has one tensor of each in memory at a
time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from continual import linalg
from continual.engine.models_read import ModelRead, models_read, models_said
from continual.engine.reading import Reading
from continual.errors import Misconfigured, Refuse
from continual.executors.contract import Executor, Progress, Task, silent
from continual.gates.lineage import LineageGate, trace
from continual.lazily import Tensor, torch
from continual.records import TensorSpec
from continual.rules.matrices import sides
from continual.tensors import BaseModel, Model, TaskVectors, release_of
from continual.tensors.names.kinds import layer_in


class Compared(Protocol):
    """One of the two merges."""

    ref: str
    seq: int | None
    models: Sequence[ModelRead] | None

    def vector(self, spec: TensorSpec) -> Tensor:
        """The merged task vector of a tensor: float32 of its shape, in new memory."""
        ...

    def need(self, spec: TensorSpec) -> int:
        """Bytes that this takes at its peak."""
        ...

    def made_from(self, spec: TensorSpec) -> object:
        """All that it follows from, as plain data; None where that is not known."""
        ...


class ComparedRecord:
    """The merge at a record. `reading` is settled."""

    def __init__(self, ref: str, reading: Reading) -> None:
        self.ref = ref
        self.models: Sequence[ModelRead] | None = models_read(reading)
        self.seq: int | None = reading.commit.seq
        self._reading = reading

    def vector(self, spec: TensorSpec) -> Tensor:
        """As `Compared`."""
        return self._reading.vector(spec)

    def need(self, spec: TensorSpec) -> int:
        """As `Compared`."""
        return self._reading.need(spec)

    def made_from(self, spec: TensorSpec) -> object:
        """As `Compared`."""
        return self._reading.made_from(spec)


class ComparedModel:
    """The files of a model: an export, a release, a fine-tune or an adapter. Its task vector is what it has besides the
    base, as far as its dtype keeps that."""

    def __init__(self, ref: str, base: BaseModel, model: Model) -> None:
        """Raises Misconfigured where it is no model of this base."""
        try:
            lineage = trace(base, model, LineageGate(tied="both", lineage="shapes"), again=True)
        except Refuse as error:
            raise Misconfigured(f"{ref}: is no model of this base: {error}") from None
        self.ref = ref
        self.models: Sequence[ModelRead] | None = models_said(release_of(model.place))
        self.seq: int | None = None
        self._changed = frozenset(lineage.folded)
        self._vectors = TaskVectors(base, model, lineage)

    def vector(self, spec: TensorSpec) -> Tensor:
        """As `Compared`."""
        return self._vectors.vector(spec.name).tau if spec.name in self._changed else torch.zeros(spec.shape)

    def need(self, spec: TensorSpec) -> int:
        """As `Compared`."""
        return self._vectors.nbytes(spec.name) if spec.name in self._changed else 4 * spec.numel

    def made_from(self, spec: TensorSpec) -> object:  # noqa: ARG002
        """As `Compared`."""
        return None


class DiffProducts(NamedTuple):
    """The sums that the figures of some tensors follow from: ‖A‖², ‖B‖², ⟨A, B⟩ and ‖B − A‖²; of matrices also ‖B − A‖²
    again and the sum of the squares of its largest singular values."""

    before: float = 0.0
    after: float = 0.0
    dot: float = 0.0
    change: float = 0.0
    matrices: float = 0.0
    tops: float = 0.0

    @staticmethod
    def total(parts: Sequence[DiffProducts]) -> DiffProducts:
        """The sums of several tensors."""
        return DiffProducts(*(math.fsum(column) for column in zip(*parts, strict=True))) if parts else DiffProducts()


@dataclass(frozen=True, slots=True)
class DiffFigures:
    """Lengths of the merged task vectors `before` and `after`, and of their difference (`change`); `relative`: that
    over the length before. `cosine`: between the two. `rank`: the stable rank of the difference, ‖D‖²/σ₁², over all
    matrices that it has; of noise about a sixth too high. None where one of the two is zero, or there is no matrix."""

    before: float
    after: float
    change: float
    relative: float | None
    cosine: float | None
    rank: float | None

    @classmethod
    def of(cls, sums: DiffProducts) -> DiffFigures:
        """From the sums."""
        before, after, change = (math.sqrt(max(0.0, square)) for square in (sums.before, sums.after, sums.change))
        cosine = sums.dot / (before * after) if before and after else None
        return cls(
            before,
            after,
            change,
            change / before if before else None,
            None if cosine is None else max(-1.0, min(1.0, cosine)),
            sums.matrices / sums.tops if sums.tops else None,
        )


@dataclass(frozen=True, slots=True)
class DiffTensor:
    """A tensor: its `layer` (its own name where it is in none), what it is in there (`part`; empty), its kind and
    depth."""

    name: str
    layer: str
    part: str
    kind: str
    depth: float
    figures: DiffFigures


@dataclass(frozen=True, slots=True)
class DiffLayer:
    """A layer, or a tensor that is in none."""

    name: str
    depth: float
    figures: DiffFigures


@dataclass(frozen=True, slots=True)
class Weighed:
    """A model that both merges have, with another weight."""

    name: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Diff:
    """What tells `b` from `a`, the words that name them; `a_seq` and `b_seq`: their records, None of files. `layers`
    and `tensors` by depth. `came`, `went` and `weighed`: models by what is in them, whatever they are called; None
    where one side does not say its models."""

    a: str
    b: str
    a_seq: int | None
    b_seq: int | None
    whole: DiffFigures
    layers: tuple[DiffLayer, ...]
    tensors: tuple[DiffTensor, ...]
    came: tuple[ModelRead, ...] | None
    went: tuple[ModelRead, ...] | None
    weighed: tuple[Weighed, ...] | None


def diff(
    specs: Sequence[TensorSpec], a: Compared, b: Compared, executor: Executor, progress: Progress = silent
) -> Diff:
    """Compares two merges over `specs`, the tensors that a merge can change. Raises Retry and Damaged."""
    kept = [spec for spec in specs if spec.kind != "carried"]
    tasks = [
        Task(spec.name, a.need(spec) + b.need(spec) + 8 * spec.numel, partial(_products, spec, a, b)) for spec in kept
    ]
    found: dict[str, DiffProducts] = {}
    progress("diff", 0, len(tasks))
    for name, sums in executor.map(tasks):
        found[name] = sums
        progress("diff", len(found), len(tasks))
    ordered = sorted(kept, key=_place)
    grouped: dict[str, list[TensorSpec]] = {}
    for spec in ordered:
        grouped.setdefault(layer_in(spec.name), []).append(spec)
    layers = [
        DiffLayer(name, inside[0].depth, DiffFigures.of(DiffProducts.total([found[spec.name] for spec in inside])))
        for name, inside in grouped.items()
    ]
    return Diff(
        a.ref,
        b.ref,
        a.seq,
        b.seq,
        DiffFigures.of(DiffProducts.total([found[spec.name] for spec in ordered])),
        tuple(layers),
        tuple(_tensor(spec, found[spec.name]) for spec in ordered),
        *_models(a.models, b.models),
    )


def _place(spec: TensorSpec) -> tuple[float, str]:
    """Where a tensor is listed: what is in no layer before the first or after the last."""
    loose = layer_in(spec.name) == spec.name
    return (2 * spec.depth - 0.5 if loose else spec.depth, spec.name)


def _tensor(spec: TensorSpec, sums: DiffProducts) -> DiffTensor:
    layer = layer_in(spec.name)
    part = spec.name[len(layer) :].strip(".").removesuffix(".weight")
    return DiffTensor(spec.name, layer, part, spec.kind, spec.depth, DiffFigures.of(sums))


def _products(spec: TensorSpec, a: Compared, b: Compared) -> DiffProducts:
    ours = a.vector(spec)
    made = a.made_from(spec)
    if made is not None and made == b.made_from(spec):
        square = linalg.inner(ours, ours)
        return DiffProducts(square, square, square)
    theirs = b.vector(spec)
    before, after, dot = linalg.inners((ours, ours), (theirs, theirs), (ours, theirs))
    theirs.sub_(ours)
    change = linalg.inner(theirs, theirs)
    if not change or spec.kind not in ("matrix", "stack"):
        return DiffProducts(before, after, dot, change)
    one = spec.expert if spec.kind == "stack" else spec
    tops = math.fsum(linalg.top(each) ** 2 for each in theirs.view(-1, *sides(one)))
    return DiffProducts(before, after, dot, change, change, tops)


def _models(
    before: Sequence[ModelRead] | None, after: Sequence[ModelRead] | None
) -> tuple[tuple[ModelRead, ...] | None, tuple[ModelRead, ...] | None, tuple[Weighed, ...] | None]:
    if before is None or after is None:
        return None, None, None
    was, now = ({model.digest or model.key: model for model in models} for models in (before, after))
    weighed = [
        Weighed(now[key].name, old, new)
        for key in now
        if key in was and (old := was[key].weight) != (new := now[key].weight) and old is not None and new is not None
    ]
    return (
        tuple(model for key, model in now.items() if key not in was),
        tuple(model for key, model in was.items() if key not in now),
        tuple(weighed),
    )
