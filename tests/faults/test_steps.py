"""A part of the campaign `tests.campaigns.faults.steps`: some commands, ended or failing at every step."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.campaigns.faults.steps.campaign import Failure, campaign

pytestmark = pytest.mark.slow


def test_killed_at_every_step(memory: Path) -> None:
    """An init is killed below."""
    found = campaign(memory, ("fold", "tag"), ("iso-c",))
    assert found["runs"] > 50


def test_a_full_disk_and_a_failing_one_at_every_step(memory: Path) -> None:
    found = campaign(
        memory, ("scale",), ("iso-c",), (Failure(errno.ENOSPC, lasting=True), Failure(errno.EIO, late=True))
    )
    assert found["runs"] > 10


def test_an_adapter_folded_into_a_state_that_keeps_it(memory: Path) -> None:
    """Killed at every step of an init, and every call of a fold that was done and is told as failed."""
    assert campaign(memory / "kills", ("init",), ("adapters",))["runs"] > 10
    assert campaign(memory / "late", ("fold",), ("adapters",), (Failure(errno.EIO, late=True),))["runs"] > 10
