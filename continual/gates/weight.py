"""With which weight a fine-tune is folded: a number from the settings, or one that it brings, as Metrics-Weighted
Averaging takes a checkpoint's metric."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from continual.errors import Misconfigured, Refuse
from continual.tensors import Model, read_json
from continual.tensors.header import shown

METADATA = "metadata"


@dataclass(frozen=True, slots=True)
class WeightPolicy:
    """`named`: globs over model names and the weight of those they match, the first that does. For all others `source`:
    a number; `FILE.json:KEY`, the number under KEY (`a.b` is b in a) of a JSON file in the model's directory, as
    trainers write it; or `metadata:KEY`, of the safetensors header."""

    source: str = "1"
    named: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (number := _number(self.source)) is not None and not _usable(number):
            raise Misconfigured(f"weight = {self.source}: a weight is a number above 0")
        place, colon, key = self.source.partition(":")
        if number is None and (
            not colon
            or not key
            or not (place == METADATA or place.endswith(".json"))
            or "/" in place
            or place.startswith(".")
        ):
            raise Misconfigured(f"weight = {self.source}: write a number, FILE.json:KEY or metadata:KEY")
        for glob, value in self.named.items():
            if not _usable(value):
                raise Misconfigured(f"weights: {glob} = {value}: a weight is a number above 0")

    @property
    def even(self) -> bool:
        """Whether every model gets the weight 1."""
        return _number(self.source) == 1.0 and not self.named


def weight_of(policy: WeightPolicy, name: str, model: Model) -> float:
    """The weight of the fine-tune `name`. Raises Refuse where it should bring one and does not, or one that is no
    number above 0."""
    for glob, weight in policy.named.items():
        if fnmatch.fnmatchcase(name, glob):
            return float(weight)
    number = _number(policy.source)
    if number is not None:
        return number
    place, _, key = policy.source.partition(":")
    found: Any
    if place == METADATA:
        file, metadata = model.metadata()
        found = metadata.get(key)
        value = _number(found) if isinstance(found, str) else None
    else:
        file = model.place.file(place)
        if not model.place.present(place):
            raise Refuse(
                "weight", f"{file} is not there: the setting weight = {policy.source} takes the model's weight from it"
            )
        found = _within(read_json(model.place, place, "weight"), key)
        value = float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
    if value is None or not _usable(value):
        raise Refuse(
            "weight",
            f"{file}: {key} is {shown(found)}; a weight is a number above 0 (setting weight = {policy.source})",
        )
    return value


def _within(body: Any, key: str) -> Any:
    if isinstance(body, dict) and key in body:
        return body[key]
    first, dot, rest = key.partition(".")
    return _within(body.get(first), rest) if dot and isinstance(body, dict) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _usable(value: float) -> bool:
    return math.isfinite(value) and value > 0
