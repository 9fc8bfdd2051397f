"""The configuration of a LoRA adapter, as PEFT's `LoraConfig` writes it: what is understood, and its checks.

It is an allow-list: a key that is not understood and has a value other than its default is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from continual.errors import Refuse
from continual.outside import shown
from continual.tensors.header import json_object
from continual.tensors.patterns import Patterns
from continual.tensors.place import Place, Weights

CONFIG = "adapter_config.json"
_LARGEST_CONFIG = 4 << 20
_VALUES = 150_000
"""Values of the largest configuration: one for each key of its tables, and some."""
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
_OFF: tuple[object, ...] = (None, False, {}, [], "")
_HARMLESS_INIT: tuple[object, ...] = (True, False, None, "gaussian", "orthogonal")
"""Initialisations that leave the base's weights as they are and start from B·A = 0 (or are trained away from it)."""
T = TypeVar("T", int, float)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What the configuration says of the factors.

    `rank` and `alpha` are those of every module that no pattern of `ranks` and `alphas` names. `by_root`: the scale is
    alpha/√rank (rsLoRA), else alpha/rank. `transposed`: the base stores these weights as in × out. `saved`: names of
    the modules whose whole weights are beside the factors.
    """

    rank: int
    alpha: float
    by_root: bool
    transposed: bool
    ranks: Patterns[int]
    alphas: Patterns[float]
    saved: tuple[str, ...]

    def of(self, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each module. Raises Refuse (`config`) where the patterns are too involved for so many."""
        names = list(modules)
        ranks, alphas = self.ranks.of(names), self.alphas.of(names)
        return {name: (ranks.get(name, self.rank), alphas.get(name, self.alpha)) for name in names}


def parse(place: Place, file: Weights) -> AdapterConfig:
    """The configuration in `file`, which was opened at `place`.

    Raises Refuse if it is no JSON object, or naming the first key that makes this more than a plain LoRA adapter; Retry
    if it cannot be read now.
    """
    size, where = file.stats[0].size, place.file(CONFIG)
    if size > _LARGEST_CONFIG:
        raise Refuse("config", f"{where}: {size} bytes are too many for a configuration file")
    config = json_object(file.pread(0, size, 0), where, "config", values=_VALUES)
    _check_keys(place, config)
    for key in ("use_rslora", "fan_in_fan_out"):
        if config.get(key) not in (None, True, False):
            raise Refuse("config", f"{where}: {key} = {shown(config[key])} is neither true nor false")
    rank, alpha = _rank(where, "r", config.get("r")), _alpha(where, "lora_alpha", config.get("lora_alpha"))
    ranks, alphas = _patterns(where, config, "rank_pattern", _rank), _patterns(where, config, "alpha_pattern", _alpha)
    return AdapterConfig(
        rank=rank,
        alpha=alpha,
        by_root=bool(config.get("use_rslora")),
        transposed=bool(config.get("fan_in_fan_out")),
        ranks=ranks,
        alphas=alphas,
        saved=_saved(where, config.get("modules_to_save") or []),
    )


def _check_keys(place: Place, config: Mapping[str, object]) -> None:
    if config.get("peft_type") != "LORA":
        raise Refuse(
            "adapter-kind", f"{place}: adapter of kind {shown(config.get('peft_type'))}: only LORA is understood"
        )
    if config.get("init_lora_weights", True) not in _HARMLESS_INIT:
        raise Refuse(
            "adapter-kind",
            f"{place}: init_lora_weights = {shown(config['init_lora_weights'])} may have changed the base, "
            "and then B·A alone is not the task vector; "
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
                f"{place}: {shown(key)} = {shown(value)} is not understood; "
                "merge the adapter into its base and publish that",
            )


def _rank(where: str, key: str, value: object) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise Refuse("config", f"{where}: {key} = {shown(value)} is no positive whole number")
    return value


def _alpha(where: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e30:
        raise Refuse("config", f"{where}: {key} = {shown(value)} is no number from 0 to 1e30")
    return float(value)


def _patterns(
    where: str, config: Mapping[str, object], key: str, check: Callable[[str, str, object], T]
) -> Patterns[T]:
    """A pattern table of the configuration, its keys and values checked."""
    body = config.get(key) or {}
    if not isinstance(body, dict):
        raise Refuse("config", f"{where}: {key} = {shown(body)} is no table")
    values = {pattern: check(where, f"{key}[{shown(pattern)}]", value) for pattern, value in body.items()}
    return Patterns(values, where, key)


def _saved(where: str, body: object) -> tuple[str, ...]:
    if not isinstance(body, list) or any(not isinstance(name, str) for name in body):
        raise Refuse("config", f"{where}: modules_to_save = {shown(body)} is no list of names")
    return tuple(body)
