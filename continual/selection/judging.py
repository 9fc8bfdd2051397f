"""Whether a candidate is relevant, from the losses of held-out rows with a share of it in the merged model and without.
Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from continual.lazily import Tensor

LEAST = 1e-12
"""Standard errors below this are rounding."""


class Judgement(NamedTuple):
    """What a candidate does to held-out rows: `change` of the mean loss over tasks, its standard error (`error`), and
    how significant the change is (`z`, a standard normal's deviate, below zero where the candidate helps)."""

    change: float
    error: float
    z: float


def judge(without: Sequence[Tensor], with_it: Sequence[Tensor], own: int | None = None) -> Judgement:
    """Judges from the losses of every held-out row of each task (1-D, at least two rows), in the same order in both.

    Rows are compared in pairs, so what makes a row hard cancels. They are compared within tasks, so how much the loss
    of one task differs from another's does not count. The error of the mean over T tasks is √(Σ_k s_k²/n_k)/T, where
    s_k² is the variance of the n_k differences of task k. Degrees of freedom are those of Welch and Satterthwaite, and
    few rows are allowed for as Student's t allows for them (`normal`).

    A fine-tune of one task may do little for the other tasks, and its effect may drown in their noise. So, where the
    mean falls, the task that gains most surely is looked at by itself. It is the best of T, and what it says is made
    weaker for that: its tail e^(−z²/2) times T, which is √(z² − 2 ln T). The lower z of the two counts.

    `own`: the number of the task that the candidate is known to serve, by something else than these losses. Then it is
    this one that is looked at, and there is no price.

    Raises ValueError where the tasks of the two differ in number.
    """
    changes: list[float] = []
    variances: list[float] = []  # of the mean difference of each task
    freedoms: list[int] = []
    for before, after in zip(without, with_it, strict=True):
        differences = (after - before).double()
        changes.append(float(differences.mean()))
        variances.append(max(float(differences.var()) / len(differences), LEAST**2))
        freedoms.append(len(differences) - 1)
    tasks = len(changes)
    change = math.fsum(changes) / tasks
    variance = math.fsum(variances)
    freedom = variance**2 / math.fsum(v**2 / nu for v, nu in zip(variances, freedoms, strict=True))
    error = math.sqrt(variance) / tasks
    z = normal(change / error, freedom)
    if change < 0:
        each = [normal(c / math.sqrt(v), nu) for c, v, nu in zip(changes, variances, freedoms, strict=True)]
        surest = min(each)
        z = min(z, -math.sqrt(max(0.0, surest**2 - 2 * math.log(tasks))) if own is None else each[own])
    return Judgement(change, error, z)


def normal(t: float, freedom: float) -> float:
    """The standard normal deviate with the tail of Student's t at `freedom` degrees of freedom.

    Wallace 1959, "Bounds on normal approximations to Student's and the chi-square distributions".
    """
    return math.copysign(math.sqrt(freedom * math.log1p(t * t / freedom)), t) * (8 * freedom + 1) / (8 * freedom + 3)
