"""The search along a line: what it finds, and how often it evaluates."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.selection.steps import minimise
from tests.helpers.hulls import (
    quick,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("minimum", "gamma"), [(1 - 5e-7, 1.0), (1 - 5e-6, 1 - 5e-6), (1.5, 1.0), (0.25, 0.25), (1e-3, 1e-3)]
)
def test_a_search_of_a_parabola_takes_two_evaluations_and_goes_all_the_way_near_its_bound(
    minimum: float, gamma: float
) -> None:
    asked: list[float] = []

    def phi(x: float) -> float:
        asked.append(x)
        return (x - minimum) ** 2

    assert minimise(phi, minimum**2, -2 * minimum, 1.0) == pytest.approx(gamma, rel=1e-9)
    assert len(asked) == (1 if gamma == 1 else 2)


def test_a_search_keeps_the_end_of_the_way_where_the_parabola_leads_to_worse() -> None:
    assert minimise(lambda x: -0.3 if x == 1 else -0.1, 0.0, -1.0, 1.0) == 1.0


@given(
    st.sampled_from([0.05, 0.3, 0.7, 2.0]),
    st.sampled_from([2.0, 4.0, 20.0]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.booleans(),
)
@quick
def test_a_search_lowers_what_it_is_given_and_gives_up_after_eight(
    where: float, power: float, most: float, eager: bool
) -> None:
    asked: list[float] = []

    def phi(x: float) -> float:
        asked.append(x)
        return abs(x / where - 1) ** power if x < 2.5 else math.nan

    gamma = minimise(phi, 1.0, -power / where, most, eager=eager)
    assert 0 < gamma <= most
    assert phi(gamma) < 1
    assert len(asked) <= 9
    asked.clear()
    assert minimise(lambda x: asked.append(x) or 2.0, 1.0, -1.0, most) == 0.0  # type: ignore[func-returns-value]
    assert len(asked) == 8
