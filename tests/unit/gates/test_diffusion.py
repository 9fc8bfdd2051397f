"""LoRA files and single files of diffusion models against a base of another kind, or in another layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from continual.errors import Refuse
from continual.gates.assembly import AssemblyGate
from continual.gates.kinship import check_name
from tests.helpers.diffusion import component, kohya, modules, pipeline, written
from tests.unit.gates.cases import headers


def refusal_of(base: Path, model: Path) -> Refuse:
    with pytest.raises(Refuse) as found:
        check_name(headers(base, model))
    return found.value


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory.mktemp("sdxl") / "base", "sdxl", only="unet")


@pytest.fixture(scope="session")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory.mktemp("sd15") / "base", "sd15", only="unet")


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory.mktemp("flux") / "base", "flux", only="transformer")


@pytest.mark.parametrize(
    ("key", "word", "kind"),
    [
        ("ss_base_model_version", "sd_v1", "Stable Diffusion 1"),
        ("ss_base_model_version", "sd_v2_v", "Stable Diffusion 2"),
        ("modelspec.architecture", "stable-diffusion-v1/lora", "Stable Diffusion 1"),
        ("modelspec.architecture", "stable-diffusion-3-5-large/lora", "Stable Diffusion 3"),
        ("modelspec.architecture", "flux-1-dev/lora", "Flux"),
        ("ss_base_model_version", "flux1", "Flux"),
        ("modelspec.architecture", "Flux.2-dev/lora", "Flux 2"),
        ("modelspec.architecture", "wan2.1", "Wan"),
    ],
)
def test_the_header_names_another_kind_of_model(sdxl: Path, tmp_path: Path, key: str, word: str, kind: str) -> None:
    file, _ = kohya("lora_unet", {"mid_block.attentions.0.proj_in": (32, 32)})
    refusal = refusal_of(sdxl, written(tmp_path / "alice", file, **{key: word}))
    assert refusal.reason == "lineage"
    for part in (key, word, f"LoRA of {kind} ", "is Stable Diffusion XL", "lineage = shapes"):
        assert part in str(refusal)


@pytest.mark.parametrize("word", ["sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "something", ""])
def test_the_header_names_the_base_or_nothing_that_is_known(sdxl: Path, tmp_path: Path, word: str) -> None:
    file, _ = kohya("lora_unet", {"mid_block.attentions.0.proj_in": (32, 32)})
    check_name(headers(sdxl, written(tmp_path / "alice", file, **{"modelspec.architecture": word})))


def test_other_bases(sd15: Path, flux: Path, tmp_path: Path) -> None:
    file, _ = kohya("lora_unet", {"mid_block.attentions.0.proj_in": (32, 32)})
    large = written(tmp_path / "alice", file, **{"ss_base_model_version": "sdxl_base_v1-0"})
    assert "Stable Diffusion 1 or Stable Diffusion 2" in str(refusal_of(sd15, large))
    assert "is Flux;" in str(refusal_of(flux, large))
    small = written(tmp_path / "bob", file, **{"ss_base_model_version": "sd_v1"})
    check_name(headers(sd15, small))
    assert "LoRA of Stable Diffusion 1" in str(refusal_of(flux, small))


def test_factors_that_only_another_kind_has(sdxl: Path, sd15: Path, tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    file, _ = kohya("lora_unet", {name: (1280, 768)})
    refusal = refusal_of(sdxl, written(tmp_path / "alice", file))
    assert "reads vectors of 768 numbers" in str(refusal)
    file, _ = kohya("lora_unet", {name: (1280, 2048)})
    assert "LoRA of Stable Diffusion XL" in str(refusal_of(sd15, written(tmp_path / "bob", file)))


RELEASES = {
    "StableDiffusionXLPipeline": ["model.diffusion_model.input_blocks.1.0.x", "conditioner.embedders.0.x"],
    "StableDiffusionPipeline": [
        "model.diffusion_model.input_blocks.1.0.x",
        "cond_stage_model.x",
        "first_stage_model.x",
    ],
    "FluxTransformer2DModel": ["double_blocks.0.img_attn.qkv.weight"],
    "SD3Transformer2DModel": ["model.diffusion_model.joint_blocks.0.x_block.x"],
    "WanTransformer3DModel": ["blocks.0.self_attn.norm_q.weight"],
    "UNet2DConditionModel": ["input_blocks.0.0.weight"],
}


@pytest.mark.parametrize("reader", RELEASES)
def test_a_model_in_one_file_in_the_layout_of_its_release(sd15: Path, tmp_path: Path, reader: str) -> None:
    alice = written(
        tmp_path / "alice", {name: torch.zeros(2, 2) for name in RELEASES[reader]}, "v1-5-pruned.safetensors"
    )
    with pytest.raises(Refuse) as found:
        AssemblyGate().judge(headers(sd15, alice))
    assert found.value.reason == "assembly"
    assert f"{reader}.from_single_file" in str(found.value)


def test_two_models_in_the_layout_of_their_release_are_alike(sd15: Path, tmp_path: Path) -> None:
    names = RELEASES["StableDiffusionPipeline"]
    base = written(tmp_path / "base", {name: torch.zeros(2, 2) for name in names}, "model.safetensors")
    alice = written(tmp_path / "alice", {name: torch.ones(2, 2) for name in names}, "v1-5-pruned.safetensors")
    AssemblyGate().judge(headers(base, alice))
    with pytest.raises(Refuse, match="layout of diffusers, and the base of this state in that of its release"):
        AssemblyGate().judge(headers(base, sd15))


def test_a_lora_needs_no_layout(sd15: Path, tmp_path: Path) -> None:
    file, _ = kohya("lora_unet", modules(component("sd15", "unet"), within="attn1"))
    (tmp_path / "alice").mkdir()
    (tmp_path / "alice" / "config.json").write_text(json.dumps({}))
    AssemblyGate().judge(headers(sd15, written(tmp_path / "alice", file)))
