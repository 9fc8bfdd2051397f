"""The merged model as a LoRA adapter in PEFT layout: every linear layer's and embedding's merged task vector, truncated
to one rank.

τ ≈ B·A with B = U_r√Σ_r and A = √Σ_rV_rᵀ of the SVD τ = UΣVᵀ: no other product of rank r is nearer in the Frobenius
norm (Eckart and Young 1936, "The approximation of one matrix by another of lower rank"). Layout and meaning of the
factors are those of Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", as PEFT writes them;
lora_alpha = r, so PEFT's scale is 1. All modules have the same rank: of a tensor whose own rank is smaller, the rest of
the factors is zeros (vLLM wants one rank).

What a plain LoRA cannot hold is left out by name, and counted in the error (adaptable.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from continual import linalg
from continual.engine.block_reading import BlockReading, CutModel
from continual.engine.explaining import shares_of
from continual.engine.reading import Reading
from continual.errors import Halt, Misconfigured
from continual.executors.contract import Executor, Progress, Task
from continual.lazily import Tensor, torch
from continual.publish.adaptable import Adapted, adaptable
from continual.publish.diffusion import FILES, LoraFormat, adaptable_in, header_of
from continual.publish.exported_weights import DTYPES
from continual.publish.finishing import finish
from continual.publish.folder import free, parse_dtype, written
from continual.publish.provenance import provenance_of
from continual.publish.weights import Placed, header, raw, write_at
from continual.records import ITEMSIZE, SCHEME, TensorSpec
from continual.signing.signer import Signer
from continual.state.format import BaseRecord
from continual.tensors import BaseModel
from continual.tensors.adapters.adapter_config import CONFIG
from continual.tensors.adapters.loras.targets import prefixes
from continual.tensors.checkpoints.place import RELEASE
from continual.tensors.names.renaming import family_of, is_known


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """What an adapter is to be: the `directory` to write, the `rank` of all its modules (None: as high as it takes to
    lose nothing, of a state of adapters), the `dtype` of its factors, a safetensors word or torch's, its `form`, the
    layout that it is written in, and the record `at` which it is read, by default the newest. `mark`, `signer`
    and `bom`: as of an export of the whole model."""

    directory: str | Path
    rank: int | None
    dtype: str = "F32"
    form: LoraFormat = "peft"
    at: int | None = None
    mark: str | None = None
    signer: Signer | None = None
    bom: bool = False

    @property
    def path(self) -> Path:
        """The directory to write."""
        return Path(self.directory)


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What an adapter holds of the merge: the `rank` of all its modules, how many are `adapted`, and the tensors
    that the merge changes and that it lacks (`left_out`).

    `error` is ‖τ − BA‖/‖τ‖ over the whole model, with BA = 0 for a tensor that is left out; `error_adapted` is that
    over the adapted tensors; `worst` names the adapted tensor with the largest error, and says how large it is. All are
    measured on the factors as they were written; an error is 0 where τ is 0. `nbytes` is the size of the weight file.
    `cut`: of which models a state of adapters has cut a part off before; no error counts that.
    """

    directory: Path
    rank: int
    adapted: int
    left_out: tuple[str, ...]
    error: float
    error_adapted: float
    worst: tuple[str, float]
    nbytes: int
    cut: tuple[CutModel, ...] = ()


class _Layout(NamedTuple):
    """What a weight file is to hold: the factors of these tensors, of this rank, in this safetensors word."""

    adapted: tuple[Adapted, ...]
    rank: int
    word: str
    said: Mapping[str, str] = MappingProxyType({})

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


class _Squares(NamedTuple):
    """‖τ‖² of a tensor, and ‖τ − BA‖²."""

    tau: float
    rest: float


def _check_one_part(base: BaseModel) -> None:
    """Raises Misconfigured where tensors of a model in several folders are merged that no adapter holds."""
    heads = tuple({part.prefix for part in base.checkpoint.parts} - {""})
    beside = next((spec.name for spec in base.specs if spec.kind != "carried" and spec.name.startswith(heads)), None)
    if heads and beside is not None:
        raise Misconfigured(
            f"{base.checkpoint.place}: {beside} lies in a folder of its own, which an adapter of PEFT cannot hold: "
            + ("write it with --format diffusers or kohya, or export" if prefixes(base) else "export")
            + " the full model, without --as-lora"
        )


