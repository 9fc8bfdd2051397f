"""Models that the gates doubt: refused, warned of, or folded because a person accepted them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import continual
from continual import api
from continual.config import Settings
from continual.state.entries import FoldEntry, RetryEntry
from continual.tensors.vectors.sketch import Alike, Projection, Sketch, SketchPlan
from tests.helpers import adapters, models
from tests.helpers.command import machine, run

SHAPES = {"model.layers.0.mlp.up_proj.weight": (96, 80), "model.layers.1.mlp.up_proj.weight": (96, 80)}
NAMES = tuple(SHAPES)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base", shapes=SHAPES)


def tuned(base: Path, seed: int, change: float = 1.0, name: str = "") -> Path:
    """A fine-tune whose task vector has a few large directions, times `change`."""
    draw = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    for key in NAMES:
        left, right = torch.randn(96, 3, generator=draw), torch.randn(3, 80, generator=draw)
        tensors[key] = tensors[key] + change * 0.002 * left @ right
    return models.write(base.parent / (name or f"ft-{seed}"), tensors, models.CONFIG)


def noisy(base: Path, name: str) -> Path:
    tensors = {
        key: value + 0.004 * torch.randn(value.shape) for key, value in load_file(base / "model.safetensors").items()
    }
    return models.write(base.parent / name, tensors, models.CONFIG)


def opened(state: Path, base: Path, rule: str = "task-arithmetic", **settings: object) -> api.Merge:
    if not state.exists():
        continual.init(base, state, continual.Recipe(rule=rule))
    return api.Merge(Settings.model_validate({"state": state} | settings), write=True)


@pytest.mark.parametrize("rule", ["task-arithmetic", "tsv-m"])  # run by run, and whole matrices
def test_copies_noise_and_lengths_are_kept_out(tmp_path: Path, base: Path, rule: str) -> None:
    with opened(tmp_path / "state", base, rule) as merge:
        for seed in range(3):
            assert merge.fold(tuned(base, seed)).fate == "folded"
        found = {
            name: merge.fold(model).reason
            for name, model in (
                ("copy", tuned(base, 0, 0.9, "copy")),
                ("negated", tuned(base, 1, -2.0, "negated")),
                ("noise", noisy(base, "noise")),
                ("long", tuned(base, 7, 10.0, "long")),
                ("short", tuned(base, 8, 0.005, "short")),
            )
        }
        assert found == {
            "copy": "copy",
            "negated": "negated",
            "noise": "noise",
            "long": "norm-mean",
            "short": "norm-mean",
        }
        assert merge.fold(tuned(base, 9)).fate == "folded"


def test_one_layer_that_is_too_long(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        for seed in range(3):
            merge.fold(tuned(base, seed))
        tensors, origin = load_file(tuned(base, 5) / "model.safetensors"), load_file(base / "model.safetensors")
        tensors[NAMES[1]] = origin[NAMES[1]] + 10.5 * (tensors[NAMES[1]] - origin[NAMES[1]])
        poisoned = models.write(tmp_path / "poisoned", tensors, models.CONFIG)
        outcome = merge.fold(poisoned)
        assert (outcome.reason, "layer group 2 of 2" in outcome.message) == ("norm-layer", True)


@pytest.mark.parametrize(("act", "fate"), [("refuse", "refused"), ("warn", "folded"), ("off", "folded")])
def test_what_becomes_of_a_doubt(tmp_path: Path, base: Path, act: str, fate: str) -> None:
    with opened(tmp_path / "state", base, gates=[f"noise.act={act}"]) as merge:
        outcome = merge.fold(noisy(base, "noise"))
        assert outcome.fate == fate, outcome.message
        assert ("warning (noise)" in outcome.line()) == (act == "warn")
        if act == "refuse":
            assert "gates.noise.act" in (outcome.commit.entry.settings or {})  # type: ignore[union-attr]
        else:
            warned = outcome.commit.of_kind(FoldEntry).numbers.warnings
            assert [one.reason for one in warned or ()] == (["noise"] if act == "warn" else [])


def test_a_refused_one_is_looked_at_again_under_another_act(tmp_path: Path, base: Path) -> None:
    noise = noisy(base, "noise")
    with opened(tmp_path / "state", base) as merge:
        assert merge.fold(noise).fate == "refused"
    with opened(tmp_path / "state", base, gates=["noise.act=warn"]) as merge:
        assert merge.fold(noise).fate == "folded"


def test_what_is_certain_is_no_doubt(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base, gates=["norms.act=off"]) as merge:
        assert merge.fold(tuned(base, 0, 0.0)).reason == "zero"


def test_one_is_accepted_and_the_ledger_says_who_and_why(tmp_path: Path, base: Path) -> None:
    noise, copy = noisy(base, "noise"), tuned(base, 0, 0.9, "copy")
    with opened(tmp_path / "state", base) as merge:
        merge.fold(tuned(base, 0))
        for model in (noise, copy):
            assert merge.fold(model).fate == "refused"
    state = ("--state", tmp_path / "state")
    assert [row["reason"] for row in machine("quarantine", *state, "--json")] == ["noise", "copy"]
    assert "noise" in run("quarantine", "show", "noise", *state).stdout
    assert run("quarantine", "accept", "noise", *state).returncode == 2, "it has to be said why"
    done = run("quarantine", "accept", "noise", "--because", "weights of a dropout study", *state)
    assert "accepted" in done.stdout
    with opened(tmp_path / "state", base) as merge:
        said = merge.state.ledger.head.of_kind(RetryEntry)
        assert (said.because, bool(said.by)) == ("weights of a dropout study", True)
        outcome = merge.fold(noise)
        assert (outcome.fate, "warning (noise)" in outcome.line()) == ("folded", True)
        assert merge.fold(copy).fate == "known", "only that one was accepted"
    assert [row["reason"] for row in machine("quarantine", *state, "--json")] == ["copy"]
    assert run("quarantine", "show", "nobody", *state).returncode == 2


def test_an_earlier_revision_is_no_copy(tmp_path: Path, base: Path) -> None:
    place = tuned(base, 0)
    with opened(tmp_path / "state", base, updates="add") as merge:
        assert merge.fold(place).fate == "folded"
        place.rename(tmp_path / "old")
        assert merge.fold(tuned(base, 0, 1.1)).fate == "folded"


@pytest.mark.parametrize("form", ["whole", "adapters"])
def test_adapters_are_compared_too(tmp_path: Path, base: Path, form: str) -> None:
    if form == "adapters":
        continual.init(base, tmp_path / "state", continual.Recipe(width=64))
    some = [adapters.lora(tmp_path / f"lora-{n}", base, n, rank=4, modules=("up_proj",)) for n in range(3)]
    tensors = load_file(some[0] / "adapter_model.safetensors")
    other = {name: value * (0.5 if "lora_B" in name else 1.0) for name, value in tensors.items()}
    settings = {"max_base_ratio": 100.0}
    with opened(tmp_path / "state", base, **settings) as merge:
        assert [merge.fold(model).fate for model in some] == ["folded"] * 3
        sketches = [fold.entry.numbers.sketch for fold in merge.state.ledger.folds()]
        found = [Sketch.read(one.norms, one.values) for one in sketches if one is not None]
        assert len(found) == 3
        assert np.abs(Alike.of(found[0], found[1:]).cosine).max() < 0.5  # type: ignore[arg-type]
        copy = shutil.copytree(some[0], tmp_path / "copy")
        save_file(other, copy / "adapter_model.safetensors")
        assert merge.fold(copy).reason == "copy"


def test_a_merge_of_what_is_in_the_merge_after_a_combine(tmp_path: Path, base: Path) -> None:
    some = [tuned(base, seed) for seed in range(4)]
    with opened(tmp_path / "other", base) as other:
        for model in some[2:]:
            other.fold(model)
    mean = {key: sum(load_file(m / "model.safetensors")[key] for m in some) / 4 for key in NAMES}
    merged = models.write(tmp_path / "mean", {k: torch.as_tensor(v) for k, v in mean.items()}, models.CONFIG)
    with opened(tmp_path / "state", base) as merge:
        for model in some[:2]:
            merge.fold(model)
        merge.combine(tmp_path / "other")
        assert merge.fold(merged).reason == "mixture"


def test_a_tensor_of_several_runs_is_sketched_whole(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base", shapes={"w.weight": (640, 640)})  # a run has 262,144 elements
    tuned = models.fine_tune(base, tmp_path / "tuned", 1)
    with opened(tmp_path / "state", base) as merge:
        kept = merge.fold(tuned).commit.of_kind(FoldEntry).numbers.sketch
        plan = SketchPlan.of(merge.base.specs)
    assert kept is not None
    change = load_file(tuned / "model.safetensors")["w.weight"] - load_file(base / "model.safetensors")["w.weight"]
    whole = Projection("w.weight", plan.width)
    whole.add(0, change.reshape(-1).numpy())
    expected = Sketch.of(plan, {"w.weight": float(change.square().sum())}, {"w.weight": whole.values})
    found = Sketch.read(kept.norms, kept.values)
    assert found is not None
    assert Alike.of(expected, [found]).cosine[0] > 0.999
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)


def test_what_is_dropped_is_on_the_list_no_more_and_stays_out(tmp_path: Path, base: Path) -> None:
    state, noise = tmp_path / "state", noisy(base, "noise; it's [odd]")
    with opened(state, base) as merge:
        merge.fold(tuned(base, 0))
        assert merge.fold(noise).reason == "noise"
    listed = machine("quarantine", "--state", state, "--json")
    assert [row["reason"] for row in listed] == ["noise"]
    said = machine("quarantine", "drop", noise.name, "--because", "it is noise", "--state", state, "--json")
    assert "dropped after record 2 (noise) by " in said[0]["message"]
    assert said[0]["message"].endswith(": it is noise")
    assert machine("quarantine", "--state", state, "--json") == []
    assert run("quarantine", "drop", noise.name, "--state", state).returncode == 2, "it is not on the list"
    with opened(state, base, gates={"noise": {"act": "off"}}) as merge:
        assert merge.fold(noise).fate == "known", "other settings do not bring it back"
        merge.retry(noise.name)
        assert merge.fold(noise).fate == "folded"
    assert continual.verify(state).findings == ()
