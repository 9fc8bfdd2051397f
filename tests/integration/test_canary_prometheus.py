"""A real Prometheus says that the service which has a candidate is in trouble, and the candidate is taken back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from continual import making
from continual.state import State
from continual.state.entries import CanaryEntry, RollbackEntry
from tests.helpers import models
from tests.helpers.prometheus import FIRING, scraped
from tests.helpers.services import daemon, status, until, url

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]


def test_an_alarm_in_a_real_prometheus_takes_the_release_back_and_the_record_says_why(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    state = tmp_path / "state"
    making.init(base, state)
    models.fine_tune(base, tmp_path / "in/alice", 1)
    file = tmp_path / "continual.toml"
    with scraped(tmp_path) as prometheus:
        file.write_text(
            f'current = "{tmp_path}/current"\n[release.canary]\nprometheus = "{prometheus.url}"\n'
            f"query = '{FIRING}'\nmax = 0\ninterval = 0.3\n"
        )
        with daemon(state, tmp_path / "in", "--config", str(file)) as process:
            address = url(process, state)
            until(lambda: [c for c in status(address)["canaries"] if c["measurements"]], "it is watched")
            assert status(address)["canaries"][0]["failed"] == 0
            prometheus.errors = 0.5
            until(lambda: status(address)["folds"] == 0, "it is taken back")
    with State.open(state) as opened:
        (back,) = [c.entry for c in opened.ledger.log if isinstance(c.entry, RollbackEntry)]
        (found,) = [c.entry for c in opened.ledger.log if isinstance(c.entry, CanaryEntry)]
    assert (back.to, back.undone, found.of, found.canary.verdict) == (0, 1, 1, "failed")
    assert back.message is not None
    assert FIRING in back.message
    assert "1 is above max = 0; 2 of the last" in back.message, "at the second look after the alarm, and not later"
    assert found.canary.values == (1.0,)
    assert not (tmp_path / "current").exists()
