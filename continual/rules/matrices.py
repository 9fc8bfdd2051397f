"""What the spectral rules share: which tensors are matrices to them, and the figures of a task vector that `spread`
reads by."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from continual import linalg
from continual.errors import Misconfigured
from continual.records import TensorSpec
from continual.rules.contract import Folded, Inputs, Option

IsMatrix = Callable[[TensorSpec], bool]


def globs(value: Any) -> list[str]:
    """The value of an option that is a list of globs. Raises ValueError for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(glob, str) and glob for glob in value):
        raise ValueError("a list of globs over tensor names")
    return list(value)


INCLUDE = Option([], "globs of tensors that are matrices here too: embeddings, output heads", globs)


def is_matrix(options: Mapping[str, Any]) -> IsMatrix:
    """2-D weights of linear layers, convolutions as out × rest, and what the option `include` names; never an empty
    tensor."""
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


def figures(tau: Tensor) -> dict[str, float]:
    """Of an m×n task vector, before it is folded: ‖τ‖² as matrix_sq and the square of its largest singular value as
    top_sq.

    Values that are not finite give figures that are not: the fold is refused for them where its sums are looked at.
    """
    tau_sq = linalg.inner(tau, tau)
    return {"matrix_sq": tau_sq, "top_sq": linalg.top(tau) ** 2 if tau_sq and math.isfinite(tau_sq) else tau_sq}


def workspace(spec: TensorSpec) -> int:
    """Peak bytes of `figures` beyond the task vector: a few narrow matrices of either side."""
    return 16 * 16 * sum(sides(spec))


def noted(folded: Folded, found: dict[str, float]) -> Folded:
    """What a fold gave, with those figures among its sums."""
    return folded._replace(sums=folded.sums | found)
