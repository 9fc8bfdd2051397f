"""The verdict on a trial: the paired test's formula against scipy's, what cancels in it and what does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from continual.selection.judging import LEAST, Judgement, judge, normal

pytestmark = pytest.mark.slow


def losses(*tasks: list[float]) -> list[Tensor]:
    return [torch.tensor(task, dtype=torch.float64) for task in tasks]


def drawn(
    seed: int, sizes: tuple[int, ...], shift: float = -0.05, spread: float = 0.1
) -> tuple[list[Tensor], list[Tensor]]:
    random = torch.Generator().manual_seed(seed)
    before = [torch.rand(size, generator=random, dtype=torch.float64) * 5 for size in sizes]
    return before, [b + spread * torch.randn(len(b), generator=random, dtype=torch.float64) + shift for b in before]


def exact(t: float, freedom: float) -> float:
    """The normal deviate with the tail of Student's t."""
    return math.copysign(float(-stats.norm.ppf(stats.t.sf(abs(t), freedom))), t)


def test_by_hand() -> None:
    """Differences (-1, -3) and (0, 2, 4): means -2 and 2, variances 2 and 4."""
    found = judge(losses([5.0, 7.0], [1.0, 1.0, 1.0]), losses([4.0, 4.0], [1.0, 3.0, 5.0]))
    assert found.change == 0.0
    assert found.error == pytest.approx(math.sqrt(2 / 2 + 4 / 3) / 2)
    assert found.z == 0.0


@pytest.mark.parametrize("sizes", [(40,), (5,), (7, 40, 30)])
@pytest.mark.parametrize("seed", range(4))
def test_against_scipy(sizes: tuple[int, ...], seed: int) -> None:
    """Where no task stands out, z is that of Welch's test of the mean over tasks."""
    without, with_it = drawn(seed, sizes, shift=+0.02)
    differences = [(b - a).numpy() for a, b in zip(without, with_it, strict=True)]
    change = np.mean([d.mean() for d in differences])
    parts = [d.var(ddof=1) / len(d) for d in differences]
    error = np.sqrt(sum(parts)) / len(sizes)
    found = judge(without, with_it)
    assert found.change == pytest.approx(change, rel=1e-12)
    assert found.error == pytest.approx(error, rel=1e-12)
    if change > 0 or len(sizes) == 1:
        freedom = sum(parts) ** 2 / sum(p**2 / (len(d) - 1) for p, d in zip(parts, differences, strict=True))
        assert found.z == pytest.approx(exact(change / error, freedom), rel=0.01)
    if len(sizes) == 1:
        test = stats.ttest_rel(with_it[0].numpy(), without[0].numpy(), alternative="less" if change < 0 else "greater")
        assert 2 * stats.norm.sf(abs(found.z)) == pytest.approx(2 * test.pvalue, rel=0.05)


@pytest.mark.parametrize("freedom", [2, 3, 5, 20, 80, 1e6])
def test_few_rows_say_less(freedom: float) -> None:
    for t in (-8.0, -3.0, -0.5, 0.0, 1.0, 4.0):
        assert normal(t, freedom) == pytest.approx(exact(t, freedom), rel=0.03, abs=1e-9)
        assert abs(normal(t, freedom)) <= abs(t)
    assert abs(normal(-5.0, freedom)) <= abs(normal(-5.0, 2 * freedom))


def test_a_task_that_gains_for_sure_is_not_drowned_by_one_that_is_noisy() -> None:
    clear, noisy = drawn(1, (60,), shift=-0.1), drawn(2, (60,), shift=0.0, spread=10.0)
    alone = judge(*clear)
    both = judge([clear[0][0], noisy[0][0]], [clear[1][0], noisy[1][0]])
    assert alone.z < -6
    assert both.change < 0
    assert both.z == pytest.approx(-math.sqrt(alone.z**2 - 2 * math.log(2)), rel=1e-12)
    assert abs(both.change / both.error) < 2, "the mean itself is not sure at all"
    hurt = drawn(2, (60,), shift=+5.0, spread=10.0)
    worse = judge([clear[0][0], hurt[0][0]], [clear[1][0], hurt[1][0]])
    assert worse.change > 0
    assert worse.z > 0, "where the mean rises, one task's gain is no excuse"


