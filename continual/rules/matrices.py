"""What the spectral rules share: which tensors are matrices to them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from continual.errors import Misconfigured
from continual.records import TensorSpec
from continual.rules.contract import Inputs, Option

IsMatrix = Callable[[TensorSpec], bool]


def globs(value: Any) -> list[str]:
    """The value of an option that is a list of globs. Raises ValueError for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(glob, str) and glob for glob in value):
        raise ValueError("a list of globs over tensor names")
    return list(value)


INCLUDE = Option([], "globs of tensors that are matrices here too: embeddings, output heads", globs)


def is_matrix(options: Mapping[str, Any]) -> IsMatrix:
    """2-D weights of linear layers, convolutions as out × rest, and what the option `include` names; never an empty tensor."""
    include: Sequence[str] = options["include"]

    def found(spec: TensorSpec) -> bool:
        named = spec.kind == "matrix" or any(fnmatch.fnmatchcase(spec.name, glob) for glob in include)
        return named and len(spec.shape) >= 2 and spec.numel > 0

    return found


def sides(spec: TensorSpec) -> tuple[int, int]:
    """Rows and columns of a matrix; a convolution is out × rest."""
    return spec.shape[0], spec.numel // spec.shape[0]


def whole(rule: str, inputs: Inputs) -> None:
    """Raises Misconfigured unless the model is folded with weight 1."""
    if inputs.weight != 1.0:
        raise Misconfigured(
            f"{rule} folds every model with weight 1, not {inputs.weight:g}; a model cannot be unfolded: roll back and fold the others"
        )
