"""RegMean: what each fine-tune does on the inputs of its own task, all of them at once, in closed form.

Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models", equation 2: of a linear layer with
the inputs x the merged task vector X minimises Σ w_i·E_i‖(X − τ_i)x‖² over the rows of every task i, so

    X = (Σ w_i·τ_i·C_i)·(Σ w_i·C_i)⁻¹,    C_i = E_i[xxᵀ],

what is off the diagonal of each C_i being multiplied by α (their section 3.3). A weight w_i is ours, and C_i is that of
the inputs that the base has on the rows, where theirs are those of the fine-tune (ops/decisions/0063). With one C for
all models X would be their mean, as it is of every tensor that is no matrix, or whose inputs nobody has read.

Each τ_i is a product of thin factors, so X is one too: of U_iΣ_i and of (Σ w_i·C_i)⁻¹·C_i·V_i. The maths is float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from continual.lazily import Tensor, torch
from continual.records import Totals
from continual.rules import matrices, sums
from continual.rules.contract import Accumulators, Factored, Needs, Rule, RuleRow
from continual.rules.layer_inputs import LayerInputs
from continual.rules.matrices import Include, OnMatrices
from continual.rules.options import Number
from continual.rules.scale import ReadOptions

_FLOOR = 1e-6
"""What each diagonal gets besides, relative to the mean of all: where no task has an input, X is the mean."""


@dataclass(frozen=True)
class RegMeanOptions:
    """The options of `regmean`."""

    alpha: Annotated[
        float, Number(least=0.0, most=1.0), "what is off the diagonal of a second moment is multiplied by this"
    ] = 0.95
    include: Include = ()


def solved(
    v: Tensor, rows: Mapping[int, slice], given: Sequence[LayerInputs], weights: Sequence[float], alpha: float
) -> Tensor:
    """(Σ w_i·C_i)⁻¹·C_i·V_i, n×K float64. `v` (n×K float64): the right factors of all models, `rows` which of them are
    those of each, by its index in `given` and `weights`; a model without any has a C_i all the same."""
    found, rest = torch.zeros_like(v), torch.zeros(len(v), dtype=v.dtype, device=v.device)
    heavy = []
    level = sum(float(one.diagonal.mean()) for one in given) / len(given) or 1.0
    for index, (one, weight) in enumerate(zip(given, weights, strict=True)):
        factor, diagonal = one.factor.to(v), one.diagonal.to(v)
        alone = (diagonal - alpha * factor.square().sum(0)).clamp(min=0) + _FLOOR * level
        rest += weight * alone
        heavy.append(factor * (alpha * weight) ** 0.5)
        if (where := rows.get(index)) is not None:
            mine = v[:, where]
            found[:, where] = alpha * (factor.mT @ (factor @ mine)) + alone[:, None] * mine
    wide = torch.cat(heavy)  # Σ w_i·C_i = wideᵀ·wide + diag(rest)
    if len(wide) >= len(v):
        factor = torch.linalg.cholesky(wide.mT @ wide + torch.diag(rest))
        return torch.cholesky_solve(found, factor)
    near, over = found / rest[:, None], wide / rest  # by Woodbury's identity
    inner = over @ wide.mT + torch.eye(len(wide), dtype=v.dtype, device=v.device)
    return near - over.mT @ torch.cholesky_solve(over @ found, torch.linalg.cholesky(inner))


def _make(options: RegMeanOptions) -> Rule:
    def by_inputs(
        v: Tensor, rows: Mapping[int, slice], given: Sequence[LayerInputs], weights: Sequence[float]
    ) -> Tensor:
        return solved(v, rows, given, weights, options.alpha)

    on = OnMatrices(sums.fold, _unread, matrices.workspace, factored=Factored(by_inputs=by_inputs))
    laws = sums.GROUP._replace(keeps=frozenset())  # of whole tensors there is nothing that it could read
    return matrices.rule("regmean", options.include, on, laws)._replace(needs=Needs(inputs=True))


def _unread(accumulators: Accumulators, totals: Totals) -> Tensor:
    return accumulators[sums.SLOT] * (1.0 / totals.weight if totals.weight else 0.0)


REGMEAN = RuleRow(
    name="regmean",
    summary="least squares on the inputs that layers have on rows of each model's task",
    paper="Jin et al. 2023, RegMean; second moments of the base's inputs",
    bytes_per_parameter="none of its own; see continual tune --what inputs",
    read=ReadOptions("number", 1.0),
    options=RegMeanOptions,
    make=_make,
)
