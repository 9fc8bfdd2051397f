"""A LoRA adapter in PEFT layout as a fine-tune: its task vector is scale·B·A, one tensor at a time.

Hu et al. 2022, "LoRA"; rsLoRA scaling by Kalajdzievski 2023. Layout and configuration are those of PEFT's `LoraConfig`.
The configuration is an allow-list: a key that is not understood and has a value other than its default is refused by
its name. Which tensors of the base an adapter meets is decided in matching.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from continual.errors import Refuse
from continual.records import FileStat
from continual.tensors.checkpoint import FLOATS, Checkpoint, open_checkpoint
from continual.tensors.header import json_object, shown
from continual.tensors.kinds import is_vocabulary
from continual.tensors.place import Place

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LARGEST_CONFIG = 4 << 20
_INFORMATION = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "peft_type",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
    ]
)
"""Keys that change nothing about factors that are there: how they came to be, or settings of a switch that is off."""
_UNDERSTOOD = frozenset(
    ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save"]
)
_OFF: tuple[Any, ...] = (None, False, {}, [], "")
_HARMLESS_INIT: tuple[Any, ...] = (True, False, None, "gaussian", "orthogonal")
"""Initialisations that leave the base's weights as they are and start from B·A = 0 (or are trained away from it)."""
_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<factor>[AB])(?:\.default)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.default)?)"
)
_ROOT = "base_model.model."
_WRAPPER = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")
_LONGEST_PATTERN, _QUANTIFIERS, _PARTS = 200, 3, 2


class Factors(NamedTuple):
    """The factors of one module's task vector: tensor names in the adapter's file, rank and scale."""

    a: str
    b: str
    rank: int
    scale: float
    embedding: bool


