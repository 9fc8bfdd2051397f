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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from continual.engine.block_reading import BlockReading, CutModel
from continual.engine.explaining import shares_of
from continual.engine.reading import Reading
from continual.errors import Misconfigured
from continual.executors.contract import Executor, Progress
from continual.publish.adaptable import Adapted, adaptable
from continual.publish.diffusion import FILES, LoraFormat, adaptable_in, header_of
from continual.publish.finishing import finish
from continual.publish.folder import free, parse_dtype, written
from continual.publish.lora_orders import FactorLayout, FactorSquares, write_factors
from continual.publish.provenance import provenance_of
from continual.records import SCHEME
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
    layout = FactorLayout(adapted, rank, word, header_of(base, target.form, rank))
    weights = FILES[target.form]
    with written(target.path, reading) as temporary:
        with reading.spooled(temporary, layout.nbytes, shared=executor.elsewhere is not None):
            shares = shares_of(reading, executor)  # first: it finds the lengths that settling asks for
            factor = reading.settle(executor, progress)
            squares = write_factors(reading, layout, temporary / weights, executor, progress)
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


def _report(
    directory: Path, layout: FactorLayout, squares: Mapping[str, FactorSquares], nbytes: int, cut: tuple[CutModel, ...]
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


def _error(squares: Iterable[FactorSquares]) -> float:
    """‖τ − BA‖/‖τ‖ over some tensors; the sums are exact, so that their order does not matter."""
    found = list(squares)
    tau = math.fsum(s.tau for s in found)
    return math.sqrt(math.fsum(s.rest for s in found) / tau) if tau else 0.0


def _config(base: BaseRecord, layout: FactorLayout) -> dict[str, object]:
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
