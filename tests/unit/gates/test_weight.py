"""The weight that a model is folded with, and what is no weight."""

from __future__ import annotations

from pathlib import Path

import pytest

from continual.errors import Misconfigured, Refuse
from continual.gates.contract import Headers
from continual.gates.weight import WeightGate
from tests.helpers import models
from tests.unit.gates.cases import Case, fine_tune, headers

FILE = "metrics.json:eval.score"


def with_file(place: Path, body: str | None) -> Headers:
    seen = fine_tune(place)
    if body is not None:
        (place / "alice" / "metrics.json").write_text(body)
    return seen


def _directory(place: Path) -> Case:
    seen = fine_tune(place)
    (place / "alice" / "metrics.json").mkdir()
    return Case(WeightGate(FILE), seen)


def _large(place: Path) -> Case:
    seen = fine_tune(place)
    with (place / "alice" / "metrics.json").open("wb") as file:
        file.truncate(65 << 20)
    return Case(WeightGate(FILE), seen)


def _outside(place: Path) -> Case:
    base = models.base(place / "base")
    alice = models.fine_tune(base, place / "watched" / "alice", 1)
    (place / "secret.json").write_text('{"eval": {"score": 1}}')
    (alice / "metrics.json").symlink_to(place / "secret.json")
    return Case(WeightGate(FILE), headers(base, alice, root=place / "watched"))


REFUSED = {
    "weight": lambda place: Case(WeightGate(FILE), with_file(place, None)),
    "config": _large,
    "no-file": _directory,
    "outside": _outside,
}


def found(gate: WeightGate, seen: Headers) -> float:
    return gate.judge(seen).weight


def test_globs_come_before_the_setting_for_all(tmp_path: Path) -> None:
    seen = fine_tune(tmp_path)
    assert found(WeightGate("2"), seen) == 2.0
    assert found(WeightGate("2", {"bob": 5.0, "ali*": 3.0, "a*": 4.0}), seen) == 3.0
    assert found(WeightGate(FILE, {"alice": 3.0}), seen) == 3.0, "no file is read for a model that a glob matches"


@pytest.mark.parametrize("body", ['{"eval": {"score": 0.25}}', '{"eval.score": 0.25, "eval": {"score": 9}}'])
def test_a_number_of_a_file(tmp_path: Path, body: str) -> None:
    assert found(WeightGate(FILE), with_file(tmp_path, body)) == 0.25


@pytest.mark.parametrize(
    "value", ["-1", "0", "true", '"1"', "[1]", "null", "1e999", "1" + 400 * "0", '{"score": 1}', "NaN"]
)
def test_what_is_no_number_above_0_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(Refuse, match=r"metrics\.json") as raised:
        found(WeightGate(FILE), with_file(tmp_path, f'{{"eval": {{"score": {value}}}}}'))
    assert raised.value.reason == "weight"


@pytest.mark.parametrize(
    "setting", ["0", "-2", "nan", "inf", "word", "metrics.json", "metrics.json:", "a/b.json:c", ".x.json:c", "x.txt:c"]
)
def test_a_setting_that_names_no_weight(setting: str) -> None:
    with pytest.raises(Misconfigured, match="weight"):
        WeightGate(setting)


def test_only_one_for_all_is_even() -> None:
    assert WeightGate().even
    assert WeightGate("1.0").even
    assert not WeightGate("2").even
    assert not WeightGate("1", {"a": 1.0}).even
