"""The metrics that a command prints, and which of them are worse."""

from __future__ import annotations

import json
import math

import pytest

from continual.evaluation.scores import Metric, compare, mean, parse


def test_numbers_rows_and_objects() -> None:
    assert parse('{"acc": {"a": 0.5, "b": [1, 0, true]}, "loss": 2}') == {
        "acc.a": 0.5,
        "acc.b": (1.0, 0.0, 1.0),
        "loss": 2.0,
    }
    assert mean((1.0, 0.0, 0.5, 0.5)) == 0.5


@pytest.mark.parametrize(
    "line", ["", "0.5", "[1]", "{}", '{"a": "x"}', '{"a": []}', '{"a": NaN}', '{"a": [null]}', "{"]
)
def test_what_is_no_metric_is_said(line: str) -> None:
    with pytest.raises(ValueError, match=r"printed nothing|no JSON object|no metric|no finite number|no row"):
        parse(line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f'{{"a": {"9" * 400}}}', "no finite number"),
        ('{"a": [1, 1e200]}', "no finite number up to 1e\\+100"),
        ('{"a": ' * 900 + "1" + "}" * 900, "levels deep"),
        ('{"a": 1, "a": 2}', "there twice"),
        ('{"a.b": 1, "a": {"b": 2}}', "two of its metrics are called a.b"),
        ('{"\\u001b[31m": 1}', "no name of a metric"),
        ('{"": 1}', "no name of a metric"),
        ('{"\\ud800": 1}', "surrogate"),
        (json.dumps({f"m{n}": 1 for n in range(1001)}), "1000 are the most"),
        ("[" * 200_000, "no JSON object"),
    ],
)
def test_hostile_metrics_are_said(line: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(line)


ROWS = (1.0,) * 60 + (0.0,) * 40
FOUR_WORSE = (0.0,) * 4 + ROWS[4:]
TWO_EACH = (0.0, 0.0, *ROWS[2:60], 1.0, *ROWS[61:])


@pytest.mark.parametrize(
    ("before", "after", "worse", "unclear"),
    [
        (0.8, 0.795, [], []),
        (0.8, 0.78, ["acc"], []),
        (0.8, 0.9, [], []),
        (ROWS, ROWS, [], []),
        (ROWS, FOUR_WORSE, ["acc"], []),
        (ROWS, TWO_EACH, [], []),
        (ROWS[:1], ROWS[-1:], ["acc"], []),  # of one row nothing is known of chance
        (ROWS, ROWS[:99], [], []),  # other rows: their means
    ],
)
def test_what_is_worse(before: Metric, after: Metric, worse: list[str], unclear: list[str]) -> None:
    found = compare({"acc": before}, {"acc": after}, 0.01)
    assert ([one.name for one in found.worse], [one.name for one in found.unclear]) == (worse, unclear)


def test_what_may_be_chance_is_unclear() -> None:
    after = tuple(one + (0.3 if n % 2 else -0.34) for n, one in enumerate(ROWS))
    found = compare({"acc": ROWS}, {"acc": after}, 0.01)
    assert not found.worse
    assert found.unclear[0].drop == pytest.approx(0.02)
    assert found.unclear[0].error == pytest.approx(0.032, rel=0.02)
    assert compare({"acc": ROWS}, {"acc": after}, 0.01, sigmas=0.5).worse


def test_each_metric_counts_alone_and_none_may_be_missing() -> None:
    found = compare({"a": 0.5, "b": 0.5, "c": 0.5}, {"a": 0.9, "b": 0.4}, 0.01)
    assert [(one.name, one.drop) for one in found.worse] == [("b", pytest.approx(0.1)), ("c", math.inf)]
    assert not compare({"a": 0.5}, {"a": 0.5, "new": 0.1}, 0.01).worse


def test_less_of_a_loss_is_better() -> None:
    assert not compare({"loss": 2.0}, {"loss": 1.0}, 0.01, lower=["loss"]).worse
    assert compare({"loss": 2.0}, {"loss": 2.1}, 0.01, lower=["loss"]).worse[0].drop == pytest.approx(0.1)
