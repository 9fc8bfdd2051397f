"""What SIGHUP changes: every setting is either read at use or needs a restart, and a real daemon says which."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from continual import making
from continual.config import Settings
from continual.service.reloading import AT_ONCE, AT_START
from tests.helpers import models
from tests.helpers.pages import DOCS
from tests.helpers.services import LIMIT, daemon, status, until, url


def test_every_setting_is_of_one_kind() -> None:
    assert set(Settings.model_fields) == AT_ONCE | AT_START
    assert not AT_ONCE & AT_START


def test_the_page_names_those_that_change_at_once() -> None:
    page = (DOCS / "operations.md").read_text()
    said = re.split(r"\schange\s+from\s+the\s+next", page.partition("(`needs_restart`).")[2])[0]
    assert set(re.findall(r"`(\w+)`", said)) == AT_ONCE


@pytest.mark.slow
def test_a_hangup_changes_what_can_change_and_a_wrong_file_changes_nothing(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    state, watch, file, log = tmp_path / "state", tmp_path / "in", tmp_path / "c.toml", tmp_path / "daemon.log"
    making.init(base, state)
    watch.mkdir()
    file.write_text("keep = 5\nmax_base_ratio = 1e-9\n")
    with daemon(state, watch, "--config", str(file)) as process:
        address = url(process, state)
        models.fine_tune(base, watch / "alice", 1)
        until(lambda: status(address)["refusals"], "alice is too far from the base for the settings")
        for wrong in ("keep = 0\n", "kepe = 1\n", "[[[\n"):
            log.write_text("")
            file.write_text(wrong)
            process.send_signal(signal.SIGHUP)
            until(lambda: "not reloaded" in log.read_text(), "a wrong file is told of")
        file.write_text("keep = 1\nmax_base_ratio = 0.5\nsettle = 0.3\nrescan = 60.0\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: '"reloaded"' in log.read_text(), "it is told what changed")
        line = next(line for line in log.read_text().splitlines() if '"reloaded"' in line)
        assert '"changed": ["keep", "max_base_ratio"]' in line
        assert '"needs_restart": ["rescan"]' in line
        assert '"looked_at_again": 1' in line
        until(lambda: status(address)["folds"] == 1, "alice is let in now, and nobody asked for it")
        for name in ("bob", "carol"):
            models.fine_tune(base, watch / name, len(name))
        until(lambda: status(address)["folds"] == 3, "and so are those that come")
        assert status(address)["generations"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
