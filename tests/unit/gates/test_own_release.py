"""Exports of a state that come back to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from continual.errors import Refuse
from continual.gates.contract import Headers
from continual.gates.own_release import OwnReleaseGate
from tests.helpers import models
from tests.unit.gates.cases import Case, headers


def released(place: Path, body: str) -> Headers:
    base = models.base(place / "base")
    alice = models.fine_tune(base, place / "alice", 1)
    (alice / "continual.json").write_text(body)
    return headers(base, alice)


REFUSED = {
    "own-release": lambda place: Case(OwnReleaseGate(), released(place, json.dumps({"state": "ours", "seq": 3})))
}


@pytest.mark.parametrize(
    ("release", "cloned"),
    [
        ({"state": "clone", "cloned": ["ours"]}, ()),
        ({"state": "first"}, ("first",)),
        ({"state": "sibling", "cloned": ["first"]}, ("first",)),
    ],
    ids=["of a clone", "of what it was cloned from", "of another clone"],
)
def test_what_has_models_in_common_is_kept_out(tmp_path: Path, release: dict[str, object], cloned: list[str]) -> None:
    seen = released(tmp_path, json.dumps({**release, "seq": 3}))._replace(cloned=cloned)
    with pytest.raises(Refuse, match="the models that they have in common would count twice") as refused:
        OwnReleaseGate().judge(seen)
    assert refused.value.reason == "own-release"


@pytest.mark.parametrize(
    "body",
    [
        '{"state": "another", "seq": 3}',
        '{"state": "another", "seq": 3, "cloned": ["a third"]}',
        '{"state": {}, "cloned": [[], {}, null, 3]}',
        '{"state": "another", "cloned": "ours"}',
        '{"other": 1}',
        "no JSON",
    ],
)
def test_what_others_released_is_let_in(tmp_path: Path, body: str) -> None:
    OwnReleaseGate().judge(released(tmp_path, body))
