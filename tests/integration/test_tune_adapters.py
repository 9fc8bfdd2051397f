"""Tuning of states of adapters: of the scale, by a command that reads the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.engine.views import ReadView
from continual.publish.folder import Target
from continual.tuning import Command, Tuning
from tests.helpers import adapters, models

pytestmark = pytest.mark.slow

SCRIPT = """
import array, pathlib, sys
def weights(place):
    data = pathlib.Path(place, "model.safetensors").read_bytes()
    return array.array("f", data[8 + int.from_bytes(data[:8], "little") :])
print(-sum((a - b) ** 2 for a, b in zip(weights(sys.argv[1]), weights(sys.argv[2]), strict=True)) ** 0.5)
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "eval.py").write_text(SCRIPT)
    return models.base(tmp_path / "base")


def folded(tmp_path: Path, base: Path, rule: str) -> api.Merge:
    """A state of three adapters, open for writing."""
    making.init(base, tmp_path / "state", making.Recipe(rule=rule, width=64))
    merge = api.Merge(Settings(state=tmp_path / "state", max_base_ratio=100.0), write=True)
    for seed, name in enumerate("abc"):
        assert merge.fold(adapters.lora(tmp_path / name, base, seed)).fate == "folded"
    return merge


def near(tmp_path: Path, merge: api.Merge, view: ReadView) -> Command:
    """A command whose score is how near a model is to what `view` reads."""
    merge.export(Target(tmp_path / "target", dtype="F32"), view=view)
    return Command((sys.executable, "-S", str(tmp_path / "eval.py"), str(tmp_path / "target"), "{model}"))


@pytest.mark.parametrize("rule", ["iso-c", "task-arithmetic", "ties"])
def test_the_scale_is_found(tmp_path: Path, base: Path, rule: str) -> None:
    with folded(tmp_path, base, rule) as merge:
        command = near(tmp_path, merge, ReadView(scale="0.45"))
        found = merge.tune(command, Tuning(16, "number", around=0.3))
        assert found.read.policy == "number"
        assert found.read.value == pytest.approx(0.45, rel=0.05)
        assert found.score > found.before
        assert merge.scale() == found.read
        merge.export(tmp_path / "tuned")
        read, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "target"))
        start = load_file(base / "model.safetensors")
        far = sum(float((read[name] - wanted[name]).square().sum()) for name in start) ** 0.5
        assert far == pytest.approx(-found.score, rel=1e-3, abs=1e-6), "what is exported is what was evaluated"
        assert far < 0.05 * sum(float((start[name] - wanted[name]).square().sum()) for name in start) ** 0.5


def test_the_scale_under_spread_is_found_around_what_is_in_force(tmp_path: Path, base: Path) -> None:
    with folded(tmp_path, base, "iso-c") as merge:
        command = near(tmp_path, merge, ReadView(scale="spread:0.6"))
        found = merge.tune(command, Tuning(12))
        assert found.read.policy == "spread"
        assert found.read.value == pytest.approx(0.6, rel=0.1)
