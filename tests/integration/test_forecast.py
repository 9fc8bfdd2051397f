"""`plan --time` and `plan --init`: bytes, disk and memory are what comes then; headers alone are enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import models
from tests.helpers.command import machine, run

pytestmark = pytest.mark.slow

SHAPES = {
    "model.embed_tokens.weight": (3000, 48),
    "model.norm.weight": (48,),
    **{f"model.layers.0.self_attn.{p}_proj.weight": (48, 48) for p in "qkvo"},
    "model.layers.0.mlp.up_proj.weight": (192, 48),
}


def _bytes(profile: dict[str, Any], stage: str) -> int:
    return int(next(row["nbytes"] for row in profile["stages"] if row["stage"] == stage))


@pytest.mark.parametrize("rule", ["ties", "opcm"])
def test_what_is_said_is_what_comes(tmp_path: Path, rule: str) -> None:
    base, state = models.base(tmp_path / "base", shapes=SHAPES), tmp_path / "state"
    assert run("init", base, "--rule", rule, "--state", state).returncode == 0
    first, second = (models.fine_tune(base, tmp_path / f"ft-{i}", i) for i in range(2))
    assert run("fold", first, "--state", state).returncode == 0
    left = sorted(tmp_path.iterdir())
    (plan,) = machine("plan", second, "--time", "--state", state)
    assert sorted(tmp_path.iterdir()) == left, "the sample is gone"
    fold, export = plan["time"]["fold"], plan["time"]["export"]
    assert plan["ok"]
    assert min(fold["seconds"], fold["cpu_seconds"], export["seconds"]) > 0.0
    assert fold["memory_bytes"] > plan["memory_bytes"]
    folded = machine("fold", second, "--profile", "--state", state)["profile"]
    exported = machine("export", tmp_path / "out", "--profile", "--state", state)["profile"]
    for said, profile in ((fold, folded), (export, exported)):
        assert said["read_bytes"] == pytest.approx(_bytes(profile, "read"), rel=0.05)
        assert said["written_bytes"] == pytest.approx(_bytes(profile, "write"), rel=0.05)
    assert plan["time"]["kept_bytes"] >= 2 * plan["time"]["state_bytes"]
    assert {"keep = 1", "workers = 1"} <= {one["change"] for one in plan["time"]["cheaper"]}


def test_a_base_of_70_b_is_told_of_by_its_header(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (128256, 8192), "model.norm.weight": (8192,)}
    for layer in range(80):
        head = f"model.layers.{layer}"
        shapes |= {f"{head}.self_attn.{p}_proj.weight": (8192 if p in "qo" else 1024, 8192) for p in "qkvo"}
        shapes |= {f"{head}.mlp.{p}_proj.weight": (28672, 8192) for p in ("gate", "up")}
        shapes |= {f"{head}.mlp.down_proj.weight": (8192, 28672)}
    base, at, body = tmp_path / "base", 0, {}
    for name, shape in shapes.items():
        numel = shape[0] * (shape[1] if len(shape) > 1 else 1)
        body[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + 2 * numel]}
    head = json.dumps(body).encode()
    base.mkdir()
    (base / "config.json").write_text(json.dumps(models.CONFIG))
    (base / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    found = machine("plan", "--init", base, "--rule", "task-arithmetic", "--state", tmp_path / "state")
    assert at > 130e9
    assert found["state_bytes"] == found["fold"]["disk_bytes"] == 2 * at
    assert found["export"]["disk_bytes"] == at
    assert found["fold"]["read_bytes"] == pytest.approx(4 * at, rel=0.01)  # base, fine-tune, and twice that of state
    assert 30.0 < found["fold"]["seconds"] < found["fold"]["cpu_seconds"] < 36_000.0
    assert found["fold"]["memory_bytes"] < 2e9
    assert found["fold"]["dearest"][0][0] == "model.embed_tokens.weight"
    assert not (tmp_path / "state").exists()
    done = run("plan", "--init", base, "--rule", "fisher", "--state", tmp_path / "state")
    assert (done.returncode, "takes more than the weights" in done.stderr) == (2, True)


def test_of_what_no_sample_is_made_the_plan_alone_is_shown(tmp_path: Path) -> None:
    base, state = models.base(tmp_path / "base"), tmp_path / "state"
    assert run("init", base, "--rule", "fisher", "--state", state).returncode == 0
    tune = models.ship(models.fine_tune(base, tmp_path / "ft", 1), 1)
    done = run("plan", tune, "--time", "--state", state)
    assert (done.returncode, "time is said of full fine-tunes alone" in done.stderr) == (0, True)
    assert "time" not in machine("plan", tune, "--time", "--state", state)[0]
    assert run("plan", "--init", base, tune, "--state", state).returncode == 2
    assert run("plan", tune, "--rule", "iso-c", "--state", state).returncode == 2
    assert run("plan", "--state", tmp_path / "state").returncode == 2
