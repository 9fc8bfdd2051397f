"""Gram: least squares between the merged task vector and each fine-tune's own, in closed form from sums of constant
size.

The objective is that of WUDI-Merging (Cheng et al. 2025, "Whoever Started the Interference Should End It", equation 6),
solved as RegMean (Jin et al. 2023, "Dataless Knowledge Fusion", equation 2) solves its own, with the task vector in
place of the data. Right: minimise Σ ‖(τ − τ_i)τ_iᵀ‖²/‖τ_i‖² + ε‖τ − cS‖², τ_R = (B + εcS)(A + εI)⁻¹ with A = Σ
τ_iᵀτ_i/‖τ_i‖², B = Σ τ_iτ_iᵀτ_i/‖τ_i‖², S = Στ_i. Left: the same on transposes, with A′ = Σ τ_iτ_iᵀ/‖τ_i‖² and the same
B. Two-sided, ours: the mean of both. ε is relative to the mean of A's diagonal. Statistics in float64. Everything that
is no matrix reads as the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from continual.lazily import Tensor, torch
from continual.rules import gram_less, gram_sums
from continual.rules.contract import Accumulators, Rule, RuleRow
from continual.rules.gram_sums import CROSS, EARLIER, GRAMS, LEFT, RIGHT, SIDES, SUM, Grams, GramSlots, Side
from continual.rules.matrices import Include
from continual.rules.options import Choice, Number
from continual.rules.scale import ReadOptions


@dataclass(frozen=True)
class GramOptions:
    """The options of `gram`."""

    side: Annotated[Side, Choice(SIDES), "which side the task vectors act on"] = "both"
    ridge: Annotated[float, Number(least=1e-3), "ε relative to the mean diagonal of the Gram"] = 0.1
    pull: Annotated[float, Number(least=0.0), "c, what the ridge pulls to: c times the sum of the task vectors"] = 0.0
    grams: Annotated[Grams, Choice(GRAMS), "how the Grams are kept: float32, packed, or float64, whole"] = "float32"
    include: Include = ()


def solve(accumulators: Accumulators, ridge: float, pull: float, sides: tuple[int, int] | None = None) -> Tensor:
    """The merged m×n task vector, float64: of the right side, the left side, or the mean of both, as there are
    accumulators for. Where these are the accumulators of a core, `sides` are m and n: the mean of a Gram's diagonal is
    that of the whole."""
    cross, found = accumulators[CROSS], []
    for side in (RIGHT, LEFT):
        if side not in accumulators:
            continue
        gram = accumulators[side]
        epsilon = ridge * gram_sums.mean_diagonal(gram, sides and sides[side == RIGHT])
        if epsilon == 0.0:
            return torch.zeros_like(cross)
        target = cross + (epsilon * pull) * accumulators[SUM] if SUM in accumulators else cross
        factor = torch.linalg.cholesky(gram + epsilon * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        found.append(
            torch.cholesky_solve(target.mT, factor).mT if side == RIGHT else torch.cholesky_solve(target, factor)
        )
    return found[0] if len(found) == 1 else (found[0] + found[1]) / 2


def _make(options: GramOptions) -> Rule:
    def read(accumulators: Accumulators, sides: tuple[int, int] | None) -> Tensor:
        return solve(accumulators, options.ridge, options.pull, sides)

    kept = GramSlots(options.side, options.pull > 0.0, options.grams)
    # the ridge pulls either side to a multiple of the sum of its own
    return kept.rule("gram", options.include, read, None if options.pull else gram_less.ridge(options.ridge))


GRAM = RuleRow(
    name="gram",
    summary="least squares between the merged task vector and each fine-tune's own",
    paper="Cheng et al. 2025, WUDI-Merging, in closed form; two-sided is ours",
    bytes_per_parameter="12 of a square matrix, 2·(m²+n²)/mn + 8 of any",
    read=ReadOptions("spread", 0.85),
    published=ReadOptions("number", 1.0),
    options=GramOptions,
    make=_make,
    earlier=EARLIER,
)
