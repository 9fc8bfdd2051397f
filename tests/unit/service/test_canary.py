"""When a candidate is looked at and what follows, what Prometheus may answer, and which settings are refused; without a
state and without a daemon."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.config import CanarySettings, Settings
from continual.errors import Misconfigured
from continual.service import telling, view_settings
from continual.service.canary import measuring, verdicts
from continual.state.canaries import CanaryRecord, Measurement
from tests.helpers.prometheus import told

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
START = CanaryRecord(view=None, seq=5, mark="m", back=3, phase="watched", since=verdicts.moment(NOW))


def canary(**said: Any) -> CanarySettings:
    return CanarySettings.model_validate({"query": "q", "max": 1.0, "interval": 60.0, **said})


def watched(words: str, **said: Any) -> CanaryRecord:
    """A candidate after measurements a minute apart: `p` passed, `f` failed, `i` inconclusive."""
    record, asked = START, canary(**said)
    kinds: dict[str, Any] = {"p": "passed", "f": "failed", "i": "inconclusive"}
    for number, word in enumerate(words, 1):
        now = NOW + timedelta(seconds=60 * number)
        found = Measurement(
            time=verdicts.moment(now), verdict=kinds[word], said=f"look {number}", values=(float(number),)
        )
        record = verdicts.measured(record, found, asked, now)
    return record


@pytest.mark.parametrize(
    ("words", "said", "phase"),
    [
        ("f", {}, "watched"),
        ("ff", {}, "failed"),
        ("fppf", {}, "failed"),
        ("fppppf", {}, "watched"),
        ("fiiif", {}, "failed"),
        ("f", {"failure_limit": 1}, "failed"),
        ("iiiiiiii", {"after": 60.0}, "watched"),
        ("p", {"after": 60.0}, "watched"),
        ("pp", {"after": 60.0}, "promoted"),
        ("ppi", {"after": 120.0}, "watched"),
        ("ppipp", {"after": 120.0}, "watched"),
        ("ppippp", {"after": 120.0}, "promoted"),
        ("fppp", {"after": 120.0}, "promoted"),
        ("ppppppppp", {}, "watched"),
    ],
)
def test_what_follows_from_what_was_measured(words: str, said: dict[str, Any], phase: str) -> None:
    assert watched(words, **said).phase == phase


def test_what_failed_is_said_with_its_values_and_no_more_is_kept_than_counts() -> None:
    record = watched("pppfpf")
    assert (record.phase, record.by, record.measurements, len(record.measured)) == ("failed", "metric", 6, 5)
    assert record.why == "look 6; 2 of the last 5 measurements were alarms (4, 6)"
    assert watched("fff").measurements == 2, "it is decided"
    assert verdicts.inconclusive(watched("ipii")) == 2
    assert verdicts.inconclusive(watched("")) == 0


@pytest.mark.parametrize(
    ("record", "said", "later", "seconds"),
    [
        (START, {}, 0, 60.0),
        (START, {}, 45, 15.0),
        (START, {}, 600, 0.0),
        (START, {}, -600, 0.0),
        (watched("p"), {}, -600, 0.0),
        (watched("p"), {}, 70, 50.0),
        (watched("pf"), {}, 130, 20.0),
        (watched("fi"), {}, 130, 50.0),
        (START, {"query": None, "max": None}, 0, None),
        (START, {"query": None, "max": None, "after": 90.0}, 30, 60.0),
        (START, {"query": None, "max": None, "after": 90.0}, -30, 0.0),
    ],
)
def test_when_a_candidate_is_looked_at(
    record: CanaryRecord, said: dict[str, Any], later: float, seconds: float | None
) -> None:
    assert verdicts.wait(record, canary(**said), NOW + timedelta(seconds=later)) == seconds


def test_one_of_which_nothing_is_measured_is_promoted_by_time_alone() -> None:
    asked = canary(query=None, max=None, after=90.0)
    for later, phase in ((89, "watched"), (90, "promoted")):
        assert verdicts.measured(START, None, asked, NOW + timedelta(seconds=later)).phase == phase


def looked(record: CanaryRecord, seconds: float, took: float = 0.0, **said: Any) -> CanaryRecord:
    """After a look that passed, so many seconds after the beginning."""
    now = NOW + timedelta(seconds=seconds)
    found = Measurement(time=verdicts.moment(now), verdict="passed", said="quiet")
    return verdicts.measured(record, found, canary(**said), now, took)


def test_a_clock_that_went_back_neither_stops_the_watch_nor_holds_up_the_promotion() -> None:
    record = watched("pp", after=3600.0)
    for seconds in (-86_000, -84_000):
        record = looked(record, seconds, took=2000.0, after=3600.0)
    assert (record.phase, record.since) == ("watched", verdicts.moment(NOW - timedelta(seconds=86_000)))
    assert looked(record, -82_000, took=2000.0, after=3600.0).phase == "promoted"
    quiet = verdicts.measured(START, None, canary(query=None, max=None, after=90.0), NOW - timedelta(days=1))
    assert (quiet.phase, quiet.since) == ("watched", verdicts.moment(NOW - timedelta(days=1)))


def test_hours_in_which_nobody_looked_are_not_quiet_hours() -> None:
    """A daemon that was down, or a clock that jumped: one look is not a quiet hour."""
    record = looked(watched("pp", after=3600.0), 86_400, after=3600.0)
    assert (record.phase, record.passed) == ("watched", verdicts.moment(NOW + timedelta(days=1)))
    assert looked(watched("pp", after=3600.0), 7200, took=7000.0, after=3600.0).phase == "promoted"


@given(st.text("pfi", max_size=12), st.integers(1, 5))
def test_a_candidate_is_taken_back_exactly_when_so_many_of_the_newest_are_alarms(words: str, limit: int) -> None:
    expected = any(words[max(0, end - 5) : end].count("f") >= limit for end in range(1, len(words) + 1))
    assert (watched(words, failure_limit=limit).phase == "failed") == expected


def success(data: object) -> dict[str, object]:
    return {"status": "success", "data": data}


ANSWERS: list[tuple[Any, dict[str, Any], str, str]] = [
    ([0.5, 0.2], {}, "passed", "query q: 0.5, 0.2"),
    ([1.0], {}, "passed", "query q: 1"),
    ([0.1, 1.5], {}, "failed", "query q: 1.5 is above max = 1"),
    ([0.1, 1.5], {"min": 0.4}, "failed", "1.5 is above max"),
    ([0.1, 0.9], {"min": 0.4}, "failed", "0.1 is below min = 0.4"),
    ([math.inf], {}, "failed", "inf is above max"),
    ([math.nan, 0.5], {}, "inconclusive", "NaN"),
    ([math.nan], {}, "inconclusive", "NaN"),
    ([math.nan, 9.0], {}, "failed", "9 is above max"),
    ([], {}, "inconclusive", "query q: no data"),
    (success({"resultType": "scalar", "result": [1, "7"]}), {}, "failed", "7 is above"),
    (success({"resultType": "matrix", "result": []}), {}, "inconclusive", "is a matrix"),
    (
        {"status": "success", "data": {"resultType": "vector", "result": [{"histogram": []}]}},
        {},
        "inconclusive",
        "no number",
    ),
    (success({"resultType": "vector", "result": [3]}), {}, "inconclusive", "no number"),
    (success({"resultType": "scalar", "result": [1, "seven"]}), {}, "inconclusive", "no number"),
    (success({"resultType": "vector", "result": [{}] * 1001}), {}, "inconclusive", "too many"),
    ({"status": "error", "error": "parse error: unexpected end"}, {}, "inconclusive", "parse error"),
    ({"status": "success"}, {}, "inconclusive", "its result is a"),
    (b"<html>", {}, "inconclusive", "no JSON"),
    (b"[1]", {}, "inconclusive", "no JSON"),
    (b"[" * 2_000_000, {}, "inconclusive", "more than 1048576 bytes"),
]


def test_what_prometheus_may_answer() -> None:
    with told() as server:
        for answer, said, verdict, text in ANSWERS:
            server.values, server.body = (answer, None) if isinstance(answer, list) else ([], answer)
            seen = measuring.queried(canary(prometheus=f"{server.url}/", **said))
            assert (seen.verdict, text in seen.said) == (verdict, True), seen
        server.status, server.body = 503, {"status": "error", "error": "starting"}
        assert measuring.queried(canary(prometheus=server.url)).verdict == "inconclusive"
        gone = server.url
    seen = measuring.queried(canary(prometheus=gone))
    assert (seen.verdict, "cannot be asked (Connection refused)" in seen.said) == ("inconclusive", True)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"query": "q"}, "query has no limit"),
    ({"query": " ", "max": 1}, "query is empty"),
    ({"max": 1}, "max and min are limits of a query"),
    ({"query": "q", "min": 2, "max": 1}, r"min = 2 is above max = 1"),
    ({"count": 2, "failure_limit": 3}, "can never be reached"),
    ({"evaluate": True}, "set command, objective or lm_eval in evaluation"),
    ({"branch": "main"}, "releases are promoted to that branch"),
    ({"branch": "a b"}, "a branch is letters"),
    ({"query": "q", "max": 1, "prometheus": "ftp://x"}, "http:// or https://"),
    ({"query": "q", "max": 1, "prometheus": "http://u:p@x"}, "credentials"),
    ({"query": "q", "max": 1, "prometheus": "http://x:port"}, "cannot be read"),
    ({"query": "q", "max": 1, "prometheus": "http://x/?a=1"}, "with nothing after"),
]


@pytest.mark.parametrize(("table", "said"), WRONG)
def test_settings_that_do_not_fit_are_refused_in_words(table: dict[str, Any], said: str) -> None:
    given = {"release": {"repo": "o/r", "canary": table}, "current": "c"}
    with pytest.raises(Misconfigured, match=rf"^release\.canary: .*{said}"):
        view_settings.check(Settings.model_validate(given))
    of_view = {"views": {"v": {"repo": "o/r", "current": "c", "canary": table}}}
    with pytest.raises(Misconfigured, match=rf"^views\.v\.canary: .*{said}"):
        view_settings.check(Settings.model_validate(of_view))


def test_a_canary_needs_a_place_and_has_it_alone() -> None:
    def check(**given: Any) -> None:
        found = Settings.model_validate(given)
        view_settings.check(found)
        telling.check(found)

    with pytest.raises(Misconfigured, match="nothing goes out"):
        check(release={"canary": {}})
    with pytest.raises(Misconfigured, match="one canary is watched at a time"):
        check(release={"repo": "o/r", "every": True, "canary": {}})
    with pytest.raises(Misconfigured, match=r"the canary of the merge = c-candidate: views\.v\.current goes there"):
        check(current="c", release={"canary": {}}, views={"v": {"current": "c-candidate"}})
    hook = {"kind": "http", "url": "http://127.0.0.1:9/", "after": "candidate"}
    with pytest.raises(Misconfigured, match=r"after = candidate, and release\.canary is not set"):
        check(current="c", hooks=[hook])
    with pytest.raises(Misconfigured, match=r"after = candidate, and views\.NAME\.canary is not set"):
        check(current="c", release={"canary": {}}, views={"v": {"current": "d"}}, hooks=[{**hook, "view": "*"}])
    check(current="c", release={"canary": {}}, hooks=[hook])
