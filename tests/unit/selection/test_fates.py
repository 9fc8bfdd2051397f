"""What becomes of a candidate that was not folded, who is too many, and when a round is due: pure decisions on made-up
pools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.config import RoundSettings, Settings
from continual.errors import Misconfigured, Refuse
from continual.objectives.calibration import Wanted
from continual.selection import clock, fates, is_due, next_due, options_of
from continual.selection.judging import Judgement
from continual.selection.members import Member
from continual.selection.round_options import DAY, RoundOptions
from continual.state.entries import DeferEntry
from continual.state.format import Commit
from continual.state.ledger import Waiting
from continual.state.parts import MemberFate
from tests.helpers.entries import candidate, row

NOW = "2030-01-31T12:00:00.000Z"


def options(**changes: Any) -> RoundOptions:
    given = {"patience": 3, "age": 10 * DAY, "most": 3, "size": 4, "wait": 100.0}
    return RoundOptions.of(RoundSettings.model_validate(given | changes), Wanted("tests.helpers.quadratic:make"))


OPTIONS = options()
ALICE = Member(candidate("alice"))
HELPS, HURTS = Judgement(-1.0, 0.1, -10.0), Judgement(+0.2, 0.1, +2.0)


def ago(seconds: float) -> str:
    moment = datetime.fromisoformat(NOW) - timedelta(seconds=seconds)
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def waiting(seconds: float = 0.0, rounds: int = 0, *, seen: bool = False) -> Waiting:
    time = ago(seconds)
    commit = Commit(1, None, "", None, None, time, DeferEntry(candidate=candidate("n")))
    return Waiting(commit, time, rounds, row("n", "deferred", 1) if seen or rounds else None)


def pool(*found: Waiting) -> dict[str, Waiting]:
    return {f"k{i}": w for i, w in enumerate(found)}


@pytest.mark.parametrize("name", ["trial", "sigmas", "patience", "age", "most", "size", "wait"])
def test_what_cannot_be_asked_is_named(name: str) -> None:
    with pytest.raises(Misconfigured, match=f"rounds: {name} = -1"):
        options(**{name: -1})


@pytest.mark.parametrize(
    "name", ["step", "rho", "search", "best", "active", "steps", "inner", "tolerance", "batch", "held", "dtype"]
)
def test_settings_that_a_plan_or_a_calibration_refuses_are_named(name: str) -> None:
    bad: Mapping[str, Any] = {"step": "big", "search": "wide", "dtype": "int4", "held": 1.5}
    settings_ = Settings.model_validate(
        {"objective": "tests.helpers.quadratic:make", "rounds": {name: bad.get(name, -1)}}
    )
    with pytest.raises(Misconfigured, match=name):
        options_of(settings_)


def test_layers_go_with_corrective_unless_said_otherwise_and_not_with_pairwise() -> None:
    def layers(**rounds: Any) -> bool:
        return options_of(
            Settings.model_validate({"objective": "tests.helpers.quadratic:make", "rounds": rounds})
        ).layers

    assert [layers(), layers(step="hard"), layers(step="hard", layers=True), layers(layers=False)] == [
        True,
        False,
        True,
        False,
    ]
    assert not layers(step="pairwise")
    for step in ("pairwise", "soft"):
        with pytest.raises(Misconfigured, match=f"{step} weighs whole models"):
            layers(step=step, layers=True)


def test_no_objective_is_said_with_what_there_is() -> None:
    with pytest.raises(Misconfigured, match=r"objective: .*causal-lm, classification or heads.*module:function"):
        options_of(Settings.model_validate({"select": "relevance"}))


def test_what_a_record_keeps_changes_with_all_that_the_choice_depends_on() -> None:
    """A round that was cut off goes on only if the same is asked; when one is due is not part of that."""
    assert options(size=1, wait=1.0).told() == OPTIONS.told()
    others: Mapping[str, Any] = {
        "trial": 0.5,
        "sigmas": 2.0,
        "stays": 0.5,
        "patience": 9,
        "step": "hard",
        "rho": 2.0,
        "search": "decay",
        "layers": False,
        "tolerance": 0.5,
        "steps": 3,
        "best": 2,
        "active": 5,
        "inner": 9,
        "age": 7.0,
        "most": 5,
    }
    assert {field.name for field in fields(OPTIONS.told())} == set(others)
    for name, value in others.items():
        changed = {name: value, **({"step": "hard"} if name == "search" else {})}
        assert getattr(options(**changed).told(), name) != getattr(OPTIONS.told(), name), name


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


def test_one_that_helps_and_found_no_place_is_not_counted_against() -> None:
    row = fates.kept_out(ALICE, waiting(5, 2), -0.5, HELPS, NOW, OPTIONS)
    assert (row.fate, row.reason, row.judged) == ("deferred", "no-place", 0)


@pytest.mark.parametrize("verdict", [None, HURTS, HELPS])
def test_who_has_waited_too_long_expires(verdict: Judgement | None) -> None:
    """Whatever the round found of it: else it would make a round due for ever."""
    row = fates.kept_out(ALICE, waiting(10 * DAY), -0.5, verdict, NOW, OPTIONS)
    assert (row.fate, row.reason) == ("expired", "age")
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


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (pool(), False),
        (pool(waiting(99.0), waiting(1.0)), False),
        (pool(waiting(100.0), waiting(1.0)), True),
        (pool(*[waiting(1.0)] * 3), False),
        (pool(*[waiting(1.0)] * 4), True),
        (pool(*[waiting(200.0, 1)] * 9), False),  # judged before: nothing new to find
        (pool(*[waiting(1.0)] * 3, waiting(200.0, 1)), False),
        (pool(waiting(200.0, seen=True)), False),
        (pool(waiting(10 * DAY, 1)), True),
    ],
)
def test_when_a_round_is_due(found: dict[str, Waiting], expected: bool) -> None:
    assert is_due(found, OPTIONS, NOW) is expected


def test_when_the_next_is_due_if_nothing_comes() -> None:
    assert next_due(pool(), OPTIONS, NOW) is None
    assert next_due(pool(waiting(30.0), waiting(10.0)), OPTIONS, NOW) == 70.0
    assert next_due(pool(waiting(130.0)), OPTIONS, NOW) == 0.0
    assert next_due(pool(waiting(DAY, 1)), OPTIONS, NOW) == 9 * DAY


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=4), st.integers(40, 200), st.integers(40, 200))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_waiting_till_the_next_finds_it_due_and_not_before(found: list[tuple[int, bool]], wait: int, age: int) -> None:
    chosen = options(wait=float(wait), age=float(age), size=9)
    candidates = pool(*(waiting(float(seconds), seen=seen) for seconds, seen in found))
    left = next_due(candidates, chosen, NOW)
    if left is None:
        assert not candidates
        return
    assert is_due(candidates, chosen, ago(-left))
    if not is_due(candidates, chosen, NOW):
        assert left > 0
        assert not is_due(candidates, chosen, ago(-(left - 0.5)))


def test_the_clock_is_as_the_records_have_it() -> None:
    assert abs(fates.seconds(clock(), datetime.now(UTC).isoformat())) < 5
    assert clock().endswith("Z")
    assert len(clock()) == len(NOW)
