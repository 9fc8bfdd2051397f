"""Members of a round: the candidates that wait, and the models that Frank-Wolfe can still weigh. A member is
known by its record and where its files are; it is opened for one pass at a time.

Between passes nothing of a member is in memory, so the memory that a round needs does not grow with the pool. What a
state of adapters keeps of a model that is in it is read there: its files can be gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

from continual import linalg
from continual.blocks import Shelf
from continual.blocks.shelf import stacked
from continual.engine.engine import Engine
from continual.errors import Refuse
from continual.executors.contract import Progress, Task
from continual.lazily import Tensor, torch
from continual.records import Candidate, Lineage, TensorSpec
from continual.tensors import (
    Adapter,
    LayerVectors,
    Model,
    Place,
    TaskVectors,
    ThinVector,
    WholeVector,
    candidate_of,
    open_model,
)
from continual.tensors.vectors.thin import sides_of
from continual.tensors.vectors.vectors import RUN

T = TypeVar("T")
Factors = tuple[Tensor, Tensor]
"""m×r and n×r float64: a task vector of m rows and n columns is left·rightᵀ."""
_RUN_ON_DEVICE = 1 << 22
"""Elements of a run on an accelerator: enough to be worth a transfer and a kernel."""


class Kept(NamedTuple):
    """Where a state of adapters keeps a model: its layers, and the model's number in them."""

    shelf: Shelf
    number: int


class Member(NamedTuple):
    """A model as the records name it. `at`: where its files are now, as somebody says. Files there are taken for the
    member's whatever their state; who says so compares the content with the records. `kept`: where a state of adapters
    keeps it, if it is in one."""

    candidate: Candidate
    at: Place | None = None
    kept: Kept | None = None

    @property
    def key(self) -> str:
        """The candidate's key."""
        return self.candidate.key

    @property
    def name(self) -> str:
        """The model's name, for people."""
        return self.candidate.name

    @property
    def form(self) -> str:
        """`full` or `adapter`."""
        return self.candidate.form


class MemberFiles(NamedTuple):
    """The files of a member while it is read; `layers` reads an adapter as a state of adapters folds it."""

    model: Model
    lineage: Lineage
    vectors: TaskVectors
    layers: LayerVectors | None

    def begin(self) -> None:
        """Begins a pass in which `vectors_of` is asked for every tensor once."""
        assert self.layers is not None, "an adapter"
        self.layers.begin()

    def vectors_of(self, spec: TensorSpec) -> Iterator[ThinVector | WholeVector]:
        """The task vector of each layer of a tensor, of an adapter that a state of adapters takes (`LayerVectors`).
        Raises Refuse and Retry."""
        assert self.layers is not None, "an adapter"
        return self.layers.read(spec)


class Opened(NamedTuple):
    """A member while it is read. `changed`: the tensors that it changes. factors(name): the thin factors of one of
    them, of a stack those of each matrix in it; None where it is no product of such. `read`: its files; None where the
    state keeps it."""

    changed: Sequence[str]
    factors: Callable[[str], Sequence[Factors] | None]
    read: MemberFiles | None

    @property
    def files(self) -> MemberFiles:
        """Its files, of a member that is read from some."""
        assert self.read is not None, "the state keeps it"
        return self.read

    def nbytes(self, name: str) -> int:
        """Peak bytes of a pass over one tensor in runs."""
        return 0 if self.read is None else self.read.vectors.nbytes(name, whole=False)

    def check_unchanged(self) -> None:
        """Raises Retry where its files were changed while they were read."""
        if self.read is not None:
            self.read.model.check_unchanged()

    def add(self, name: str, target: Tensor, by: float) -> None:
        """target += by·τ of the tensor `name`; `target` is contiguous and has its shape. Raises Refuse and Retry."""
        flat = target.view(-1)
        if (pairs := self.factors(name)) is None:
            for start, stop, tau in self.files.vectors.runs(name, None):
                flat[start:stop].add_(tau.to(target.device), alpha=by)
            return
        for part, pair in zip(_parts(flat, pairs), pairs, strict=True):
            left, right = (side.to(target.device, torch.float32) for side in pair)
            if target.dtype == torch.float32:
                part.view(len(left), len(right)).addmm_(left, right.mT, alpha=by)
            else:
                part.add_((left @ right.mT).view(-1), alpha=by)

    def inners(self, name: str, gradient: Tensor | None, *, square: bool) -> tuple[float, float]:
        """⟨g, τ⟩ of the tensor `name`, 0 where there is no gradient (flat), and, where it is asked for, ‖τ‖². Raises
        Refuse and Retry.

        Where τ = L·Rᵀ, the first is the sum of the elements of L ∘ (G·R), the second that of (LᵀL) ∘ (RᵀR).
        """
        if (pairs := self.factors(name)) is not None:
            gradients = [None] * len(pairs) if gradient is None else _parts(gradient, pairs)
            dots = [_dot(part, *pair) for part, pair in zip(gradients, pairs, strict=True)]
            lengths = [float(((left.mT @ left) * (right.mT @ right)).sum()) if square else 0.0 for left, right in pairs]
            return math.fsum(dots), math.fsum(lengths)
        parts: list[list[float]] = []
        for start, stop, tau in self.files.vectors.runs(name, None):
            here = tau if gradient is None else tau.to(gradient.device)
            pairs = [] if gradient is None else [(gradient[start:stop], here)]
            parts.append(linalg.inners(*pairs, *([(here, here)] if square else [])))
        dot = 0.0 if gradient is None else math.fsum(part[0] for part in parts)
        return dot, math.fsum(part[-1] for part in parts) if square else 0.0


