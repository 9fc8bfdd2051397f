"""The merged model as a LoRA adapter in PEFT layout: every linear layer's and embedding's merged task vector, truncated
to one rank.

τ ≈ B·A with B = U_r√Σ_r and A = √Σ_rV_rᵀ of the SVD τ = UΣVᵀ: no other product of rank r is nearer in the Frobenius
norm (Eckart and Young 1936, "The approximation of one matrix by another of lower rank"). Layout and meaning of the
factors are those of Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", as PEFT writes them;
lora_alpha = r, so PEFT's scale is 1. All modules have the same rank: of a tensor whose own rank is smaller, the rest of
the factors is zeros (vLLM wants one rank).

What a plain LoRA cannot hold is left out by name, and counted in the error: norms, biases, convolutions, anything that
is not 2-D; position tables of classes of their own, whose forward is no look-up; weights that torch reads past a
wrapper (nn.MultiheadAttention); experts and their routers, which transformers 5 keeps in 3-D tensors; an embed_out
that is not loaded as lm_head, as GPT-NeoX's is; and a table that is tied to the output head. Of that PEFT would adapt
the embedding alone and leave the head at the base; wrapping both by the same product gives the right logits, but then
PEFT's merge_and_unload adds it twice to the one shared weight. A silent doubling is worse than an error that is told.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from continual import linalg
from continual.engine.reading import Reading
from continual.errors import Halt, Misconfigured
from continual.executors.contract import Executor, Progress, Task
from continual.publish.folder import DTYPES, free, parse_dtype, provenance_of, written
from continual.publish.weights import Placed, header, raw, write_at
from continual.records import ITEMSIZE, SCHEME, TensorSpec
from continual.state.format import BaseRecord
from continual.tensors import BaseModel
from continual.tensors.adapter import WEIGHTS
from continual.tensors.adapter_config import CONFIG
from continual.tensors.kinds import is_vocabulary, kind_of
from continual.tensors.matching import CONV1D
from continual.tensors.place import RELEASE
from continual.tensors.renaming import family_of, is_known, loaded

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_in|tok_embeddings|tokens_embed|positions_embed|wte|wpe|shared|word_embeddings?"
    r"|token_embedding|position_embeddings?|token_type_embeddings|relative_attention_bias|embeddings|embedding_table)"
    r"\.weight$"
)
"""Tables that are nn.Embedding, or scale its output as PEFT knows to: a look-up by ids, and nothing else in their
forward."""
_HEAD = re.compile(
    r"(^|\.)(classifier|score|qa_outputs|heads?|pre_classifier|vocab_transform|logits_proj|text_projection"
    r"|visual_projection|seq_relationship)\.|^fc\."
)
"""Heads that the rules treat as plain tensors, and that are nn.Linear all the same."""
_ROUTER = re.compile(r"\.router(\.layer)?\.weight$")
"""Routers of experts that are no nn.Linear once they are loaded."""
_STATE_SPACE = frozenset(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"))
"""`model_type`s of which PEFT refuses `out_proj` and `conv1d`, which their kernels read past the module."""
_OF_EXPERTS = frozenset(("gate_proj", "up_proj", "down_proj"))
"""Layers that PEFT takes for the packed experts', by their names, in the families `_MIXED`: dense ones beside them
cannot be adapted there."""
_MIXED = frozenset(
    """afmoe bailing_hybrid cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo
    glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe hy_v3 longcat_flash mimo_v2_flash olmoe qwen3_5_moe_text
    qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open""".split()
)
_INNER = {"gpt2": "transformer.", "bloom": "transformer.", "opt": "model."}
"""Where a model with a head has its inner model, of families whose published files often are the inner model's alone
and are loaded with a head."""


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """What an adapter is to be: the `directory` to write, the `rank` of all its modules, and the `dtype` of its
    factors, a safetensors word or torch's."""

    directory: Path
    rank: int
    dtype: str = "F32"


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What an adapter holds of the merge: the `rank` of all its modules, how many are `adapted`, and the foldable
    tensors that it lacks (`left_out`).

    `error` is ‖τ − BA‖/‖τ‖ over the whole model, with BA = 0 for a tensor that is left out; `error_adapted` is that
    over the adapted tensors; `worst` names the adapted tensor with the largest error, and says how large it is. All are
    measured on the factors as they were written; an error is 0 where τ is 0. `nbytes` is the size of the weight file.
    """

    directory: Path
    rank: int
    adapted: int
    left_out: tuple[str, ...]
    error: float
    error_adapted: float
    worst: tuple[str, float]
    nbytes: int


class Adapted(NamedTuple):
    """A tensor that an adapter can adapt, and the module that has it. `transposed`: whether B·A is the transpose of the
    weight, as PEFT has it for embeddings and Conv1D."""

    spec: TensorSpec
    module: str
    embedding: bool
    transposed: bool

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of B·A."""
        rows, columns = self.spec.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def names(self) -> tuple[str, str]:
        """What A and B are called in the file."""
        of = "lora_embedding_{}" if self.embedding else "lora_{}.weight"
        return f"base_model.model.{self.module}.{of.format('A')}", f"base_model.model.{self.module}.{of.format('B')}"


