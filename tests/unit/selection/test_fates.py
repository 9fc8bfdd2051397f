"""What becomes of a candidate that was not folded, and who is too many: pure decisions on made-up pools."""

from __future__ import annotations

import pytest

from continual.errors import Refuse
from continual.selection import fates
from continual.selection.judging import Judgement
from continual.selection.members import Member
from continual.selection.round_options import DAY
from continual.state.parts import MemberFate
from tests.helpers.entries import candidate
from tests.helpers.waiting import NOW, OPTIONS, waiting

ALICE = Member(candidate("alice"))

HELPS = Judgement(-1.0, 0.1, -10.0)

HURTS = Judgement(+0.2, 0.1, +2.0)


def test_the_one_without_promise_waits_until_patience_is_at_its_end() -> None:
    rows = [fates.kept_out(ALICE, waiting(5, done), -0.5, HURTS, NOW, OPTIONS) for done in range(3)]
    assert [(r.fate, r.reason, r.judged) for r in rows] == [("deferred", "irrelevant", 1)] * 2 + [
        ("refused", "irrelevant", 1)
    ]
    assert "round 1 of 3" in rows[0].message
    assert "+0.2 ± 0.1 (z +2.0, relevant below -3)" in rows[0].message
    assert "continual retry alice" in rows[2].message
    assert (rows[0].score, rows[0].change, rows[0].error, rows[0].z) == (-0.5, 0.2, 0.1, 2.0)


def test_one_that_was_not_tried_has_no_verdict_and_says_why() -> None:
    row = fates.kept_out(ALICE, waiting(5), 0.25, None, NOW, OPTIONS)
    assert (row.score, row.change, row.error, row.z, row.judged) == (0.25, None, None, None, 1)
    assert "its score is +0.25, and the objective falls only below zero" in row.message
    assert "was not scored" in fates.kept_out(ALICE, waiting(5), None, None, NOW, OPTIONS).message


def test_at_sigmas_exactly_one_is_not_relevant() -> None:
    just, more = Judgement(-0.3, 0.1, -3.0), Judgement(-0.3, 0.1, -3.0000001)
    assert fates.kept_out(ALICE, waiting(5), -0.5, just, NOW, OPTIONS).reason == "irrelevant"
    assert fates.kept_out(ALICE, waiting(5), -0.5, more, NOW, OPTIONS).reason == "no-place"
    assert [fates.seen(ALICE, -0.5, found, OPTIONS).reason for found in (just, more)] == ["irrelevant", "relevant"]


def test_one_that_helps_and_found_no_place_is_not_counted_against() -> None:
    row = fates.kept_out(ALICE, waiting(5, 2), -0.5, HELPS, NOW, OPTIONS)
    assert (row.fate, row.reason, row.judged) == ("deferred", "no-place", 0)


@pytest.mark.parametrize("verdict", [None, HURTS, HELPS])
def test_who_has_waited_too_long_expires(verdict: Judgement | None) -> None:
    """Whatever the round found of it: else it would make a round due for ever."""
    row = fates.kept_out(ALICE, waiting(10 * DAY), -0.5, verdict, NOW, OPTIONS)
    assert (row.fate, row.reason, row.judged) == ("expired", "age", 1)
    assert "waited 10.0 days (rounds.age is 10)" in row.message
    assert fates.kept_out(ALICE, waiting(10 * DAY - 1), -0.5, verdict, NOW, OPTIONS).fate == "deferred"


def test_a_member_that_is_gone_expires_and_a_bad_one_is_refused() -> None:
    gone, bad = (
        fates.lost(ALICE, Refuse("gone", "alice: not there")),
        fates.lost(ALICE, Refuse("nan", "alice: NaN in x")),
    )
    assert (gone.fate, gone.reason, gone.message) == ("expired", "gone", "alice: not there")
    assert (bad.fate, bad.reason, bad.message) == ("refused", "nan", "alice: NaN in x")


def test_a_look_decides_nothing() -> None:
    rows = [fates.seen(ALICE, -0.5, verdict, OPTIONS) for verdict in (HELPS, HURTS, None)]
    assert [(r.fate, r.reason, r.judged) for r in rows] == [
        ("deferred", "relevant", 0),
        ("deferred", "irrelevant", 0),
        ("deferred", "irrelevant", 0),
    ]


def test_of_too_many_the_oldest_expire_and_only_those_that_would_wait_count() -> None:
    ages = {"a": 40, "b": 50, "c": 10, "d": 20, "e": 30, "f": 99}
    found = {key: waiting(age) for key, age in ages.items()}
    rows = [MemberFate(key, key, "folded" if key == "f" else "deferred", "irrelevant", "", 1, z=1.0) for key in ages]
    crowded = {row.key: row for row in fates.crowded(rows, found, OPTIONS)}
    assert {key: row.fate for key, row in crowded.items()} == {
        "a": "expired",
        "b": "expired",
        "c": "deferred",
        "d": "deferred",
        "e": "deferred",
        "f": "folded",
    }
    assert (crowded["b"].reason, crowded["b"].z) == ("count", 1.0)
    assert "rounds.most = 3" in crowded["b"].message
    assert [row.key for row in fates.crowded(rows, found, OPTIONS)] == list(ages), "the order of the table stays"
    assert fates.crowded(rows[:3], found, OPTIONS) == rows[:3]
