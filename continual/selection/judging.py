"""Whether a candidate is relevant, from the losses of held-out rows with a bit of it in the merge and without. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

LEAST = 1e-12
"""Standard errors below this are rounding."""


class Judgement(NamedTuple):
    """`change` of the mean loss over tasks, its standard error, and how significant it is: `z`, a standard normal's,
    below zero where the candidate helps."""

    change: float
    error: float
    z: float


def judge(without: Sequence[Tensor], with_it: Sequence[Tensor]) -> Judgement:
    """From the losses of every held-out row of each task (1-D, at least two), in the same order.

    The rows are compared in pairs, so what makes a row hard cancels, and within tasks, so how much a task's loss
    differs from another's does not count: the error of the mean over T tasks is √(Σ_k s_k²/n_k)/T, with s_k² the
    variance of the n_k differences of task k. A fine-tune of one task may do little for the others, and its effect
    drown in their noise: where the mean falls, z is that of the task which gains most surely if that says more, as the
    least of T: T times the tail e^(−z²/2), so √(z² − 2 ln T). Few rows are allowed for as Student's t is (`normal`).
    """
    changes, variances, freedoms = [], [], []
    for before, after in zip(without, with_it, strict=True):
        differences = (after - before).double()
        changes.append(float(differences.mean()))
        variances.append(max(float(differences.var()) / len(differences), LEAST**2))
        freedoms.append(len(differences) - 1)
    tasks = len(changes)
    change, variance = math.fsum(changes) / tasks, math.fsum(variances)
    freedom = variance**2 / math.fsum(
        v**2 / nu for v, nu in zip(variances, freedoms, strict=True)
    )  # Welch and Satterthwaite
    error = math.sqrt(variance) / tasks
    z = normal(change / error, freedom)
    if change < 0:
        surest = min(normal(c / math.sqrt(v), nu) for c, v, nu in zip(changes, variances, freedoms, strict=True))
        if surest < 0:
            z = min(z, -math.sqrt(max(0.0, surest**2 - 2 * math.log(tasks))))
    return Judgement(change, error, z)


def normal(t: float, freedom: float) -> float:
    """The standard normal deviate with the tail of Student's t (Wallace 1959, "Bounds on normal approximations to
    Student's and the chi-square distributions")."""
    return math.copysign(math.sqrt(freedom * math.log1p(t * t / freedom)), t) * (8 * freedom + 1) / (8 * freedom + 3)