class _Layout(NamedTuple):
    """What a weight file is to hold: the factors of these tensors, of this rank, in this safetensors word."""

    adapted: tuple[Adapted, ...]
    rank: int
    word: str

    def placed(self) -> list[Placed]:
        """Where each factor lies, A before B, tensor by tensor."""
        found: list[Placed] = []
        end = 0
        for one in self.adapted:
            rows, columns = one.sides
            for name, shape in zip(one.names(), ((self.rank, columns), (rows, self.rank)), strict=True):
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
            f"{base.checkpoint.place}: {beside} lies in a folder of its own, which an adapter cannot hold: export the "
            "full model, without --as-lora"
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
    free(target.directory)
    if target.rank < 1:
        raise Misconfigured(f"rank = {target.rank}: an adapter has at least rank 1")
    if reading.commit.generation is None or not reading.state.ledger.folds(at=reading.commit.seq):
        raise Misconfigured("nothing is folded yet, so the adapter would be empty: fold a model first")
    _check_one_part(base)
    if not is_known(base.checkpoint.config):
        family = family_of(base.checkpoint.config)
        raise Misconfigured(
            f"{base.checkpoint.place}: transformers loads a model of type {family} under other names than its files "
            "have, and they are not known here: export the full model, without --as-lora"
        )
    adapted = adaptable(base)
    if not adapted:
        raise Misconfigured(
            f"{base.checkpoint.place}: no tensor of it is a linear layer or an embedding that an adapter can adapt"
        )
    rank = min(target.rank, max(min(one.spec.shape) for one in adapted))
    layout = _Layout(adapted, rank, word)
    with written(target.directory, reading) as temporary:
        factor = reading.settle(executor, progress)
        squares = _write_weights(base, reading, layout, temporary / WEIGHTS, executor, progress)
        report = _report(target.directory.absolute(), layout, squares, (temporary / WEIGHTS).stat().st_size)
        _write_json(temporary / CONFIG, _config(reading.state.format.base, layout))
        body = provenance_of(reading.state, reading.commit.seq, reading.options.to_mapping() | {"factor": factor})
        told = {
            "rank": rank,
            "dtype": word,
            "error": report.error,
            "error_adapted": report.error_adapted,
            "left_out": list(report.left_out),
        }
        _write_json(temporary / RELEASE, body | {"lora": told})
    return report


def adaptable(base: BaseModel) -> tuple[Adapted, ...]:
    """The tensors of a base that PEFT can adapt as nn.Linear, Conv1D or nn.Embedding, in name order. From names and
    shapes alone. Modules are called what transformers 5 calls them in the loaded model.
    """
    config = base.checkpoint.config
    present = {spec.name for spec in base.specs}
    tied = set(base.aliases.values())
    conv1d = CONV1D.get(family_of(config), frozenset())
    blocks = {name.partition(".experts.")[0] for name in present if ".experts." in name}
    routers = {f"{block}.{word}.weight" for block in blocks for word in ("gate", "router")}
    mixed = family_of(config) in _MIXED
    inner = _inner(base, present)
    found = []
    for spec in base.specs:
        name = spec.name
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        if len(spec.shape) != 2 or not spec.numel or spec.kind == "carried" or name in tied:
            continue
        module = loaded(inner + name, config)
        if not module.endswith(".weight") or not name.endswith(".weight"):
            continue
        if (
            ".experts." in name
            or name in routers
            or _ROUTER.search(name)
            or (own == "out_proj" and family_of(config) in _STATE_SPACE)
            or (own in _OF_EXPERTS and mixed)
            or module.endswith("embed_out.weight")
            or (own == "out_proj" and f"{parent}.in_proj_weight" in present)
        ):
            continue
        embedding = _EMBEDDING.search(name) is not None
        # by the name alone: what the user's globs made plain is a linear layer as before
        if embedding or is_vocabulary(name) or _HEAD.search(name) or kind_of(name, spec.shape, spec.dtype) == "matrix":
            found.append(Adapted(spec, module.removesuffix(".weight"), embedding, embedding or own in conv1d))
    return tuple(found)


def _inner(base: BaseModel, present: Iterable[str]) -> str:
    """What the loaded model's module names have in front of the names in the files: empty but for the files of an inner
    model loaded with a head."""
    config = base.checkpoint.config
    inner = _INNER.get(str(config.get("model_type")), "")
    listed = config.get("architectures")
    architecture = str(listed[0]) if isinstance(listed, list) and listed else ""
    bare = not architecture or re.search(r"(?<!LMHead)(?<!DoubleHeads)Model$", architecture)
    return "" if bare or any(name.startswith(inner) for name in present) else inner


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
    head = header(placed)
    starts = {p.name: len(head) + p.begin for p in placed}

    def adapt(one: Adapted, fd: int) -> _Squares:
        tau = reading.vector(one.spec)
        matrix = tau.mT if one.transposed else tau
        pair = [factor.to(DTYPES[layout.word]) for factor in factors(matrix, layout.rank)]
        if not all(bool(torch.isfinite(factor).all()) for factor in pair):
            raise Halt(
                f"tensor {one.spec.name}: its factors have values that {layout.word} cannot hold: "
                "export with dtype float32 or bfloat16"
            )
        for name, factor in zip(one.names(), pair, strict=True):
            write_at(fd, raw(factor), starts[name])
        return _Squares(linalg.inner(tau, tau), _rest_sq(matrix, *pair))

    def measure(spec: TensorSpec) -> _Squares:
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
    m, n = one.spec.shape
    return max(reading.need(one.spec), 4 * one.spec.numel + linalg.workspace(m, n) + 20 * rank * (m + n))


def _report(directory: Path, layout: _Layout, squares: Mapping[str, _Squares], nbytes: int) -> LoraReport:
    names = [one.spec.name for one in layout.adapted]
    errors = {name: _error([squares[name]]) for name in names}
    worst = max(names, key=lambda name: errors[name])
    return LoraReport(
        directory=directory,
        rank=layout.rank,
        adapted=len(names),
        left_out=tuple(sorted(squares.keys() - errors.keys())),
        error=_error(squares.values()),
        error_adapted=_error(squares[name] for name in names),
        worst=(worst, errors[worst]),
        nbytes=nbytes,
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
