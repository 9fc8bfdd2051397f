"""Other files at a place that was folded before."""

from __future__ import annotations

from pathlib import Path

from continual.gates.updates import UpdatesGate
from tests.unit.gates.cases import Case, fine_tune

REFUSED = {"update": lambda place: Case(UpdatesGate(), fine_tune(place)._replace(earlier=4))}


def test_let_in_where_nothing_was_folded_from_there_or_the_setting_says_so(tmp_path: Path) -> None:
    seen = fine_tune(tmp_path)
    UpdatesGate().judge(seen)
    UpdatesGate(updates="add").judge(seen._replace(earlier=4))
