"""The factors of an adapter that is made of a merge, by orders: what a process needs to make those of some tensors and
to write them, each to its own bytes of a file that is there.

τ ≈ B·A with B = U_r√Σ_r and A = √Σ_rV_rᵀ of the SVD τ = UΣVᵀ (lora.py says of whom that is).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from continual import linalg
from continual.engine.block_reading import BlockReading
from continual.engine.reading import Reading
from continual.engine.reading_orders import sent_to
from continual.errors import Halt
from continual.executors.contract import Executor, Progress, Task
from continual.lazily import Tensor, torch
from continual.publish.adaptable import Adapted
from continual.publish.export_orders import WritingJob, kept_of, must_see, synced_files, written_by
from continual.publish.exported_weights import DTYPES
from continual.publish.weights import FileSpan, Placed, SpanEnds, SpanFiles, new_file, raw
from continual.records import ITEMSIZE, TensorSpec


class FactorLayout(NamedTuple):
    """What a weight file is to hold: the factors of these tensors, of this rank, in this safetensors word."""

    adapted: tuple[Adapted, ...]
    rank: int
    word: str
    said: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return max((one.end for one in self.placed()), default=0)

    def placed(self) -> list[Placed]:
        """Where each factor lies, A before B, tensor by tensor."""
        found: list[Placed] = []
        end = 0
        for one in self.adapted:
            named = [*zip(one.names(), one.shapes(self.rank), strict=True)]
            if one.alpha is not None:
                named.append((one.alpha, ()))
            for name, shape in named:
                begin = end
                end += math.prod(shape) * ITEMSIZE[self.word]
                found.append(Placed(name, one.spec.name, self.word, shape, begin, end))
        return found


class FactorSquares(NamedTuple):
    """‖τ‖² of a tensor, and ‖τ − BA‖²."""

    tau: float
    rest: float


class TensorFactored(NamedTuple):
    """What became of a tensor: its squares, and what was written of it."""

    squares: FactorSquares
    ends: tuple[SpanEnds, ...] = ()


@dataclass(frozen=True)
class LoraJob(WritingJob[TensorFactored]):
    """The factors of a layout, each into one of `spans`, by its name."""

    layout: FactorLayout
    spans: Mapping[str, FileSpan]

    def open(self) -> AwayFactoring:
        """Opens the state."""
        return AwayFactoring(self)


class Factoring:
    """Makes factors of tensors, and writes them. Thread-safe."""

    def __init__(self, reading: Reading, layout: FactorLayout, spans: Mapping[str, FileSpan], files: SpanFiles) -> None:
        self._reading, self._layout = reading, layout
        self._spans, self._files = spans, files
        self._specs = {spec.name: spec for spec in reading.state.format.tensors}
        self._adapted = {one.spec.name: one for one in layout.adapted}

    def write(self, name: str) -> TensorFactored:
        """The factors of one tensor; of one that is left out only its square. Raises Halt naming it where the dtype
        cannot hold them, Retry, Damaged, OSError."""
        one = self._adapted.get(name)
        if one is None:
            return TensorFactored(self._left_out(self._specs[name]))
        word, rank = self._layout.word, self._layout.rank
        pair, squares = self._pair(one)
        if not all(bool(torch.isfinite(factor).all()) for factor in pair):
            raise Halt(
                f"tensor {name}: its factors have values that {word} cannot hold: export with dtype float32 or bfloat16"
            )
        values = dict(zip(one.names(), pair, strict=True))
        if one.alpha is not None:
            values[one.alpha] = torch.tensor(float(rank), dtype=DTYPES[word])
        ends = []
        for key, value in values.items():
            into = self._files.writer(self._spans[key])
            into.write(raw(value))
            ends.append(into.ends)
        return TensorFactored(squares, tuple(ends))

    def _pair(self, one: Adapted) -> tuple[list[Tensor], FactorSquares]:
        reading, layout = self._reading, self._layout
        if isinstance(reading, BlockReading) and reading.factored:
            return _thin_pair(reading, one, layout.rank, layout.word)
        tau = reading.vector(one.spec)
        matrix = tau.mT if one.transposed else tau.flatten(1)
        pair = [factor.to(DTYPES[layout.word]) for factor in factors(matrix, layout.rank)]
        return pair, FactorSquares(linalg.inner(tau, tau), _rest_sq(matrix, *pair))

    def _left_out(self, spec: TensorSpec) -> FactorSquares:
        reading = self._reading
        if isinstance(reading, BlockReading) and not reading.columns(spec):
            return FactorSquares(0.0, 0.0)
        tau = reading.vector(spec)
        square = linalg.inner(tau, tau)
        return FactorSquares(square, square)


class AwayFactoring:
    """Makes and writes factors for another process."""

    def __init__(self, job: LoraJob) -> None:
        must_see(job.directory)
        self._job, self._reading = job, job.reading.open()

    def work(self, names: Sequence[str]) -> list[TensorFactored]:
        """Writes factors, which are on disk when it returns. Raises as `Factoring.write`."""
        with synced_files(self._job.directory) as files:
            found = Factoring(self._reading, self._job.layout, self._job.spans, files)
            return [found.write(name) for name in names]

    def close(self) -> None:
        """Closes the state."""
        self._reading.state.close()


def write_factors(
    reading: Reading, layout: FactorLayout, file: Path, executor: Executor, progress: Progress
) -> dict[str, FactorSquares]:
    """Writes the factors of a layout into the new `file`; returns the squares of every foldable tensor, by name.
    `reading` is settled. Raises Halt if a value overflows the dtype, Misconfigured where workers cannot write it."""
    placed, directory = layout.placed(), file.parent
    spans = dict(zip((p.name for p in placed), new_file(directory, file.name, placed, layout.said), strict=True))
    sent, job = sent_to(reading, executor), None
    if sent is not None:
        job = LoraJob(secrets.token_hex(8), sent, directory, layout, spans)
    with closing(SpanFiles(directory)) as files:
        write = Factoring(reading, layout, spans, files).write
        adapted = {one.spec.name: one for one in layout.adapted}
        tasks = []
        for spec in reading.state.format.tensors:
            if spec.kind != "carried":
                one = adapted.get(spec.name)
                takes = reading.need(spec) if one is None else _need(one, layout.rank, reading)
                tasks.append(Task(spec.name, takes, partial(write, spec.name), reads=kept_of(reading, spec)))
        return {name: one.squares for name, one in written_by(tasks, job, executor, progress)}


def _thin_pair(reading: BlockReading, one: Adapted, rank: int, word: str) -> tuple[list[Tensor], FactorSquares]:
    """A and B of a tensor from the factors that a state of adapters reads as, of this rank and in this dtype; ‖τ‖², and
    ‖τ − BA‖² of these. The m×n tensor is not made."""
    found = reading.thin(one.spec, rank)
    left, right = (found.right, found.left) if one.transposed else (found.left, found.right)
    a, b = left.new_zeros(rank, len(right)), left.new_zeros(len(left), rank)
    a[: right.shape[1]], b[:, : left.shape[1]] = right.mT, left
    pair = [factor.to(DTYPES[word]) for factor in (a, b)]
    written, kept = [factor.double() for factor in pair], (left.double(), right.double())
    rows, columns = torch.cat([kept[0], -written[1]], 1), torch.cat([kept[1], written[0].mT], 1)
    rounded = max(0.0, float(((rows.mT @ rows) * (columns.mT @ columns)).sum()))
    return pair, FactorSquares(found.square + found.cut, found.cut + rounded)


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = √Σ_rV_rᵀ (rank×n) and B = U_r√Σ_r (m×rank) of an m×n matrix, both float64: the best product of this rank.
    Beyond the matrix's own rank, the rows of A and the columns of B are zeros.

    V and Σ come from the float64 Gram of the small side, and U = matrix·V/Σ. So B·A is matrix·V_rV_rᵀ whatever σ was
    found: an error of σ only moves length from one factor to the other. A Gram tells the directions of singular values
    below STEEP·σ₁ apart less well; if they are mistaken, that costs less than 1e-8 of ‖matrix‖².
    """
    m, n = matrix.shape
    rows = linalg.tall(matrix)
    small = rows.new_zeros(rank, min(m, n), dtype=torch.float64)
    large = rows.new_zeros(max(m, n), rank, dtype=torch.float64)
    if bool(matrix.any()):
        sigma, v = linalg.right_singular(rows)
        k = min(rank, int((sigma > 0).sum()))
        root = sigma[:k].sqrt()
        v = v[:, :k]
        small[:k] = (v * root).mT
        v = v / root
        for block in linalg.row_blocks(*rows.shape):
            large[block, :k] = rows[block].double() @ v
    return (small, large) if m >= n else (large.mT, small.mT)


def _rest_sq(matrix: Tensor, a: Tensor, b: Tensor) -> float:
    """‖matrix − B·A‖² in float64, by blocks of rows of the long side."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix, a, b = matrix.mT, b.mT, a.mT
    wide = a.double()
    blocks = linalg.row_blocks(*matrix.shape)
    return math.fsum(float((matrix[block].double() - b[block].double() @ wide).square_().sum()) for block in blocks)


def _need(one: Adapted, rank: int, reading: Reading) -> int:
    """Peak bytes of a tensor: those of reading it, or those of τ beside its decomposition and the factors (in float64,
    as written, and one of them in float64 once more)."""
    m, n = one.sides
    if isinstance(reading, BlockReading) and reading.factored:
        return 8 * 4 * (reading.columns(one.spec) + rank) * (m + n)
    return max(reading.need(one.spec), 4 * one.spec.numel + linalg.workspace(m, n) + 20 * rank * (m + n))
