"""`--profile`: what it counts is what was read, hashed and written, whatever the number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import models
from tests.helpers.command import machine, run

pytestmark = pytest.mark.slow


def _stages(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in found["profile"]["stages"]}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fold_and_an_export_say_where_their_time_went(tmp_path: Path, workers: int) -> None:
    base, state = models.base(tmp_path / "base"), tmp_path / "state"
    weights = (base / "model.safetensors").stat().st_size - _header(base)
    assert run("init", base, "--rule", "iso-c", "--state", state).returncode == 0
    tunes = [models.fine_tune(base, tmp_path / f"ft-{i}", i) for i in range(2)]
    folded = machine("fold", *tunes, "--profile", "--workers", workers, "--state", state)
    assert [model["fate"] for model in folded["models"]] == ["folded", "folded"]
    stages = _stages(folded)
    # both models and the base beside each; of the second also the state, with 4 bytes of checksum a chunk
    assert stages["hash"]["nbytes"] == 2 * weights
    assert 0 <= stages["read"]["nbytes"] - (2 * 2 * weights + weights) < 500
    assert stages["checksum"]["nbytes"] == 3 * weights
    assert 0 <= stages["write"]["nbytes"] - 2 * weights < 40_000  # records and receipts, too
    assert min(stages[stage]["seconds"] for stage in ("open", "gates", "compute", "fsync", "commit")) > 0.0
    assert stages["compute"]["floor"] > 0.0
    assert folded["profile"]["threads"] == workers
    assert folded["profile"]["tensor_count"] == len(models.SHAPES)
    told = sum(stage["cpu_seconds"] for stage in stages.values())
    assert told == pytest.approx(folded["profile"]["cpu_seconds"], rel=0.05)
    read = machine("export", tmp_path / "out", "--profile", "--workers", workers, "--state", state)
    assert Path(read["directory"]).is_dir()
    assert _stages(read)["write"]["nbytes"] >= weights
    assert {row["name"] for row in read["profile"]["tensors"]} <= set(models.SHAPES)


def test_people_are_shown_stages_and_tensors(tmp_path: Path) -> None:
    base, state = models.base(tmp_path / "base"), tmp_path / "state"
    assert run("init", base, "--rule", "task-arithmetic", "--state", state).returncode == 0
    plain = run("fold", models.fine_tune(base, tmp_path / "a", 1), "--state", state).stdout
    assert "checksum" not in plain
    shown = run("fold", models.fine_tune(base, tmp_path / "b", 2), "--profile", "--state", state).stdout
    assert "times the floor" in shown
    assert shown.count("model.") >= 9  # ten of eleven tensors
    assert "the dearest of 11 tensors" in shown
    shown = run("export", tmp_path / "lora", "--as-lora", 4, "--profile", "--state", state).stdout
    assert "relative error" in shown
    assert "times the floor" in shown


def _header(model: Path) -> int:
    with (model / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