def test_many_tasks_of_noise_are_no_find() -> None:
    """The surest of T tasks is sure by chance: of 400 noises few may pass at 3."""
    found = [judge(*drawn(seed, (30,) * 12, shift=0.0)).z for seed in range(400)]
    assert sum(z < -3 for z in found) <= 4


def test_every_task_counts_the_same_whatever_its_rows() -> None:
    few, many = judge(losses([1.0, 1.0]), losses([0.0, 0.0])), judge(losses([1.0] * 50), losses([1.0] * 50))
    both = judge(losses([1.0, 1.0], [1.0] * 50), losses([0.0, 0.0], [1.0] * 50))
    assert (few.change, many.change, both.change) == (-1.0, 0.0, -0.5)


def test_what_makes_a_row_or_a_task_hard_cancels() -> None:
    without, with_it = drawn(2, (30, 30))
    hard = [torch.linspace(0, 1000, 30, dtype=torch.float64), torch.full((30,), 77.0, dtype=torch.float64)]
    harder = judge(
        [a + h for a, h in zip(without, hard, strict=True)], [b + h for b, h in zip(with_it, hard, strict=True)]
    )
    assert harder.z == pytest.approx(judge(without, with_it).z, rel=1e-9)


def test_rows_that_are_not_pairs_are_another_thing() -> None:
    """Were the rows not compared in pairs, the spread of the losses would swamp a change that every row shows."""
    without = losses([float(i) for i in range(20)])
    with_it = [without[0] - 0.1 - 0.01 * torch.arange(20, dtype=torch.float64)]
    assert judge(without, with_it).z < -5
    assert judge(without, [with_it[0].flip(0)]).z > -1


def test_the_other_way_round_has_the_other_sign() -> None:
    without, with_it = drawn(3, (25,))
    there, back = judge(without, with_it), judge(with_it, without)
    assert (back.change, back.z) == (pytest.approx(-there.change), pytest.approx(-there.z))


def test_nothing_changed_is_no_verdict_and_the_same_change_for_all_is_a_clear_one() -> None:
    without = losses([1.0, 2.0, 3.0])
    nothing = judge(without, without)
    assert (nothing.change, nothing.z) == (0.0, 0.0)
    assert nothing == Judgement(0.0, LEAST, 0.0)
    same = judge(without, losses([0.5, 1.5, 2.5]))
    assert same.z < -5
    assert math.isfinite(same.z)


def test_where_the_mean_stays_a_task_that_gains_for_sure_is_no_reason() -> None:
    found = judge(losses([1.0, 2.0], [3.0, 5.0]), losses([0.0, 0.5], [4.0, 6.5]))
    assert (found.change, found.z) == (0.0, 0.0)
    assert judge(losses([1.0, 2.0]), losses([0.0, 0.5])).z < -1


def test_a_small_error_is_not_taken_for_rounding() -> None:
    found = judge(losses([0.0, 0.0]), losses([1e-8, 3e-8]))
    assert (found.change, found.error) == (pytest.approx(2e-8), pytest.approx(1e-8))
    assert found.z == pytest.approx(normal(2.0, 1))


def test_a_task_that_is_known_to_be_served_is_looked_at_by_itself_and_has_no_price() -> None:
    clear, noisy = drawn(1, (60,), shift=-0.1), drawn(2, (60,), shift=0.0, spread=10.0)
    without, with_it = [clear[0][0], noisy[0][0]], [clear[1][0], noisy[1][0]]
    own, other = (judge(without, with_it, task) for task in (0, 1))
    assert own.z == pytest.approx(judge(*clear).z, rel=1e-12)
    assert own.z < judge(without, with_it).z < other.z, "the surest of two has a price, and another is no help"
    assert own[:2] == other[:2]
    hurt = drawn(2, (60,), shift=+5.0, spread=10.0)
    assert judge([clear[0][0], hurt[0][0]], [clear[1][0], hurt[1][0]], 0).z > 0, "nor where the mean rises"


def test_tasks_have_to_be_the_same() -> None:
    with pytest.raises(ValueError, match="argument"):
        judge(losses([1.0, 2.0]), losses([1.0, 2.0], [1.0, 2.0]))
