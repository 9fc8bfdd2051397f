"""Adapters as their users publish them, in names and configurations of many trainers and versions: read as PEFT reads
them, or refused in a line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.adapters import Tensors, plain, refused, task_vectors

BASE = {
    "model.layers.0.attn.q_proj.weight": torch.randn(4, 6),
    "model.layers.0.attn.mha.in_proj_weight": torch.randn(12, 4),
    "model.layers.0.attn.mha.out_proj.weight": torch.randn(4, 4),
    "model.layers.0.post_attention_layernorm.weight": torch.randn(6),
    "model.layers.0.conv.weight": torch.randn(4, 3, 2, 2),
    "model.embed_tokens.weight": torch.randn(8, 6),
    "lm_head.weight": torch.randn(8, 6),
}
Q = "model.layers.0.attn.q_proj"
A, B = torch.randn(2, 6), torch.randn(4, 2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(BASE, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def published(path: Path, more: Tensors | None = None, name: str = "lora_{}.weight", **config: Any) -> Path:
    """A LoRA of one projection, and what lies beside it."""
    factors = {f"{Q}.{name.format('A')}": A, f"{Q}.{name.format('B')}": B}
    weights = {f"base_model.model.{key}": value.clone() for key, value in (factors | (more or {})).items()}
    return plain(path, weights, **config)


@pytest.mark.parametrize("name", ["lora_{}.default.weight", "lora_{}.sft.weight", "lora_{}.default_0.weight"])
def test_the_adapters_own_name_in_those_of_its_tensors(base: Path, tmp_path: Path, name: str) -> None:
    taus, _, _ = task_vectors(base, published(tmp_path / "x", name=name))
    torch.testing.assert_close(taus[f"{Q}.weight"], 2 * B @ A)


def test_factors_of_two_adapters_in_one_file(base: Path, tmp_path: Path) -> None:
    more = {"model.layers.0.conv.lora_A.dpo.weight": A, "model.layers.0.conv.lora_B.dpo.weight": B}
    refusal = refused(base, published(tmp_path / "x", more, name="lora_{}.sft.weight"))
    assert refusal.reason == "adapter-kind"
    assert "lora_A.dpo" in str(refusal)
    assert "lora_A.sft" in str(refusal)


def test_keys_that_are_not_there_have_the_values_of_peft(base: Path, tmp_path: Path) -> None:
    a, b = torch.randn(8, 6), torch.randn(4, 8)
    factors = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
    path = plain(tmp_path / "x", factors)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "merge_weights": True}))
    taus, _, _ = task_vectors(base, path)
    torch.testing.assert_close(taus[f"{Q}.weight"], b @ a)


def test_a_module_to_save_is_one_whose_name_ends_so(base: Path, tmp_path: Path) -> None:
    norm = "model.layers.0.post_attention_layernorm.weight"
    path = published(tmp_path / "x", {norm: BASE[norm] + 1}, modules_to_save=["norm"])
    taus, _, _ = task_vectors(base, path)
    torch.testing.assert_close(taus[norm], torch.ones(6))


def test_the_weight_of_the_base_beside_its_factors(base: Path, tmp_path: Path) -> None:
    """Who saves the whole state saves what the factors are added to: PEFT loads it."""
    path = published(tmp_path / "x", {f"{Q}.base_layer.weight": BASE[f"{Q}.weight"] + 1})
    taus, _, _ = task_vectors(base, path)
    torch.testing.assert_close(taus[f"{Q}.weight"], 2 * B @ A + 1, rtol=1e-5, atol=1e-6)
    lone = published(tmp_path / "y", {"model.layers.0.conv.base_layer.weight": torch.randn(4, 3, 2, 2)})
    assert refused(base, lone).reason == "adapter-kind"


@pytest.mark.parametrize("name", ["score", "classifier"])
def test_factors_of_a_head_that_the_base_has_nothing_of(base: Path, tmp_path: Path, name: str) -> None:
    head = {f"{name}.lora_A.weight": torch.randn(2, 6), f"{name}.lora_B.weight": torch.randn(3, 2)}
    _, lineage, _ = task_vectors(base, published(tmp_path / "x", head))
    assert lineage.extra == (f"{name}.weight",)
    layer = {f"model.layers.0.{factor}": tensor for factor, tensor in head.items()}
    assert refused(base, published(tmp_path / "y", layer)).reason == "adapter-target"


def test_the_attention_of_torch(base: Path, tmp_path: Path) -> None:
    """PEFT adds what is learned of its output projection twice."""
    mha = "model.layers.0.attn.mha"
    a, b, c, d = torch.randn(2, 4), torch.randn(12, 2), torch.randn(2, 4), torch.randn(4, 2)
    both = {
        f"{mha}.lora_A.weight": a,
        f"{mha}.lora_B.weight": b,
        f"{mha}.base_layer.out_proj.lora_A.weight": c,
        f"{mha}.base_layer.out_proj.lora_B.weight": d,
    }
    path = published(tmp_path / "x", both, alpha_pattern={"mha": 6})
    taus, _, _ = task_vectors(base, path)
    torch.testing.assert_close(taus[f"{mha}.in_proj_weight"], 3 * b @ a)
    torch.testing.assert_close(taus[f"{mha}.out_proj.weight"], 6 * d @ c)


def test_adalora_of_a_convolution(base: Path, tmp_path: Path) -> None:
    a, b, e = torch.randn(2, 12), torch.randn(4, 2), torch.randn(2, 1)
    factors = {f"model.layers.0.conv.{name}": t for name, t in (("lora_A", a), ("lora_B", b), ("lora_E", e))}
    path = plain(tmp_path / "x", factors, peft_type="ADALORA", init_r=2, bias="lora_only")
    taus, _, _ = task_vectors(base, path)
    torch.testing.assert_close(taus["model.layers.0.conv.weight"], (4 / 2.00001 * b @ (a * e)).view(4, 3, 2, 2))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "nothing to fold"),
        ({"peft_type": "PREFIX_TUNING"}, "nothing to fold"),
        ({"peft_type": "ADAPTION_PROMPT"}, "nothing to fold"),
        ({"peft_type": "XLORA"}, "publish each of them"),
        ({"peft_type": "RANDLORA"}, "merge_and_unload"),
        ({"peft_type": None}, "no adapter of PEFT"),
        ({"peft_type": None, "fine_tune_type": "lora"}, "mlx-lm"),
        ({"alora_invocation_tokens": [1]}, "which no merged weight can do"),
        ({"layer_replication": [[0, 2]]}, "cannot be folded"),
        ({"loftq_config": {"loftq_bits": 4}}, "merge it into that base"),
        ({"enable_lora": [True, False]}, "train it anew"),
        ({"a_key_of_the_future": 1}, "merge_and_unload"),
    ],
)
def test_what_to_do_with_an_adapter_that_is_not_folded(
    base: Path, tmp_path: Path, config: dict[str, Any], word: str
) -> None:
    refusal = refused(base, published(tmp_path / "x", **config))
    assert refusal.reason == "adapter-kind"
    assert word in str(refusal)


def copied(path: Path, folder: str) -> Path:
    (path / folder).mkdir(parents=True)
    published(path / folder)
    return path


@pytest.mark.parametrize(
    ("name", "reason", "word"),
    [
        ("model.safetensors", "adapter-kind", "which is meant"),
        ("model.safetensors.index.json", "adapter-kind", "which is meant"),
        ("non_lora_trainables.bin", "adapter-kind", "trained beside"),
        ("trainable_params.bin", "adapter-kind", "trained beside"),
        ("mm_projector.bin", "adapter-kind", "trained beside"),
        ("vit.safetensors", "adapter-kind", "trained beside"),
        ("learned_embeds.safetensors", "adapter-kind", "trained beside"),
    ],
)
def test_weights_beside_an_adapter(base: Path, tmp_path: Path, name: str, reason: str, word: str) -> None:
    path = published(tmp_path / "x")
    (path / name).write_bytes(b"")
    refusal = refused(base, path)
    assert refusal.reason == reason
    assert name in str(refusal)
    assert word in str(refusal)


def test_files_beside_an_adapter_that_are_none_of_it(base: Path, tmp_path: Path) -> None:
    path = published(tmp_path / "x")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "tokenizer.model", "pytorch_model.bin"):
        (path / name).write_bytes(b"")
    copied(path, "checkpoint-10")
    assert task_vectors(base, path)[1].folded == (f"{Q}.weight",)


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin"])
def test_a_value_head_stays_out_and_is_said_to(base: Path, tmp_path: Path, name: str) -> None:
    path = published(tmp_path / "x", {"v_head.summary.weight": torch.zeros(1, 6)})
    (path / name).write_bytes(b"")
    assert task_vectors(base, path)[1].extra == ("v_head.summary.weight", name)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("pytorch_adapter.bin", "merge_adapter"),
        ("adapter_model.bin", "save_pretrained"),
        ("notes.txt", "publish it again"),
    ],
)
def test_a_configuration_without_the_weights_of_peft(base: Path, tmp_path: Path, name: str, word: str) -> None:
    path = published(tmp_path / "x")
    (path / "adapter_model.safetensors").rename(path / name)
    assert word in str(refused(base, path))


def test_an_adapter_in_a_folder_of_its_directory(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "x"
    for folder in ("dpo", "sft", "v1.0", "zz"):
        copied(path, folder)
    (path / "README.md").write_text("two adapters")
    refusal = refused(base, path)
    assert refusal.reason == "no-weights"
    assert "dpo, sft, v1.0 and 1 more" in str(refusal)
    assert task_vectors(base, path / "sft")[1].folded == (f"{Q}.weight",)


def test_several_files_that_could_be_the_adapter(base: Path, tmp_path: Path) -> None:
    path = published(tmp_path / "x")
    (path / "adapter_model.safetensors").rename(path / "lora.safetensors")
    assert task_vectors(base, path)[1].folded == (f"{Q}.weight",)
    (path / "old.safetensors").write_bytes(b"")
    assert "if lora.safetensors is meant, call it so" in str(refused(base, path))
