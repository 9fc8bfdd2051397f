"""A LoRA adapter in PEFT layout as a fine-tune: its task vector is scale·B·A, one tensor at a time.

Hu et al. 2022, "LoRA"; rsLoRA scaling by Kalajdzievski 2023. Layout and configuration are those of PEFT's `LoraConfig`. The configuration is an
allow-list: a key that is not understood and has a value other than its default is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from continual.errors import Refuse
from continual.records import FileStat
from continual.tensors.checkpoint import FLOATS, Checkpoint, open_checkpoint, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INFORMATION = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_version peft_type target_modules exclude_modules lora_dropout "
    "layers_to_transform layers_pattern runtime_config megatron_core qalora_group_size".split()
)
_UNDERSTOOD = frozenset("r lora_alpha use_rslora rank_pattern alpha_pattern fan_in_fan_out modules_to_save bias init_lora_weights".split())
_HARMLESS_INIT: tuple[Any, ...] = (True, False, None, "gaussian")
_KEY = re.compile(r"^(?P<module>.+)\.(?:lora_(?P<factor>[AB])(?:\.\w+)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.\w+)?)$")
_ROOT = "base_model.model."
_LONGEST_PATTERN = 200


class Factors(NamedTuple):
    """The factors of one module's task vector: tensor names in the adapter's file, rank and scale."""

    a: str
    b: str
    rank: int
    scale: float
    embedding: bool


class Adapter:
    """An adapter's file, open for reading; a context manager. `factors`: weight name (without PEFT's prefix) to its factors; `saved`: weight name to the
    tensor that replaces it (modules_to_save)."""

    def __init__(self, path: Path, root: Path | None) -> None:
        """Opens the adapter in directory `path`. Raises Refuse for a configuration or tensors that are not understood."""
        self.path = path
        self.config = read_json(path / CONFIG, root)
        check_config(path, self.config)
        self.weights: Checkpoint = open_checkpoint(path / WEIGHTS, root)
        try:
            self.factors, self.saved = _sort(path, self.weights, self.config)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self.weights.close()

    @property
    def files(self) -> tuple[FileStat, ...]:
        return self.weights.files

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return self.weights.nbytes

    @property
    def transposed(self) -> bool:
        """Whether the base stores these weights as in × out."""
        return bool(self.config.get("fan_in_fan_out"))

    def check_unchanged(self) -> None:
        """Raises Retry if the file changed since it was opened."""
        self.weights.check_unchanged()

    def shape(self, weight: str) -> tuple[int, int]:
        """Rows and columns of the task vector, a convolution flattened to 2-D."""
        f = self.factors[weight]
        a, b = self.weights.tensors[f.a].shape, self.weights.tensors[f.b].shape
        rows, columns = b[0], math.prod(a[1:])
        return (columns, rows) if f.embedding or self.transposed else (rows, columns)

    def product(self, weight: str) -> torch.Tensor:
        """scale·B·A of one weight, float32, of shape `shape(weight)`."""
        f = self.factors[weight]
        a = self.weights.read(f.a).float().reshape(f.rank, -1)
        b = self.weights.read(f.b).float().reshape(-1, f.rank)
        product = torch.mm(a.T, b.T) if f.embedding or self.transposed else torch.mm(b, a)
        return product.mul_(f.scale)


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raises Refuse naming the first key that makes this more than a plain LoRA adapter."""
    if config.get("peft_type") != "LORA":
        raise Refuse("adapter-kind", f"{path}: adapter of kind {config.get('peft_type')!r}: only LORA is understood")
    if config.get("init_lora_weights", True) not in _HARMLESS_INIT:
        raise Refuse(
            "adapter-kind", f"{path}: init_lora_weights = {config['init_lora_weights']!r} changes the base, so B·A alone is not the task vector; merge it first"
        )
    if config.get("bias", "none") != "none":
        raise Refuse("adapter-kind", f"{path}: bias = {config['bias']!r} is not understood; merge the adapter into its base first")
    for key, value in config.items():
        if key not in _INFORMATION and key not in _UNDERSTOOD and value not in (None, False, {}, [], ""):
            raise Refuse("adapter-kind", f"{path}: {key} = {value!r} is not understood; merge the adapter into its base first")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or isinstance(config[key], bool) or not 0 < config[key] < math.inf:
            raise Refuse("config", f"{path / CONFIG}: {key} = {config.get(key)!r} is no positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        body = config.get(key) or {}
        if not isinstance(body, dict) or any(not isinstance(v, (int, float)) or len(k) > _LONGEST_PATTERN for k, v in body.items()):
            raise Refuse("config", f"{path / CONFIG}: {key} must map short patterns to numbers")


def _sort(path: Path, weights: Checkpoint, config: Mapping[str, Any]) -> tuple[dict[str, Factors], dict[str, str]]:
    """What each tensor of the file is for."""
    halves: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    embeddings = set()
    for name, info in weights.tensors.items():
        if info.dtype not in FLOATS:
            raise Refuse("dtype", f"{path}: tensor {name} is {info.dtype}: convert it to F32, F16 or BF16")
        bare = name.removeprefix(_ROOT)
        if match := _KEY.match(bare):
            weight = f"{match['module']}.weight"
            halves.setdefault(weight, {})[match["factor"] or match["embedding"]] = name
            if match["embedding"]:
                embeddings.add(weight)
        elif "lora_" in bare or not config.get("modules_to_save"):
            raise Refuse("adapter-kind", f"{path}: tensor {name} is no part of a plain LoRA adapter")
        else:
            saved[re.sub(r"\.(modules_to_save|original_module)(\.default)?\.", ".", bare)] = name
    factors = {}
    for weight, pair in sorted(halves.items()):
        if pair.keys() != {"A", "B"}:
            raise Refuse("adapter-kind", f"{path}: {weight} has only the factor {next(iter(pair))}")
        factors[weight] = _factors(path, weights, config, weight, pair, weight in embeddings)
    if not factors and not saved:
        raise Refuse("no-weights", f"{path}: the adapter holds no tensor")
    return factors, saved


def _factors(path: Path, weights: Checkpoint, config: Mapping[str, Any], weight: str, pair: Mapping[str, str], embedding: bool) -> Factors:
    module = weight.removesuffix(".weight")
    rank = _pattern(path, config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(path, config.get("alpha_pattern"), module, config["lora_alpha"])
    a, b = weights.tensors[pair["A"]], weights.tensors[pair["B"]]
    if len(a.shape) < 2 or len(b.shape) < 2 or math.prod(b.shape[2:]) != 1 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise Refuse("shape", f"{path}: factors of {weight} are {list(a.shape)} and {list(b.shape)}, which do not fit its rank {rank:g}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(pair["A"], pair["B"], int(rank), scale, embedding)


def _pattern(path: Path, patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT does it."""
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise Refuse("config", f"{path / CONFIG}: pattern {key!r} is no regular expression ({error})") from None
    return default
