"""The rules that are weighted sums: `mean`, `task-arithmetic`, and `frank-wolfe`, whose weights rounds find.

merged = θ₀ + λ Σ wτ. Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 2; the mean is "Model Soups"
(Wortsman et al. 2022) of fine-tunes of one base. How rounds find the weights of `frank-wolfe` is in
`continual.selection`.
"""

from __future__ import annotations

from continual.rules import sums
from continual.rules.contract import Factored, Laws, ReadFunctions, Rule, RuleRow
from continual.rules.options import NoOptions
from continual.rules.scale import ReadOptions


def _mean(_: NoOptions) -> Rule:
    return Rule(
        fold=sums.FOLD,
        read=ReadFunctions(sums.read_mean, sums.size_of_mean, square=sums.square_of_mean, goes_by=sums.weight),
        laws=sums.GROUP,
        factored=Factored(),
    )


def _task_arithmetic(_: NoOptions) -> Rule:
    return Rule(
        fold=sums.FOLD,
        read=ReadFunctions(sums.read_sum, sums.size, square=sums.square_of_sum, goes_by=sums.nothing),
        laws=sums.GROUP,
        factored=Factored(),
    )


def _frank_wolfe(_: NoOptions) -> Rule:
    return Rule(
        fold=sums.FOLD,
        read=ReadFunctions(sums.read_sum, sums.size, square=sums.square_of_sum, goes_by=sums.nothing),
        laws=Laws(rounds=True),
        factored=Factored(),
    )


MEAN = RuleRow(
    name="mean",
    summary="the (weighted) mean of the task vectors",
    paper="Wortsman et al. 2022, Model soups",
    bytes_per_parameter="4",
    read=ReadOptions("number", 1.0),
    options=NoOptions,
    make=_mean,
)
TASK_ARITHMETIC = RuleRow(
    name="task-arithmetic",
    summary="the (weighted) sum of the task vectors, scaled when read",
    paper="Ilharco et al. 2023, Editing Models with Task Arithmetic",
    bytes_per_parameter="4",
    read=ReadOptions("norm", 1.0),
    published=ReadOptions("number", 0.3),
    options=NoOptions,
    make=_task_arithmetic,
)
FRANK_WOLFE = RuleRow(
    name="frank-wolfe",
    summary="a weighted sum whose models and weights rounds choose, by a calibration objective",
    paper="FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization, 2025",
    bytes_per_parameter="4",
    read=ReadOptions("number", 1.0),
    options=NoOptions,
    make=_frank_wolfe,
)
