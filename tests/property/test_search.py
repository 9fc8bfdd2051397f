"""The search over scales: how many it asks for, what is always among them, and how near it comes to the peak of a
function that has one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.errors import Misconfigured
from continual.rules import ReadOptions
from continual.tuning.search import SLOPES, Axis, Range, Trial, best, lines_of, search, slope

pytestmark = pytest.mark.slow

COUNTS = st.integers(3, 24)
VALUES = st.floats(0.01, 100.0)


def space(value: float = 1.0, count: int = 20, **more: object) -> Range:
    start = ReadOptions("number", value)
    return Range(start, count, "number", **{"around": value, **more})  # type: ignore[arg-type]


@given(COUNTS, VALUES, st.floats(-9.0, 9.0), st.booleans())
def test_exactly_as_many_as_asked_for_all_different_and_what_is_in_force_first(
    count: int, value: float, peak: float, lines: bool
) -> None:
    trials = search(
        lambda o: -abs(math.log(o.value / value) - peak) - (o.lines or (1, 0))[1] ** 2, space(value, count, lines=lines)
    )
    assert len(trials) == count
    assert len({t.options for t in trials}) == count
    assert trials[0].options == ReadOptions("number", value)


@given(VALUES, st.floats(-math.log(4.0), math.log(4.0)), st.floats(0.3, 3.0))
def test_a_peak_within_the_grid_is_found_to_two_percent(value: float, peak: float, power: float) -> None:
    trials = search(lambda o: -(abs(math.log(o.value / value) - peak) ** power), space(value))
    assert abs(math.log(best(trials).options.value / value) - peak) < 0.02


@given(VALUES, st.floats(-math.log(30.0), math.log(30.0)))
def test_a_peak_beyond_its_ends_is_found_to_a_quarter(value: float, peak: float) -> None:
    trials = search(lambda o: -abs(math.log(o.value / value) - peak), space(value))
    assert abs(math.log(best(trials).options.value / value) - peak) < math.log(1.25)


@given(st.floats(-0.9, 1.9), st.floats(0.3, 3.0))
def test_scale_and_slope(b: float, value: float) -> None:
    def worth(o: ReadOptions) -> float:
        return -(math.log(o.value / value) ** 2) - ((o.lines or (1.0, 0.0))[1] - b) ** 2

    trials = search(worth, space(1.0, 36, lines=True))
    chosen = best(trials).options
    found = slope(chosen.lines)
    assert found is not None
    assert abs(found - b) < 0.15
    assert abs(math.log(chosen.value / value)) < 0.03
    assert all(SLOPES[0] <= (t.options.lines or (1.0, 0.0))[1] <= SLOPES[1] for t in trials)


@given(COUNTS, st.booleans(), st.sampled_from([None, (0.5, 1.0), (0.3, 0.3)]))
def test_where_all_are_alike_what_is_in_force_stays(count: int, lines: bool, now: tuple[float, float] | None) -> None:
    start = ReadOptions("norm", 1.5, now)
    trials = search(lambda _: 7.0, Range(start, count, "norm", 1.5, lines=lines))
    assert (best(trials).options, len(trials)) == (start, count)


@given(st.floats(0.2, 8.0), st.floats(1.0, 3.0), COUNTS)
def test_nothing_is_asked_beyond_the_end(value: float, most: float, count: int) -> None:
    trials = search(lambda o: min(o.value, most), Range(ReadOptions("norm", value), count, "norm", value, most))
    read = [min(t.options.value, most) for t in trials]
    assert len(set(read)) == len(read)
    assert all(t.options.value <= most for t in trials[1:])
    assert min(best(trials).options.value, most) >= min(value, most)


def test_of_equal_scores_the_nearest_wins() -> None:
    trials = search(lambda o: float(o.value > 1.4), space(1.0, 8))
    better = [t.options.value for t in trials if t.score]
    assert best(trials).options.value == min(better)
    start = ReadOptions("number", 1.0)
    near, far = ReadOptions("number", 1.0, lines_of(0.5)), ReadOptions("number", 1.0, lines_of(1.5))
    assert best([Trial(start, 0.0), Trial(far, 1.0), Trial(near, 1.0)]).options == near


def test_around_another_value_and_from_zero_or_below() -> None:
    trials = search(lambda o: -abs(o.value - 6.0), space(0.3, around=5.0))
    assert trials[0].options.value == 0.3
    assert trials[1].options.value == 5.0
    assert best(trials).options.value == pytest.approx(6.0, rel=0.02)
    trials = search(lambda o: -abs(o.value - 0.7), space(0.0, around=1.0))
    assert (trials[0].options.value, len(trials)) == (0.0, 20)
    assert best(trials).options.value == pytest.approx(0.7, rel=0.02)
    assert best(search(lambda o: -abs(o.value + 0.7), space(-1.0))).options.value == pytest.approx(-0.7, rel=0.02)
    other = search(lambda o: -abs(o.value - 0.7), Range(ReadOptions("norm", 2.0), 5, "number", 0.5))
    assert [t.options.policy for t in other] == ["norm", "number", "number", "number", "number"]


def test_a_score_that_is_none_names_the_candidate() -> None:
    with pytest.raises(Misconfigured, match=r"candidate 4\.0: its score is nan"):
        search(lambda o: math.nan if o.value == 4.0 else 1.0, space())


@pytest.mark.parametrize(
    ("policy", "around", "count", "words"),
    [
        ("number", 0.0, 5, "other than 0"),
        ("norm", -1.0, 5, "above 0"),
        ("number", math.inf, 5, "around"),
        ("norm", 1.0, 2, "at least 3"),
    ],
)
def test_spaces_that_make_no_sense(policy: str, around: float, count: int, words: str) -> None:
    with pytest.raises(Misconfigured, match=words):
        Range(ReadOptions("norm"), count, policy, around)  # type: ignore[arg-type]


def test_of_equal_numbers_the_one_nearest_to_where_the_search_began_leads_it() -> None:
    assert Axis(0.0, math.inf, near=3.0, geometric=True).top({1.0: 5.0, 4.0: 5.0, 3.0: 1.0}) == 4.0
    assert Axis(-1.0, 2.0, near=0.4, geometric=False).top({1.0: 5.0, 0.0: 5.0, 2.0: 5.0}) == 0.0
