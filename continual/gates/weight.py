"""With which weight a fine-tune is folded: a number from the settings, or one that it brings, as Metrics-Weighted
Averaging takes a checkpoint's metric."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from continual.errors import Misconfigured, Refuse
from continual.gates.contract import AtFold, Headers
from continual.outside import shown
from continual.records import WEIGHT, is_weight
from continual.tensors import Model, read_json

METADATA = "metadata"
"""The word in the setting `weight` for the metadata of a safetensors header."""
_BY = ("weight", "weights")
"""The settings that every refusal here goes by."""


@dataclass(frozen=True)
class WeightGate(AtFold):
    """Finds the weight of a model, and refuses a model that should bring one and does not.

    `weights`: globs over model names; a model has the weight of the first glob that matches. `weight` is for all other
    models: a number; or `FILE.json:KEY`, the number under KEY (`a.b` is b in a) of a JSON file in the model's
    directory, as trainers write it; or `metadata:KEY`, of the safetensors header. Raises Misconfigured where these
    cannot be used.
    """

    name = "weight"
    reasons = ("weight", "config", "no-file", "outside")
    shared = ("weight", "weights")

    weight: str = "1"
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = _number(self.weight)
        if number is not None and not is_weight(number):
            raise Misconfigured(f"weight = {self.weight}: a weight is {WEIGHT}")
        file, colon, key = self.weight.partition(":")
        is_file = file.endswith(".json") and "/" not in file and not file.startswith(".")
        if number is None and not (colon and key and (file == METADATA or is_file)):
            raise Misconfigured(f"weight = {self.weight}: write a number, FILE.json:KEY or metadata:KEY")
        for glob, value in self.weights.items():
            if not is_weight(value):
                raise Misconfigured(f"weights: {glob} = {value}: a weight is {WEIGHT}")

    @property
    def even(self) -> bool:
        """Whether every model has the weight 1."""
        return _number(self.weight) == 1.0 and not self.weights

    def judge(self, seen: Headers) -> Headers:
        """Finds the weight. Raises Refuse: `weight` where it is missing or no number above 0; `config`, `no-file` or
        `outside` where its file is none that is read."""
        return seen._replace(weight=self._weight_of(seen.candidate.name, seen.model))

    def _weight_of(self, name: str, model: Model) -> float:
        for glob, weight in self.weights.items():
            if fnmatch.fnmatchcase(name, glob):
                return float(weight)
        number = _number(self.weight)
        if number is not None:
            return number
        source, _, key = self.weight.partition(":")
        found: object
        if source == METADATA:
            file, metadata = model.metadata()
            found = metadata.get(key)
            value = _number(found) if isinstance(found, str) else None
        else:
            file = model.place.file(source)
            if not model.place.present(source):
                raise Refuse(
                    "weight",
                    f"{file} is not there: the setting weight = {self.weight} takes the model's weight from it; write "
                    f"it, then 'continual retry {name}'; or give {name} a weight in the setting weights",
                    by=_BY,
                )
            found = _within(self._read(model, source), key)
            value = _float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
        if value is None or not is_weight(value):
            raise Refuse(
                "weight",
                f"{file}: {key} is {shown(found)}; a weight is {WEIGHT} (setting weight = {self.weight}): "
                f"correct it, then 'continual retry {name}'; or give {name} a weight in the setting weights",
                by=_BY,
            )
        return value

    @staticmethod
    def _read(model: Model, name: str) -> object:
        """A JSON file beside the model. Raises Refuse, which another setting lifts."""
        try:
            return read_json(model.place, name, "weight")
        except Refuse as refusal:
            refusal.by = _BY
            raise


def _within(body: object, key: str) -> object:
    if not isinstance(body, dict):
        return None
    if key in body:
        return body[key]
    first, dot, rest = key.partition(".")
    return _within(body.get(first), rest) if dot else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _float(number: float) -> float:
    """A JSON number; infinite where it is an integer that no float can hold."""
    try:
        return float(number)
    except OverflowError:
        return math.inf
