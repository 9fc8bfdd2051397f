"""An adapter folded into a state of adapters, by orders: what a process needs to fold some of its layers, and the
report of all of them. What is written of a layer, blocks.py says.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from continual.blocks import CHUNK, decomposing
from continual.engine.blocks import block_of, free_numbers, projection_of, put
from continual.engine.outcomes import FoldReport, OpenCandidate
from continual.engine.parts_of_repo import PartsOfRepo, PieceReads, parts_read
from continual.engine.report import mapped, seconds_of
from continual.engine.resources import AwayPlace, Resources, Workplace
from continual.engine.sent import SentSources, Sources
from continual.errors import Retry
from continual.executors.contract import Progress, Task
from continual.executors.device import pick_device
from continual.executors.orders import WorkJob, at_hand
from continual.gates import Gates, TensorNumbers
from continual.hub.marks import FilesRead
from continual.records import TensorSpec, Totals
from continual.rules import Sums, settle
from continual.state import State, Transaction
from continual.state.attempts import Attempt, Handed, Written
from continual.state.format import FoldCommit
from continual.state.parts import SketchText
from continual.state.writing import Writing
from continual.tensors import Adapter, BaseModel, Folder, LayerVectors, ThinVector, digest_of
from continual.tensors.vectors.sketch import Floats, Sketch, SketchPlan
from continual.tensors.vectors.thin import sides_of


class _Tensor(NamedTuple):
    """What folding one tensor gave: the digest of what its task vector was made from, ‖τ‖², what the cut took of it and
    of others, whether it was read as thin factors, bytes read, wall time by stage, and the projection of its task
    vector, for the sketch. `written` and `read` are as a `TensorFold` has them."""

    digest: bytes
    energy: float
    lost: float
    others: dict[int, float]
    thin: bool
    nbytes: int
    seconds: dict[str, float]
    projection: Floats
    written: Written | None = None
    read: FilesRead | None = None


class BlockTerms(NamedTuple):
    """How an adapter is folded: its name in messages, its number in the state, the width of that, how wide the
    projections of its sketch are."""

    name: str
    number: int
    width: int
    sketched: int


@dataclass(frozen=True)
class BlockJob(WorkJob[_Tensor]):
    """The fold of an adapter; `handed` is None where it can be done in this process alone."""

    sources: SentSources
    terms: BlockTerms
    gates: Gates
    device: str
    handed: Handed | None

    def open(self) -> AwayBlocks:
        """Opens the adapter, and the base where it is read."""
        return AwayBlocks(self)


class BlockFolding:
    """Folds tensors of one adapter into `writing`. Thread-safe. The gates are asked of each layer. Where
    continual is stopping, the layer that comes next raises Abandoned."""

    def __init__(
        self, writing: Writing, vectors: LayerVectors, base: BaseModel, terms: BlockTerms, at: tuple[Gates, Workplace]
    ) -> None:
        self._writing = writing
        self._vectors = vectors
        self._specs = {spec.name: spec for spec in base.specs}
        self._terms = terms
        self._gates, self._workplace = at

    def work(self, names: Sequence[str]) -> list[_Tensor]:
        """Folds tensors, one after the other. Raises Refuse, Retry, Abandoned."""
        return [self.fold(name) for name in names]

    def close(self) -> None:
        """Nothing: who opened the files closes them."""

    def fold(self, tensor: str) -> _Tensor:
        """One layer, or one after the other of a stack."""
        name, number, width, sketched = self._terms
        spec, projected = self._specs[tensor], np.zeros(sketched)
        found = _Tensor(b"", 0.0, 0.0, {}, True, 0, {"read": 0.0, "rule": 0.0, "write": 0.0}, projected)
        started, vectors = time.perf_counter(), self._vectors.read(spec)
        for layer, vector in zip(spec.layers, vectors, strict=True):
            self._workplace.go_on(name)
            read = time.perf_counter()
            block = block_of(vector, layer, width, self._workplace.device)
            self._gates.at_tensor(TensorNumbers(name, layer.name, block.energy))
            projected += projection_of(block, layer.name, sketched)
            computed = time.perf_counter()
            cut = put(self._writing, layer.name, number, block)
            ended = time.perf_counter()
            for stage, seconds in (("read", read - started), ("rule", computed - read), ("write", ended - computed)):
                found.seconds[stage] += seconds
            started = ended
            for other, square in cut.others.items():
                found.others[other] = found.others.get(other, 0.0) + square
            found = _Tensor(
                vector.digest,
                found.energy + block.energy,
                found.lost + cut.own,
                found.others,
                isinstance(vector, ThinVector),
                found.nbytes + vector.nbytes,
                found.seconds,
                projected,
            )
        return found


class AwayBlocks:
    """Folds tensors of an adapter for another process, whose transaction takes what was written."""

    def __init__(self, job: BlockJob) -> None:
        assert job.handed is not None, "a fold that no other process may write into"
        self._job, self._handed, self._before = job, job.handed, job.handed.generation()
        self._at = job.gates, AwayPlace(pick_device(job.device))
        self._sources = job.sources.open()
        try:
            self._vectors = _vectors(self._sources)
        except BaseException:
            self.close()
            raise

    def work(self, names: Sequence[str]) -> list[_Tensor]:
        """Folds tensors into an attempt of its own, which is on disk when it returns. Raises Refuse, Retry, Halt."""
        attempt, found = Attempt(self._handed, self._before), []
        self._vectors.begin(names)
        folding = BlockFolding(attempt, self._vectors, self._sources.base, self._job.terms, self._at)
        for name in names:
            found.append(folding.fold(name)._replace(written=attempt.taken()))
        found[-1] = found[-1]._replace(read=parts_read(self._sources.model.place))
        attempt.sync()
        return found

    def close(self) -> None:
        """Closes the files."""
        self._sources.close()


class BlockOrders:
    """One adapter, folded in one transaction as a further adapter of the state, by orders."""

    def __init__(
        self, base: BaseModel, transaction: Transaction, opened: OpenCandidate, gates: Gates, resources: Resources
    ) -> None:
        self._base = base
        self._transaction = transaction
        self._opened = opened
        self._gates = gates
        self._resources = resources
        self._plan = SketchPlan.of(base.specs)

    def run(self, state: State, before: Totals, progress: Progress) -> FoldReport:
        """Puts every layer of the adapter beside what `state` has, as many columns in all as its width says; the report
        of it. Raises Refuse, Retry, Abandoned."""
        assert state.format.form is not None
        opened, executor = self._opened, self._resources.executor
        sources = Sources(state.format, self._base, opened.model, opened.lineage, None, opened.weights)
        vectors = _vectors(sources)
        width = state.format.form.width
        terms = BlockTerms(opened.candidate.name, free_numbers(state, 1)[0], width, self._plan.width)
        changed = set(opened.lineage.folded)
        specs = [spec for spec in self._base.specs if spec.kind != "carried"]
        mine = sorted((s for s in specs if s.name in changed), key=lambda s: vectors.position(s.name))
        handed = self._transaction.hand_out() if executor.elsewhere else None
        device = self._resources.device_elsewhere
        parts = _shared(sources, vectors, mine)
        if executor.elsewhere:
            parts.begin(executor.workers)
        job = BlockJob(secrets.token_hex(8), sources.sent(whole=parts.whole), terms, self._gates, device, handed)
        folding = BlockFolding(self._transaction, vectors, self._base, terms, (self._gates, self._resources))
        found: dict[str, _Tensor] = {}
        progress("fold", 0, len(mine))
        tasks: list[Task[_Tensor]] = []
        for spec in mine:
            piece = parts.piece(job, spec.name)
            tasks.append(Task(spec.name, need(vectors, spec, width), piece, reads=vectors.nbytes(spec.name)))
        with at_hand(job, folding):
            for name, tensor in parts.map(executor, tasks):
                if tensor.written is not None:
                    self._transaction.take_over(tensor.written)
                found[name] = tensor
                progress("fold", len(found), len(mine))
        if lacking := {spec.name for spec in mine} - found.keys():
            raise Retry(f"{terms.name}: {min(lacking)} was not folded; nothing was settled")
        for spec in specs:
            for layer in spec.layers if spec.name not in changed else ():
                self._transaction.keep(layer.name)
        opened.model.check_unchanged()
        if opened.weights is not None and isinstance(opened.weights.checkpoint.place, Folder):
            opened.weights.checkpoint.check_unchanged()  # a commit of the Hub does not change
        return self._report(terms.number, before, found, state.ledger.folds())

    def _report(
        self, number: int, before: Totals, found: dict[str, _Tensor], folds: Sequence[FoldCommit]
    ) -> FoldReport:
        opened, lineage = self._opened, self._opened.lineage
        layers = [found[name] for name in sorted(found)]
        tau_sq = math.fsum(layer.energy for layer in layers)
        lost = math.fsum(layer.lost for layer in layers)
        others = {
            fold.entry.candidate.name: math.fsum(squares) / (fold.entry.numbers.tau_norm**2 or 1.0)
            for fold in folds
            if (squares := [layer.others.get(fold.entry.numbers.block or 0, 0.0) for layer in layers]) and any(squares)
        }
        sketch = Sketch.of(
            self._plan,
            {name: layer.energy for name, layer in found.items()},
            {name: layer.projection for name, layer in found.items()},
        )
        numbers = replace(
            mapped(lineage, math.sqrt(tau_sq)),
            weight=opened.weight,
            block=number,
            cut=lost / tau_sq if tau_sq else 0.0,
            sketch=SketchText(sketch.norms, sketch.text),
        )
        return FoldReport(
            candidate=opened.candidate,
            digest=digest_of({name: layer.digest for name, layer in found.items()}),
            lineage=lineage,
            totals=settle(before, Sums(tau_sq), opened.weight),
            numbers=numbers,
            seconds=seconds_of(layer.seconds for layer in layers),
            bytes_read=sum(layer.nbytes for layer in layers),
            device=str(self._resources.device),
            cut=math.fsum(layer.lost for layer in layers if not layer.thin) / tau_sq if tau_sq else 0.0,
            others=others,
            sketch=sketch,
            warnings=opened.warnings,
        )


def _vectors(sources: Sources) -> LayerVectors:
    assert isinstance(sources.model, Adapter), "the gate on the form lets nothing else in"
    found = LayerVectors(sources.base, sources.model, sources.lineage, sources.weights)
    found.begin()
    return found


def _shared(sources: Sources, vectors: LayerVectors, specs: Sequence[TensorSpec]) -> PartsOfRepo:
    """The adapter as several processes read it."""
    weights = [file.name for file in sources.model.files if file.name.endswith(".safetensors")]
    pieces = {spec.name: PieceReads(vectors.extents(spec.name), vectors.nbytes(spec.name)) for spec in specs}
    return PartsOfRepo(sources.model.place, weights, pieces, full=False)


def need(vectors: LayerVectors, spec: TensorSpec, width: int) -> int:
    """Peak bytes of folding a layer: of thin factors these in float64 three times over, and as many float32 rows as are
    kept; of a matrix what it takes to read and to decompose it."""
    m, n = sides_of(spec.layers[0].shape)
    rows = 8 * (m + n) * CHUNK
    if vectors.is_thin(spec.name):
        return 14 * vectors.nbytes(spec.name) + rows
    return vectors.workspace(spec.name) + decomposing(*vectors.sides(spec.name), width) + rows
