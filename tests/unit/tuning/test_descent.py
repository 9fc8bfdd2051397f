"""The steps that follow slopes, over losses that are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from continual.tuning.descent import Here, descend

Point = tuple[float, ...]


def followed(loss: Callable[[list[float]], Here], count: int, candidates: int, most: float = 64.0) -> list[Point]:
    """What is asked for, by the logarithms."""
    asked: list[Point] = []

    def evaluate(factors: Point) -> Here:
        asked.append(factors)
        return loss([math.log(factor) for factor in factors])

    descend(evaluate, count, candidates, most)
    return asked


def bowl(lowest: list[float], steep: list[float]) -> Callable[[list[float]], Here]:
    def loss(at: list[float]) -> Here:
        apart = [x - x0 for x, x0 in zip(at, lowest, strict=True)]
        return Here(
            1.0 + sum(s * d * d for s, d in zip(steep, apart, strict=True)),
            tuple(2 * s * d for s, d in zip(steep, apart, strict=True)),
        )

    return loss


def test_a_bowl_is_gone_down_to_its_ground() -> None:
    lowest = [0.9, -1.3, 0.2, 0.0]
    asked = followed(bowl(lowest, [1.0, 4.0, 0.5, 2.0]), 4, 40)
    assert asked[0] == (1.0,) * 4
    assert [math.log(factor) for factor in asked[-1]] == pytest.approx(lowest, abs=0.02)
    assert len(asked) < 25, "it ends where nothing is left to find"


def test_no_factor_passes_the_bound_and_the_others_go_on() -> None:
    asked = followed(bowl([9.0, 0.7], [1.0, 1.0]), 2, 40, most=8.0)
    assert all(1 / 8 <= factor <= 8 for point in asked for factor in point)
    assert asked[-1] == pytest.approx((8.0, math.exp(0.7)), rel=0.02)


def test_it_asks_for_no_more_than_it_may_and_for_nothing_where_all_is_flat() -> None:
    assert len(followed(bowl([3.0, 3.0], [1.0, 300.0]), 2, 5)) == 5
    assert followed(lambda _: Here(1.0, (0.0, 0.0)), 2, 5) == [(1.0, 1.0)]
    assert followed(lambda _: Here(math.nan, (1.0,)), 1, 5) == [(1.0,)]


@pytest.mark.parametrize("cliff", [math.nan, math.inf])
def test_a_step_over_a_cliff_is_shortened(cliff: float) -> None:
    def loss(at: list[float]) -> Here:
        return Here(cliff, (1.0,)) if at[0] > 0.3 else Here(1.0 - at[0], (-1.0,))

    asked = followed(loss, 1, 12)
    assert max(point[0] for point in asked) > math.exp(0.3)
    assert asked[1][0] > asked[2][0] > 1.0
    assert any(1.1 < point[0] < math.exp(0.3) for point in asked)


def test_a_loss_that_rises_along_the_step_is_left_where_it_was_lowest() -> None:
    asked = followed(bowl([0.05], [1.0]), 1, 12)
    assert asked[1][0] == pytest.approx(2.0)
    assert asked[-1][0] == pytest.approx(math.exp(0.05), rel=5e-3)