def export(base: BaseModel, reading: Reading, target: LoraTarget, executor: Executor, progress: Progress) -> LoraReport:
    """Writes the merged model that `reading` reads as an adapter of `base` to the target's directory, which must not
    exist yet.

    The rank is lowered to the smaller side of the largest adapted tensor: no tensor has a larger one. Raises
    Misconfigured for a family whose names under transformers are not known, if the directory is there or cannot be
    made, for a rank below 1, where nothing is folded yet or where nothing can be adapted; Halt if a value overflows the
    dtype. Then nothing is left behind.
    """
    word = parse_dtype(target.dtype) or "F32"
    free(target.path)
    if target.rank is not None and target.rank < 1:
        raise Misconfigured(f"rank = {target.rank}: an adapter has at least rank 1")
    if reading.commit.generation is None or not reading.state.ledger.folds(at=reading.commit.seq):
        raise Misconfigured("nothing is folded yet, so the adapter would be empty: fold a model first")
    adapted = _adapted(base, target.form)
    if not adapted:
        raise Misconfigured(
            f"{base.checkpoint.place}: no tensor of it is a linear layer or an embedding that an adapter can adapt"
        )
    if isinstance(reading, BlockReading):
        adapted = tuple(one for one in adapted if reading.columns(one.spec)) or adapted[:1]
    rank = _rank(reading, adapted, target.rank)
    layout = _Layout(adapted, rank, word, header_of(base, target.form, rank))
    weights = FILES[target.form]
    with written(target.path, reading) as temporary:
        shares = shares_of(reading, executor)  # first: it finds the lengths that settling asks for
        factor = reading.settle(executor, progress)
        squares = _write_weights(base, reading, layout, temporary / weights, executor, progress)
        cut = reading.cut() if isinstance(reading, BlockReading) else ()
        report = _report(target.path.absolute(), layout, squares, (temporary / weights).stat().st_size, cut)
        if target.form == "peft":
            _write_json(temporary / CONFIG, _config(reading.state.format.base, layout))
        body = provenance_of(reading, factor, shares)
        told = {
            "rank": rank,
            "dtype": word,
            "format": target.form,
            "error": report.error,
            "error_adapted": report.error_adapted,
            "left_out": list(report.left_out),
        }
        marked = {} if target.mark is None else {"mark": target.mark}
        _write_json(temporary / RELEASE, body | marked | {"lora": told})
        finish(temporary, target, reading)
    return report


def _adapted(base: BaseModel, form: LoraFormat) -> tuple[Adapted, ...]:
    """What a file of this layout can hold of a base. Raises Misconfigured where it cannot be expressed."""
    if form != "peft":
        return adaptable_in(base, form)
    _check_one_part(base)
    if not is_known(base.checkpoint.config):
        family = family_of(base.checkpoint.config)
        raise Misconfigured(
            f"{base.checkpoint.place}: transformers loads a model of type {family} under other names than its files "
            "have, and they are not known here: export the full model, without --as-lora"
        )
    return adaptable(base)


def _rank(reading: Reading, adapted: Sequence[Adapted], wanted: int | None) -> int:
    """The rank of all modules: at most that of the largest of them. Raises Misconfigured where none is asked for, and
    the reading has none of its own."""
    if wanted is None and not (isinstance(reading, BlockReading) and reading.factored):
        raise Misconfigured(
            "rank: what is read has no rank of its own (it is a merge of whole tensors, or its rule looks at single "
            "elements); name the rank of the adapter"
        )
    largest = max(min(one.sides) for one in adapted)
    if isinstance(reading, BlockReading) and reading.factored:
        largest = max(1, *(min(reading.columns(one.spec), *one.sides) for one in adapted))
    return largest if wanted is None else min(wanted, largest)


def _thin_pair(reading: BlockReading, one: Adapted, rank: int, word: str) -> tuple[list[Tensor], _Squares]:
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
    return pair, _Squares(found.square + found.cut, found.cut + rounded)


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