class Adapter:
    """An adapter's files, open for reading; a context manager. `factors`: weight name (without PEFT's prefix) to its
    factors; `saved`: weight name to the tensor that replaces it (modules_to_save, and the embeddings PEFT stores beside
    the factors)."""

    def __init__(self, place: Place) -> None:
        """Opens the adapter in `place`. Raises Refuse for a configuration or tensors that are not understood."""
        self.place = place
        self._config_file = place.open([CONFIG])
        try:
            size, where = self._config_file.stats[0].size, place.file(CONFIG)
            if size > _LARGEST_CONFIG:
                raise Refuse("config", f"{where}: {size} bytes are too many for a configuration file")
            self.config = json_object(self._config_file.pread(0, size, 0), where, "config")
            check_config(place, self.config)
            self.weights: Checkpoint = open_checkpoint(place, WEIGHTS)
        except BaseException:
            self._config_file.close()
            raise
        try:
            self.factors, self.saved = _sort(place, self.weights, self.config)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self.weights.close()
        self._config_file.close()

    @property
    def files(self) -> tuple[FileStat, ...]:
        """The weights and the configuration: another alpha is another model."""
        return self.weights.files + self._config_file.stats

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the file."""
        return self.weights.nbytes

    @property
    def transposed(self) -> bool:
        """Whether the configuration says that the base stores these weights as in × out."""
        return bool(self.config.get("fan_in_fan_out"))

    def metadata(self) -> tuple[str, Mapping[str, str]]:
        """The weight file, as messages name it, and what its publisher wrote into its header."""
        return self.weights.metadata()

    def check_unchanged(self) -> None:
        """Raises Retry if a file changed since it was opened."""
        self.weights.check_unchanged()
        self._config_file.check_unchanged()

    def shape(self, factors: Factors, transposed: bool) -> tuple[int, int]:
        """Rows and columns of the task vector, a convolution flattened to 2-D. `transposed`: the base stores the weight
        as in × out."""
        a, b = self.weights.tensors[factors.a].shape, self.weights.tensors[factors.b].shape
        rows, columns = b[0], math.prod(a[1:])
        return (columns, rows) if factors.embedding or transposed else (rows, columns)

    def product(self, factors: Factors, transposed: bool, out: torch.Tensor) -> tuple[tuple[str, torch.Tensor], ...]:
        """scale·B·A in float32 into `out` (of shape `shape(factors, transposed)`). Returns the two factors as they were
        read, by name."""
        read = tuple((name, self.weights.read(name)) for name in (factors.a, factors.b))
        a = read[0][1].float().reshape(factors.rank, -1)
        b = read[1][1].float().reshape(-1, factors.rank)
        if factors.embedding or transposed:
            torch.mm(a.T, b.T, out=out)
        else:
            torch.mm(b, a, out=out)
        out.mul_(factors.scale)
        return read


def check_config(place: Place, config: Mapping[str, Any]) -> None:
    """Raises Refuse naming the first key that makes this more than a plain LoRA adapter."""
    if config.get("peft_type") != "LORA":
        raise Refuse(
            "adapter-kind", f"{place}: adapter of kind {shown(config.get('peft_type'))}: only LORA is understood"
        )
    if config.get("init_lora_weights", True) not in _HARMLESS_INIT:
        raise Refuse(
            "adapter-kind",
            f"{place}: init_lora_weights = {shown(config['init_lora_weights'])} may have changed the base, and then B·A alone is not the task vector; "
            "merge the adapter into its base and publish that, or convert it to plain LoRA",
        )
    for key, value in config.items():
        known = (
            key in _INFORMATION
            or key in _UNDERSTOOD
            or key == "init_lora_weights"
            or (key == "bias" and value == "none")
        )
        if not known and value not in _OFF:
            raise Refuse(
                "adapter-kind",
                f"{place}: {shown(key)} = {shown(value)} is not understood; merge the adapter into its base and publish that",
            )
    for key in ("use_rslora", "fan_in_fan_out"):
        if config.get(key) not in (None, True, False):
            raise Refuse("config", f"{place.file(CONFIG)}: {key} = {shown(config[key])} is neither true nor false")
    _rank(place, "r", config.get("r"))
    _alpha(place, "lora_alpha", config.get("lora_alpha"))
    for key, check in (("rank_pattern", _rank), ("alpha_pattern", _alpha)):
        for pattern, value in _patterns(place, config, key).items():
            check(place, f"{key}[{shown(pattern)}]", value)
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or any(not isinstance(name, str) for name in saved):
        raise Refuse("config", f"{place.file(CONFIG)}: modules_to_save = {shown(saved)} is no list of names")


def _rank(place: Place, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise Refuse("config", f"{place.file(CONFIG)}: {key} = {shown(value)} is no positive whole number")
    return value


def _alpha(place: Place, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e30:
        raise Refuse("config", f"{place.file(CONFIG)}: {key} = {shown(value)} is no number from 0 to 1e30")
    return float(value)


def _patterns(place: Place, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A pattern table of the configuration, its keys checked: they are regular expressions of a stranger, and some take
    for ever to fail."""
    body = config.get(key) or {}
    if not isinstance(body, dict):
        raise Refuse("config", f"{place.file(CONFIG)}: {key} = {shown(body)} is no table")
    for pattern in body:
        bare = re.sub(r"\\.", "", pattern).replace("(?:", "(")
        involved = (
            len(re.findall(r"[*+?{]", bare)) > _QUANTIFIERS or bare.count("(") > _PARTS or re.search(r"\)[*+?{]", bare)
        )
        if len(pattern) > _LONGEST_PATTERN or involved:
            raise Refuse(
                "config",
                f"{place.file(CONFIG)}: {key}: pattern {shown(pattern)} is longer or more involved than a list of module names needs",
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise Refuse(
                "config", f"{place.file(CONFIG)}: {key}: pattern {shown(pattern)} is no regular expression ({error})"
            ) from None
    return body


def _sort(place: Place, weights: Checkpoint, config: Mapping[str, Any]) -> tuple[dict[str, Factors], dict[str, str]]:
    """What each tensor of the file is for."""
    halves: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for name, info in weights.tensors.items():
        if info.dtype not in FLOATS:
            raise Refuse("dtype", f"{place}: tensor {name} is {info.dtype}: convert it to F32, F16 or BF16")
        bare = name.removeprefix(_ROOT)
        if match := _KEY.fullmatch(bare):
            pair = halves.setdefault(f"{match['module']}.weight", {})
            half = match["factor"] or match["embedding"].lower()
            if half in pair:
                raise Refuse("adapter-kind", f"{place}: {name} and {pair[half]} are the same factor")
            pair[half] = name
        else:
            weight = _WRAPPER.sub("", bare, count=1)
            if "lora_" in bare or not _is_saved(weight, config) or weight in saved:
                raise Refuse(
                    "adapter-kind",
                    f"{place}: tensor {name} is no part of a plain LoRA adapter; merge it into its base and publish that",
                )
            saved[weight] = name
    factors = {}
    for weight, pair in sorted(halves.items()):
        if set(pair) not in ({"A", "B"}, {"a", "b"}):
            raise Refuse(
                "adapter-kind", f"{place}: {weight} has no pair of factors, only {', '.join(sorted(pair.values()))}"
            )
        factors[weight] = _factors(place, weights, config, weight, pair)
    return factors, saved


def _is_saved(weight: str, config: Mapping[str, Any]) -> bool:
    """Whether a full weight belongs here: its module is one of modules_to_save, or it is an embedding or head, which
    PEFT stores when it was resized."""
    names = config.get("modules_to_save") or []
    return is_vocabulary(weight) or any(f".{name}." in f".{weight}" for name in names)


def _factors(
    place: Place, weights: Checkpoint, config: Mapping[str, Any], weight: str, pair: Mapping[str, str]
) -> Factors:
    embedding = "a" in pair
    module = weight.removesuffix(".weight")
    rank = _first_match(_patterns(place, config, "rank_pattern"), module, config["r"])
    alpha = _first_match(_patterns(place, config, "alpha_pattern"), module, config["lora_alpha"])
    a, b = (weights.tensors[pair[half]] for half in ("ab" if embedding else "AB"))
    if len(a.shape) < 2 or len(b.shape) < 2 or math.prod(b.shape[2:]) != 1 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise Refuse(
            "shape",
            f"{place}: factors of {weight} are {list(a.shape)} and {list(b.shape)}, which do not fit its rank {rank}",
        )
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(a.name, b.name, rank, scale, embedding)


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT does it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
