"""A part of the campaign `tests.campaigns.faults.steps`: some commands, ended or failing at every step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.faults.steps.campaign import campaign

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("command", "least"), [("init", 20), ("tag", 15), ("fold and expire", 60)])
def test_killed_at_every_step(tmp_path: Path, command: str, least: int) -> None:
    assert campaign(tmp_path, [command], ("iso-c",))["runs"] >= least


def test_failing_at_every_step(tmp_path: Path) -> None:
    found = campaign(tmp_path, ["rollback"], ("iso-c",), errors=True)
    assert found["runs"] > 150
