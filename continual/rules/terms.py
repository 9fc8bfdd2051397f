"""The terms of which X is a sum, one of each model, and what each is multiplied by when a merge is read.

With coefficients X = ΣX_i of a layer is read as Σ c_i·X_i. Which rules read such a sum the registry says (`terms_of`);
what the terms are, each rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.outside import counted


class ModelTerms(NamedTuple):
    """X of a matrix as a sum of one term of each model: X = left·rightᵀ, m×k and n×k, float64, whose columns belong to
    the models with the numbers `owner`."""

    left: Tensor
    right: Tensor
    owner: Sequence[int]

    def times(self, factors: Mapping[int, float]) -> ModelTerms:
        """With each model's term multiplied by its number here; by 1 where it has none."""
        if not factors:
            return self
        each = torch.tensor([factors.get(one, 1.0) for one in self.owner], dtype=self.left.dtype)
        return self._replace(left=self.left * each.to(self.left.device))

    @property
    def square(self) -> float:
        """‖X‖²."""
        return max(0.0, float(((self.left.mT @ self.left) * (self.right.mT @ self.right)).sum()))


@dataclass(frozen=True, slots=True)
class TermFactors:
    """`layers`: the layers that have coefficients, by `layer_key`, sorted; `models`: by the key of a model one number
    for each of them, sorted by key. Of any other model or layer it is 1.

    Raises Misconfigured for what is not above 0, and for a model with other than one number a layer.
    """

    layers: tuple[str, ...] = ()
    models: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        for key, factors in self.models:
            if len(factors) != len(self.layers):
                raise Misconfigured(f"terms: {key} has {len(factors)} coefficients for {len(self.layers)} layers")
            for one in factors:
                if not (math.isfinite(one) and one > 0):
                    raise Misconfigured(f"terms: a coefficient of {key} is {one!r}, no number above 0")

    def __bool__(self) -> bool:
        return bool(self.models)

    def __str__(self) -> str:
        """How many there are, for people."""
        return f"coefficients of {counted(len(self.models), 'model')} in {counted(len(self.layers), 'layer')}"

    def of(self, key: str) -> dict[str, float]:
        """Those of one model, by layer."""
        return next((dict(zip(self.layers, found, strict=True)) for one, found in self.models if one == key), {})

    def times(self, more: Mapping[tuple[str, str], float]) -> TermFactors:
        """With some of them, by model and layer, multiplied by these numbers; six digits of each are kept."""
        layers = sorted({*self.layers, *(layer for _, layer in more)})
        before = {key: self.of(key) for key, _ in self.models}
        found = {key: [mine.get(layer, 1.0) for layer in layers] for key, mine in before.items()}
        places = {layer: place for place, layer in enumerate(layers)}
        for (key, layer), factor in more.items():
            mine = found.setdefault(key, [1.0] * len(layers))
            mine[places[layer]] = float(f"{mine[places[layer]] * factor:.6g}")
        return TermFactors(tuple(layers), tuple((key, tuple(found[key])) for key in sorted(found)))

    def to_mapping(self) -> dict[str, object]:
        """Plain data, as it is kept in the state."""
        return {"layers": list(self.layers), "models": {key: list(factors) for key, factors in self.models}}

    @staticmethod
    def from_mapping(found: object) -> TermFactors:
        """The inverse of `to_mapping`; None is no coefficients. Raises Misconfigured for anything else."""
        if found is None:
            return NO_TERMS
        if not isinstance(found, Mapping) or set(found) != {"layers", "models"}:
            raise Misconfigured(f"scale: terms = {found!r} is no table of layers and models")
        layers, models = found["layers"], found["models"]
        if not _is_list(layers) or not all(isinstance(name, str) for name in layers) or not isinstance(models, Mapping):
            raise Misconfigured("scale: terms has names of layers, and for each model a list of numbers")
        for key, one in models.items():
            if not _is_list(one) or not all(map(_is_number, one)):
                raise Misconfigured(f"scale: terms of {key} = {one!r} is no list of numbers")
        return TermFactors(
            tuple(layers), tuple((str(key), tuple(float(one) for one in models[key])) for key in sorted(models))
        )


NO_TERMS = TermFactors()
"""Every coefficient is 1."""


def _is_list(found: object) -> bool:
    return isinstance(found, Sequence) and not isinstance(found, str)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
