"""The files of ops/ that put it on a machine: what their own tools say of them. They are run for good by
tests/campaigns/packages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from continual.config import Settings
from continual.service.unit import drop_in

OPS = Path(__file__).parents[2] / "ops"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def done(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, of a program that is there, with the drop-ins beside it."""
    text = (OPS / "systemd/continual.service").read_text()
    unit = tmp_path / "continual.service"
    unit.write_text(text.replace("/opt/continual/.venv/bin/continual", sys.executable))
    folder = tmp_path / "continual.service.d"
    folder.mkdir()
    shutil.copy(OPS / "systemd/hub.conf", folder)
    paths = {"state": "/home/a b/100% state", "watch": ["/srv/in"], "current": "/tmp/x/current", "allow_remote": True}
    (folder / "settings.conf").write_text(drop_in(Settings.model_validate(paths)))
    return unit


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_unit_and_its_drop_ins(unit: Path) -> None:
    found = done("systemd-analyze", "verify", "--man=no", unit)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("MemoryMax=90%", "MemoryMax=ninety"))
    assert "ninety" in done("systemd-analyze", "verify", "--man=no", unit).stderr, "it does look"


@needs_systemd
def test_the_unit_is_hardened(unit: Path) -> None:
    shutil.rmtree(unit.with_name("continual.service.d"))
    found = done("systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=20", unit)
    assert found.returncode == 0, found.stdout
    worth = re.search(r"Overall exposure level for \S+: ([\d.]+)", found.stdout)
    assert worth is not None
    assert f"says\n{worth[1]} of 10" in (OPS / "docs/install.md").read_text()
