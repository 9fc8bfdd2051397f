"""The totals of the whole model: what a fold adds to them, what they say of the length of the merge, and how a record
has them."""

from __future__ import annotations

import math

import pytest

from continual.records import MatrixTotals, Totals
from continual.rules import RULES, Size, Sums, rule, settle, sums, together

ONE = Sums(tau_sq=25.0, dot=1.0, merged_sq=7.0, matrix_sq=16.0, top_sq=4.0)
TWO = Sums(tau_sq=9.0, dot=2.0, merged_sq=11.0, matrix_sq=9.0, top_sq=9.0)


def test_a_fold_adds_the_norms_of_its_task_vector() -> None:
    once = settle(Totals(), ONE, 2.0)
    rho = math.sqrt(16.0 / 4.0)
    assert once == Totals(count=1, weight=2, norm_sum=5, merged_sq=7, matrices=MatrixTotals(4, 3, 4 * rho))
    twice = settle(once, TWO, 0.5)
    assert twice == Totals(count=2, weight=2.5, norm_sum=8, merged_sq=11, matrices=MatrixTotals(7, 3, 11))


def test_a_negative_weight_takes_the_norms_out_again() -> None:
    twice = settle(settle(Totals(), ONE, 2.0), TWO, 1.0)
    assert settle(twice, TWO._replace(merged_sq=7.0), -1.0) == settle(Totals(), ONE, 2.0)


@pytest.mark.parametrize("weight", [-2.0, -1.0])
def test_none_left_is_exactly_nothing(weight: float) -> None:
    """Also where the weights cancel while a count is left, or the count while a weight is."""
    found = settle(Totals(1.0, 2.0, 5.0, 7.0, MatrixTotals(4.0, 3.0, 8.0)), ONE._replace(merged_sq=1e-9), weight)
    assert found == Totals(matrices=MatrixTotals())
    assert settle(Totals(3.0, 2.0, 5.0, 7.0), Sums(25.0, 0.0, 1.0), -2.0) == Totals()


def test_without_matrices_there_are_no_totals_of_matrices() -> None:
    assert settle(Totals(), Sums(25.0, 0.0, 25.0), 1.0) == Totals(1.0, 1.0, 5.0, 25.0)


def test_a_matrix_that_is_zero_and_one_that_rounding_made_larger_than_the_whole() -> None:
    assert settle(Totals(), Sums(9.0, 0.0, 9.0, 0.0, 0.0), 1.0).matrices == MatrixTotals(0.0, 3.0, 0.0)
    assert settle(Totals(), Sums(9.0, 0.0, 9.0, 9.0 + 1e-12, 9.0), 1.0).matrices == pytest.approx((3.0, 0.0, 3.0))


def test_two_states_together_have_the_sums_of_both_but_no_length() -> None:
    ours, theirs = settle(Totals(), ONE, 2.0), settle(Totals(), TWO, 1.0)
    assert together(ours, theirs) == Totals(2.0, 3.0, 8.0, 0.0, MatrixTotals(7.0, 3.0, 11.0))
    plain = Totals(1.0, 1.0, 3.0, 9.0)
    assert together(plain, plain) == Totals(2.0, 2.0, 6.0)
    assert together(ours, plain).matrices == together(plain, ours).matrices == ours.matrices


def test_sums_of_tensors_are_added_exactly_whatever_their_order() -> None:
    parts = [Sums(1e16, 1.0, 1.0, 2.0, 3.0), Sums(1.0, 1.0, 1.0), Sums(-1e16, 1.0, 1.0, 4.0, 5.0)]
    for order in (parts, parts[::-1]):
        assert Sums.total(order) == Sums(1.0, 3.0, 3.0, 6.0, 8.0)
    assert Sums.total(parts[1:2]) == parts[1], "what no part has is not 0"
    assert Sums.total([]) == Sums(0.0, 0.0, 0.0)


@pytest.mark.parametrize("matrices", [None, MatrixTotals(4.0, 5.0, 6.0)])
def test_a_record_has_them_by_their_names(matrices: MatrixTotals | None) -> None:
    totals = Totals(2.0, 3.0, 7.0, 1.0, matrices)
    body = {"count": 2.0, "weight": 3.0, "norm_sum": 7.0, "merged_sq": 1.0}
    if matrices is not None:
        body |= {"matrix_norm_sum": 4.0, "plain_norm_sum": 5.0, "spread_sum": 6.0}
    assert totals.body() == body
    assert Totals.of(body) == totals
    assert Totals.of({}) == Totals()


def test_how_long_a_merge_is_by_its_totals() -> None:
    totals = Totals(count=2.0, weight=4.0, norm_sum=8.0, merged_sq=16.0)
    assert sums.size(totals) == Size(length=4.0, most=1.0)
    assert sums.size_of_mean(totals) == Size(length=1.0, most=4.0)
    assert sums.unknown(totals) == Size(length=None, most=4.0)
    assert rule("fisher").read.size(totals) == Size(length=4.0)
    assert rule("opcm").read.gauges(totals) == {"lambda": 4.0 / (8.0 / 2.0)}
    for name in RULES:
        made = rule(name).read
        assert made.size(Totals()).length in (None, 0.0)
        assert made.gauges(Totals()) == {}
