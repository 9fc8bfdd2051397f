"""The demonstration as a user runs it; its own checks (each fold exactly once, an orphan left, a clean state) raise if
they fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "continual", "demo", "--json", "--dir", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["mean"]["merged"] > result["mean"]["averaged"] > result["mean"]["base"]
    assert len(result["orphans"]) == 1
    assert result["orphans"][0]["bytes"] > 0
    assert result["after_kill"] == {"record": 4, "folds": 4, "findings": []}
    assert sorted(result["folded"]) == sorted(result["tasks"])
    assert 0 < result["peak_memory_bytes"]["last"] < 1.2 * result["peak_memory_bytes"]["first"]
