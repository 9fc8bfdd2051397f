"""The metrics that a command prints, and which of them are worse."""

from __future__ import annotations

import json

import pytest

from continual.evaluation.scores import mean, parse


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
