"""A merge of diffusion models written as a LoRA file in the layouts of diffusers and of Kohya, and read again; with
diffusers itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.errors import Misconfigured
from continual.publish.diffusion import FILES, LoraFormat, adaptable_in, header_of
from continual.publish.lora import LoraReport, LoraTarget
from tests.helpers.adapters import based, task_vectors
from tests.helpers.diffusion import component, kohya, modules, pipeline, table, written


def merged(place: Path, family: str, only: str | None = None) -> api.Merge:
    """A state with one fine-tune of a tiny model of this family, all of whose weights differ from the base's."""
    base, tuned = pipeline(place / "base", family, only), pipeline(place / "alice", family, only)
    generator = torch.Generator().manual_seed(3)
    for file in tuned.rglob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t + torch.randn(t.shape, generator=generator) * 0.01 for n, t in tensors.items()}, file)
    making.init(base, place / "state", making.Recipe(rule="mean"))
    merge = api.open(place / "state", write=True, gates=["noise.act=off"])
    outcome = merge.fold(tuned)
    assert outcome.fate == "folded", outcome.message
    return merge


def export(merge: api.Merge, directory: Path, form: LoraFormat) -> LoraReport:
    return merge.export_lora(LoraTarget(directory, 512, form=form))


@pytest.mark.parametrize(("family", "form"), [("sd15", "diffusers"), ("sd15", "kohya"), ("flux", "diffusers")])
def test_what_is_written_is_what_was_merged(tmp_path: Path, family: str, form: LoraFormat) -> None:
    with merged(tmp_path, family) as merge:
        report = export(merge, tmp_path / "out", form)
    assert [file.name for file in sorted((tmp_path / "out").iterdir())] == sorted((FILES[form], "continual.json"))
    assert json.loads((tmp_path / "out" / "continual.json").read_text())["lora"]["format"] == form
    assert report.error_adapted < 1e-5
    found, lineage, _ = task_vectors(tmp_path / "base", tmp_path / "out")
    assert lineage.extra == ()
    whole = task_vectors(tmp_path / "base", tmp_path / "alice")[0]
    assert found.keys() == whole.keys() - set(report.left_out)
    for name, tau in found.items():
        torch.testing.assert_close(tau, whole[name], rtol=1e-4, atol=1e-6)
    denoiser = "unet" if family == "sd15" else "transformer"
    assert {f"{denoiser}.{module}.weight" for module in modules(component(family, denoiser))} <= found.keys()
    assert any(name.startswith("text_encoder.") for name in found)
    assert not any(name.startswith("text_encoder_2.") for name in found)  # T5, for which diffusers loads no factors


def test_the_names_of_sdxl_are_those_of_its_release(tmp_path: Path) -> None:
    base = based(pipeline(tmp_path / "base", "sdxl"))
    with base.checkpoint:
        found = adaptable_in(base, "kohya")
        assert header_of(base, "kohya", 4)["ss_base_model_version"] == "sdxl_base_v1-0"
    unet = {one.module: one.spec.name for one in found if one.module.startswith("lora_unet_")}
    assert unet == {flat: f"unet.{module}.weight" for flat, module in table()["kohya"].items()}
    words = {one.module.partition("_text_model_")[0] for one in found} - unet.keys()
    assert words == {"lora_te1", "lora_te2"}
    assert all(one.alpha == f"{one.module}.alpha" for one in found)


def test_what_cannot_be_expressed_is_refused(tmp_path: Path) -> None:
    with merged(tmp_path, "flux") as merge:
        with pytest.raises(Misconfigured, match="--format diffusers"):
            export(merge, tmp_path / "out", "kohya")
        with pytest.raises(Misconfigured, match="--format diffusers or kohya"):
            export(merge, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()
    words = {"model.layers.0.q_proj.weight": torch.randn(4, 6)}
    base = based(written(tmp_path / "words", words, "model.safetensors"))
    with base.checkpoint, pytest.raises(Misconfigured, match="--format peft"):
        adaptable_in(base, "diffusers")


def test_a_lora_file_is_folded_and_said(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", "sd15", only="unet")
    file, _ = kohya("lora_unet", modules(component("sd15", "unet"), within="attn1"))
    file = {name: tensor * 0.1 for name, tensor in file.items()}
    alice = written(tmp_path / "alice", file)
    making.init(base, tmp_path / "state", making.Recipe(rule="mean"))
    with api.open(tmp_path / "state", write=True) as merge:
        outcome = merge.fold(alice)
        assert outcome.fate == "folded", outcome.message
        assert merge.fold(alice).fate == "known"
        assert merge.fold(written(tmp_path / "again", file)).fate == "duplicate"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
def test_diffusers_makes_the_same_of_every_layout(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.campaigns.diffusion", "--compare", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
