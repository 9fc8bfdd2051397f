"""Sums of task vectors: what the rules that keep one share, and the plain form of the rules that see matrices. No rule
lives here; the weighted sums themselves are in `weighted`.

X = Σ wτ per tensor, in one float32 slot. Sums are groups: any order gives the same up to rounding, and folding with
minus the weight takes a model out.
"""

from __future__ import annotations

import math

from continual import linalg
from continual.errors import Misconfigured
from continual.lazily import Tensor
from continual.records import MatrixTotals, TensorSpec, Totals
from continual.rules.contract import Accumulators, Folded, FoldFunctions, Inputs, Laws, Sums
from continual.rules.scale import Size

SLOT = "sum"


def settle(totals: Totals, sums: Sums, weight: float) -> Totals:
    """The totals of the model after a fold with `weight`. A negative weight takes a model out; none left is exactly 0.

    Where the sums have the figures of matrices the totals get theirs: the norms ‖τ_i‖ over the matrices and over the
    rest, and ρ_i‖τ_i‖ over the matrices. ρ_i² = ‖τ_i‖²/‖τ_i‖₂², norms squared and added over the matrices, says in how
    many directions a task vector lies.
    """
    sign, mine, matrices = math.copysign(1.0, weight), figures_of(sums), None
    if mine is not None:
        pairs = zip(totals.matrices or MatrixTotals(), mine, strict=True)
        matrices = MatrixTotals(*(before + sign * figure for before, figure in pairs))
    if last_out(totals, weight):
        return Totals(matrices=None if matrices is None else MatrixTotals())
    norm_sum = totals.norm_sum + sign * math.sqrt(sums.tau_sq)
    return Totals(
        count=totals.count + sign,
        weight=totals.weight + weight,
        norm_sum=norm_sum,
        merged_sq=sums.merged_sq,
        matrices=matrices,
    )


def figures_of(sums: Sums) -> MatrixTotals | None:
    """The totals of one model alone over the matrices and the rest; None where the sums do not tell matrices apart."""
    if sums.matrix_sq is None or sums.top_sq is None:
        return None
    plain_sq = max(0.0, sums.tau_sq - sums.matrix_sq)
    spread = sums.matrix_sq / math.sqrt(sums.top_sq) if sums.top_sq else 0.0
    return MatrixTotals(math.sqrt(sums.matrix_sq), math.sqrt(plain_sq), spread)


def together(ours: Totals, theirs: Totals) -> Totals:
    """The totals of two states as one, without `merged_sq`: that is no sum of theirs, and stays 0 here."""
    matrices = None
    if ours.matrices or theirs.matrices:
        pairs = zip(ours.matrices or MatrixTotals(), theirs.matrices or MatrixTotals(), strict=True)
        matrices = MatrixTotals(*(a + b for a, b in pairs))
    return Totals(
        count=ours.count + theirs.count,
        weight=ours.weight + theirs.weight,
        norm_sum=ours.norm_sum + theirs.norm_sum,
        matrices=matrices,
    )


def last_out(totals: Totals, weight: float) -> bool:
    """Whether folding with `weight` takes the last model out."""
    return totals.count + math.copysign(1.0, weight) == 0 or totals.weight + weight == 0


def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
    """X += w·τ, each element rounded once. Where the last model is taken out X becomes exact zeros, not what rounding
    left."""
    sums = Sums(*linalg.add(accumulators[SLOT], tau, inputs.weight))
    if last_out(totals, inputs.weight):
        accumulators[SLOT].zero_()
        sums = sums._replace(merged_sq=0.0)
    return Folded(accumulators, sums)


def workspace(spec: TensorSpec) -> int:
    """A few float64 chunks."""
    return 8 * 6 * min(linalg.CHUNK, spec.numel)


FOLD = FoldFunctions(fold, workspace)


def combine(accumulators: Accumulators, others: Accumulators, totals: Totals) -> float:
    """X += X′; ‖X‖² after."""
    total = accumulators[SLOT].add_(others[SLOT])
    return linalg.inner(total, total)


GROUP = Laws(weighted=True, combine=combine, keeps=frozenset({"Σwτ"}))


def read_mean(spec: TensorSpec, accumulators: Accumulators, totals: Totals) -> Tensor:
    """Σwτ / Σw; zeros where nothing is folded."""
    return accumulators[SLOT] * (1.0 / totals.weight if totals.weight else 0.0)


def read_sum(spec: TensorSpec, accumulators: Accumulators, totals: Totals) -> Tensor:
    """Σwτ."""
    return accumulators[SLOT].clone()


def square_of_mean(spec: TensorSpec, kept: float, totals: Totals) -> float:
    """‖Σwτ / Σw‖² of a tensor."""
    return kept / totals.weight**2 if totals.weight else 0.0


def square_of_sum(spec: TensorSpec, kept: float, totals: Totals) -> float:
    """‖Σwτ‖² of a tensor."""
    return kept


def nothing(spec: TensorSpec, totals: Totals) -> object:
    """What of the totals is gone by where X follows from the accumulators alone."""
    return None


def everything(spec: TensorSpec, totals: Totals) -> object:
    """All of the totals."""
    return [totals.body(), totals.each]


def weight(spec: TensorSpec, totals: Totals) -> object:
    """What the mean goes by."""
    return totals.weight


def size(totals: Totals) -> Size:
    """How long X is where `merged_sq` is its square, and X is the plain sum."""
    return Size(math.sqrt(totals.merged_sq), 1.0)


def size_of_mean(totals: Totals) -> Size:
    """How long the mean is: ‖Σwτ‖ / Σw. Σw times the mean is the plain sum."""
    return Size(math.sqrt(totals.merged_sq) / totals.weight, totals.weight) if totals.weight else Size(0.0)


def unknown(totals: Totals) -> Size:
    """The size of an X that is made only when it is read, and is the mean where it is no matrix."""
    return Size(most=totals.weight)


def whole(rule: str, inputs: Inputs) -> None:
    """Raises Misconfigured unless the model is folded with weight 1. `rule` names the rule in the message."""
    if inputs.weight != 1.0:
        raise Misconfigured(
            f"{rule} folds every model with weight 1, not {inputs.weight:g}; "
            "a model cannot be unfolded: roll back and fold the others"
        )


def added(rule: str, inputs: Inputs) -> None:
    """Raises Misconfigured unless the weight is above 0. `rule` names the rule in the message."""
    if inputs.weight <= 0.0:
        raise Misconfigured(
            f"{rule} folds no model with the weight {inputs.weight:g}; "
            "a model cannot be unfolded: roll back and fold the others"
        )
