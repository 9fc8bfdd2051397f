"""Exports of a state that come back to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("body", ['{"state": "another", "seq": 3}', '{"other": 1}', "no JSON"])
def test_what_others_released_is_let_in(tmp_path: Path, body: str) -> None:
    OwnReleaseGate().judge(released(tmp_path, body))