def _write_weights(
    base: BaseModel, reading: Reading, layout: _Layout, file: Path, executor: Executor, progress: Progress
) -> dict[str, _Squares]:
    """Writes the factors of a layout into `file`, tensor by tensor and each at its own offset; returns the squares of
    every foldable tensor, by name. Raises Halt if a value overflows the dtype."""
    placed = layout.placed()
    head = header(placed, layout.said)
    starts = {p.name: len(head) + p.begin for p in placed}

    def adapt(one: Adapted, fd: int) -> _Squares:
        if isinstance(reading, BlockReading) and reading.factored:
            pair, squares = _thin_pair(reading, one, layout.rank, layout.word)
        else:
            tau = reading.vector(one.spec)
            matrix = tau.mT if one.transposed else tau.flatten(1)
            pair = [factor.to(DTYPES[layout.word]) for factor in factors(matrix, layout.rank)]
            squares = _Squares(linalg.inner(tau, tau), _rest_sq(matrix, *pair))
        if not all(bool(torch.isfinite(factor).all()) for factor in pair):
            raise Halt(
                f"tensor {one.spec.name}: its factors have values that {layout.word} cannot hold: "
                "export with dtype float32 or bfloat16"
            )
        for name, factor in zip(one.names(), pair, strict=True):
            write_at(fd, raw(factor), starts[name])
        if one.alpha is not None:
            write_at(fd, raw(torch.tensor(float(layout.rank), dtype=DTYPES[layout.word])), starts[one.alpha])
        return squares

    def measure(spec: TensorSpec) -> _Squares:
        if isinstance(reading, BlockReading) and not reading.columns(spec):
            return _Squares(0.0, 0.0)
        tau = reading.vector(spec)
        square = linalg.inner(tau, tau)
        return _Squares(square, square)

    by_name = {one.spec.name: one for one in layout.adapted}
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        write_at(fd, memoryview(head), 0)
        tasks: list[Task[_Squares]] = []
        for spec in base.specs:
            if spec.kind == "carried":
                continue
            found = by_name.get(spec.name)
            if found is None:
                tasks.append(Task(spec.name, reading.need(spec), partial(measure, spec)))
            else:
                tasks.append(Task(spec.name, _need(found, layout.rank, reading), partial(adapt, found, fd)))
        squares: dict[str, _Squares] = {}
        progress("export", 0, len(tasks))
        for done, (name, square) in enumerate(executor.map(tasks), 1):
            squares[name] = square
            progress("export", done, len(tasks))
    finally:
        os.close(fd)
    return squares


def _need(one: Adapted, rank: int, reading: Reading) -> int:
    """Peak bytes of a tensor: those of reading it, or those of τ beside its decomposition and the factors (in float64,
    as written, and one of them in float64 once more)."""
    m, n = one.sides
    if isinstance(reading, BlockReading) and reading.factored:
        return 8 * 4 * (reading.columns(one.spec) + rank) * (m + n)
    return max(reading.need(one.spec), 4 * one.spec.numel + linalg.workspace(m, n) + 20 * rank * (m + n))


def _report(
    directory: Path, layout: _Layout, squares: Mapping[str, _Squares], nbytes: int, cut: tuple[CutModel, ...]
) -> LoraReport:
    names = [one.spec.name for one in layout.adapted]
    errors = {name: _error([squares[name]]) for name in names}
    worst = max(names, key=lambda name: errors[name])
    return LoraReport(
        directory=directory,
        rank=layout.rank,
        adapted=len(names),
        left_out=tuple(sorted(name for name in squares.keys() - errors.keys() if squares[name].tau)),
        error=_error(squares.values()),
        error_adapted=_error(squares[name] for name in names),
        worst=(worst, errors[worst]),
        nbytes=nbytes,
        cut=cut,
    )


def _error(squares: Iterable[_Squares]) -> float:
    """‖τ − BA‖/‖τ‖ over some tensors; the sums are exact, so that their order does not matter."""
    found = list(squares)
    tau = math.fsum(s.tau for s in found)
    return math.sqrt(math.fsum(s.rest for s in found) / tau) if tau else 0.0


def _config(base: BaseRecord, layout: _Layout) -> dict[str, object]:
    """adapter_config.json. PEFT keeps one `fan_in_fan_out` for all layers, and corrects it where a layer is of the
    other kind."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": (base.repo or base.path).removeprefix(SCHEME),
        "revision": base.revision,
        "r": layout.rank,
        "lora_alpha": layout.rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": sorted(one.module for one in layout.adapted),
        "fan_in_fan_out": any(one.transposed and not one.embedding for one in layout.adapted),
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }


def _write_json(file: Path, body: Mapping[str, object]) -> None:
    file.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", "utf-8")
