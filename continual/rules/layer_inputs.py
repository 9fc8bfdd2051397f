"""What is known of the inputs of a layer, and what a rule makes of that. No rule lives here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from continual.lazily import Tensor


class LayerInputs(NamedTuple):
    """The second moment C = E[xxᵀ] of the inputs x of a layer, n×n, as it is kept: `diagonal` (n) is C's own; off it C
    is factorᵀ·factor (`factor` k×n), with so many of its largest eigenvalues. `rows`: the weight lies as in × out, so
    that x meets the rows of a task vector, and not its columns."""

    factor: Tensor
    diagonal: Tensor
    rows: bool = False


ByInputs = Callable[[Tensor, Mapping[int, slice], Sequence[LayerInputs], Sequence[float]], Tensor]
"""Of task vectors τ_i = L_i·R_iᵀ the R of X = Σ w_i·L_i·R'_iᵀ (n×K float64), from the columns R of all (n×K float64),
which of them are those of each, by its index, its inputs in this layer, and its weight. Where the inputs meet the rows,
L and R change places."""
