"""A small version of the campaign in `hub.py`; the README says how to run all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.faults import hub

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own upload
def test_nothing_is_lost_or_folded_twice_whatever_the_hub_does(tmp_path: Path) -> None:
    found = hub.campaign(tmp_path / "hub", repos=9, kills=1, seed=2, rule="opcm", rate=0.06, limit=200.0, small=True)
    assert found.told == []
    assert found.summary["kills"]["total"] == 1
    assert found.summary["fates"]["folded"] >= 5


def test_secrets_are_found_where_they_lie(tmp_path: Path) -> None:
    log, state = tmp_path / "daemon.log", tmp_path / "state"
    (state / "commits").mkdir(parents=True)
    (state / "commits/1.json").write_text('{"message": "org/ft: connection lost"}')
    log.write_text("started\n")
    assert hub.secrets([state, log]) == []
    (state / "commits/2.json").write_text(f"Bearer {hub.READER}")
    log.write_text(f"GET http://localhost:1/cdn/x?expires=1.0&sig={'0' * 32}\n")
    assert hub.secrets([state, log]) == [str(state / "commits/2.json"), str(log)]
