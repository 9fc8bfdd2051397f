"""Every file of a small state flipped, cut and deleted in turn: it is found each time, at opening or by verify."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from continual.errors import ContinualError
from continual.state import State, excerpts
from continual.state.verify import verify
from tests.helpers import stores

pytestmark = pytest.mark.slow

UNCHECKED = ("lock",)
"""Only informs: the lock is the flock, not the contents."""


def findings(state: Path) -> list[str]:
    """What opening and verifying report."""
    try:
        with State.open(state) as opened:
            return verify(opened)
    except ContinualError as error:
        return [str(error)]


@pytest.mark.parametrize("harm", ["flipped", "cut", "deleted"])
def test_every_file(tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excerpts, "SPAN", 3)
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    stores.history(whole)
    assert findings(whole) == []
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.name not in UNCHECKED)
    assert len(files) > 50
    assert [file.name for file in files if file.parent.name == "excerpts"] == ["00000000.json", "00000003.json"]
    if harm == "deleted":  # an excerpt that is not there is no damage: it is made anew
        files = [file for file in files if file.parent.name != "excerpts"]
    missed = []
    for file in files:
        shutil.copytree(whole, hurt)
        target = hurt / file
        data = bytearray(target.read_bytes())
        if harm == "flipped":
            data[len(data) // 2] ^= 0x10
            target.write_bytes(data)
        elif harm == "cut":
            target.write_bytes(data[:-1])
        else:
            target.unlink()
        told = findings(hurt)
        if not told or not any(part in line for line in told for part in (file.name, file.parent.name, "commits")):
            missed.append((str(file), told))
        shutil.rmtree(hurt)
    assert missed == []


def test_swapped_chunks_and_generations_are_found(tmp_path: Path) -> None:
    stores.history(tmp_path / "s")
    with State.open(tmp_path / "s") as opened:
        first, second = (str(opened.ledger.get(seq).generation) for seq in (1, 2))
    generations = tmp_path / "s/generations"
    chunk = Path("sum/wide/c.0.0")
    (generations / second / chunk).write_bytes((generations / first / chunk).read_bytes())
    assert any("wide" in line for line in findings(tmp_path / "s"))
    (generations / second / "receipts.json").write_bytes((generations / first / "receipts.json").read_bytes())
    assert any("receipts.json" in line for line in findings(tmp_path / "s"))
