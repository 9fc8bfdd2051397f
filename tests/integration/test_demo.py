"""The demonstration as a user runs it; its own checks (each fold exactly once, an orphan left, a clean state) raise if
they fail. What it prints has the form that the documentation shows."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from continual.demo import story
from tests.helpers import command
from tests.helpers.pages import DOCS, blocks

pytestmark = pytest.mark.slow

WIDTH = 108  # columns of the terminal that the page shows


def form(text: str) -> list[str]:
    """The lines without what differs between two runs: figures, the directory, the generation."""
    text = re.sub(r"(?<=Working in )\S+", "DIR", text)
    text = re.sub(r"(?<=generation )[0-9a-f]{16}", "ID", text)
    text = re.sub(r"\d+(\.\d)?", "0", text)
    return [re.sub(r" +", " ", line.rstrip()) for line in text.strip().splitlines()]


def test_demo(tmp_path: Path) -> None:
    done = command.process("demo", "--json", "--dir", tmp_path / "demo", env={"COLUMNS": str(WIDTH)})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["mean"]["merged"] > result["mean"]["averaged"] > result["mean"]["base"]
    assert len(result["orphans"]) == 1
    assert result["orphans"][0]["bytes"] > 0
    assert result["after_kill"] == {"record": 4, "folds": 4, "findings": []}
    assert sorted(result["folded"]) == sorted(result["tasks"])
    assert 0 < result["peak_memory_bytes"]["last"] < 1.2 * result["peak_memory_bytes"]["first"]

    tables = io.StringIO()
    story.show(result, Console(file=tables, width=WIDTH))
    (shown,) = [block for block in blocks(DOCS / "measured.md", "") if block.startswith("Working in")]
    assert form(done.stderr + tables.getvalue()) == form(shown)