@contextmanager
def opened(engine: Engine, member: Member) -> Iterator[Opened]:
    """Opens a member's task vectors. Raises Refuse with the reason `gone` where its files are not those that were seen,
    Retry where they cannot be read now."""
    if member.kept is not None:
        yield _opened_blocks(member.kept, {spec.name: spec.layers for spec in engine.base.specs})
        return
    with opened_files(engine, member) as model:
        lineage = engine.lineage(model)
        vectors = TaskVectors(engine.weights, model, lineage, run=_run(engine), buffers=engine.buffers)
        layers = LayerVectors(engine.base, model, lineage, engine.weights) if isinstance(model, Adapter) else None
        specs = {spec.name: spec for spec in engine.base.specs}

        def factors(name: str) -> Sequence[Factors] | None:
            if layers is None or not layers.is_thin(name):
                return None
            return [(one.left, one.right) for one in layers.read(specs[name]) if isinstance(one, ThinVector)]

        yield Opened(lineage.folded, factors, MemberFiles(model, lineage, vectors, layers))


@contextmanager
def opened_files(engine: Engine, member: Member) -> Iterator[Model]:
    """Opens a member's files. Raises as `opened`."""
    place = member.at or engine.locate(member.candidate)
    place.must_be_there()
    with open_model(place) as model:
        if member.at is None and candidate_of(model).key != member.key:
            raise Refuse(
                "gone",
                f"{member.name}: the files in {place} are not those that were seen; "
                "they are looked at as a new candidate",
            )
        yield model


def _opened_blocks(kept: Kept, layers: Mapping[str, Sequence[TensorSpec]]) -> Opened:
    """A member as a state of adapters keeps it. `layers`: what it keeps of each tensor."""

    def has(layer: TensorSpec) -> bool:
        return kept.number in kept.shelf.columns(layer.name).models

    def one(layer: TensorSpec) -> Factors:
        if has(layer):
            return stacked(kept.shelf, layer.name, [kept.number]).factors(0)
        m, n = sides_of(layer.shape)
        return torch.zeros(m, 0, dtype=torch.float64), torch.zeros(n, 0, dtype=torch.float64)

    def factors(name: str) -> Sequence[Factors]:
        return [one(layer) for layer in layers[name]]

    return Opened([name for name, mine in layers.items() if any(has(layer) for layer in mine)], factors, None)


def _parts(flat: Tensor, pairs: Sequence[Factors]) -> Sequence[Tensor]:
    """A flat tensor in parts, one for each of the products of factors that it holds one after the other."""
    return torch.split(flat, [len(left) * len(right) for left, right in pairs])


def over(
    engine: Engine, members: Sequence[Member], look: Callable[[Member, Opened], T], stage: str, progress: Progress
) -> dict[str, T | Refuse]:
    """Opens several members at a time; returns by key what `look` finds in each, or the refusal where a member cannot
    be had. Raises Retry, and Abandoned when told to stop."""

    def one(member: Member) -> T | Refuse:
        engine.go_on(member.name)
        try:
            with opened(engine, member) as found:
                result = look(member, found)
                found.check_unchanged()
                return result
        except Refuse as refusal:
            return refusal

    found: dict[str, T | Refuse] = {}
    tasks = [Task(member.key, _need(engine, member), partial(one, member)) for member in members]
    progress(stage, 0, len(tasks))
    for key, result in engine.executor.map(tasks):
        found[key] = result
        progress(stage, len(found), len(tasks))
    return found


def _need(engine: Engine, member: Member) -> int:
    """Peak bytes of a pass over a member, one tensor after the other; for an adapter, with what its largest piece can
    take: the base's tensor, and products of its shape. What a state keeps of one are factors."""
    if member.kept is not None:
        return 8 * 2 * max(slot.nbytes for slots in engine.state.format.slots.values() for slot in slots.values())
    largest = max((spec.numel for spec in engine.base.specs), default=0) if member.form == "adapter" else 0
    return 4 * 4 * _run(engine) + 6 * 4 * largest


def _run(engine: Engine) -> int:
    """Elements of a run where gradients are."""
    return RUN if engine.device.type == "cpu" else _RUN_ON_DEVICE


def _dot(gradient: Tensor | None, left: Tensor, right: Tensor) -> float:
    """⟨G, left·rightᵀ⟩ in float64, some rows of G at a time."""
    if gradient is None:
        return 0.0
    left, right = left.to(gradient.device), right.to(gradient.device)
    rows = max(1, linalg.CHUNK // max(1, len(right)))
    matrix = gradient.view(len(left), len(right))
    return math.fsum(
        float((left[start : start + rows] * (matrix[start : start + rows].double() @ right)).sum())
        for start in range(0, len(left), rows)
    )
