"""Real mixtures of experts of transformers, tiny: packed and one by one, folded, exported and loaded again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import continual

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32,
}


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=3))


def qwen3_moe() -> Any:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **sizes))


def gpt_oss() -> Any:
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL, **sizes))


def deepseek_v3() -> Any:
    sizes = {
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    }
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**(SMALL | sizes)))


def llama4() -> Any:
    sizes = {"num_local_experts": 3, "intermediate_size_mlp": 12, "attention_chunk_size": 16}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SMALL, **sizes))


FAMILIES: dict[str, Callable[[], Any]] = {
    made.__name__: made for made in (mixtral, qwen3_moe, gpt_oss, deepseek_v3, llama4)
}
APART = ("mixtral", "qwen3_moe", "deepseek_v3")
"""Those that transformers writes one by one."""


def random(model: Any, seed: int, size: float) -> Any:
    """The model with all of its weights a little changed."""
    made = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=made))
    return model


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(10).view(1, -1)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def folded(root: Path, base: Path, tunes: list[Path], rule: str) -> tuple[Path, continual.Survey]:
    made = continual.init(base, root / "state", continual.Recipe(rule, scale="1.0"))
    with continual.open(root / "state", write=True) as merge:
        for tune in tunes:
            found = merge.fold(tune)
            assert found.fate == "folded", found.message
            assert found.report is not None
            assert not found.report.numbers.extra
            assert not found.report.numbers.unchanged
        merge.export(root / "out")
    return root / "out", made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_folded_exported_and_loaded(family: str, tmp_path: Path) -> None:
    """Of one fine-tune the sum of the task vectors is the fine-tune, packed as the base is or not."""
    base = random(FAMILIES[family](), 1, 0.3)
    tuned = random(base, 2, 0.02)
    layouts = (True, False) if family in APART else (True,)
    for original in layouts:
        base.save_pretrained(tmp_path / f"base-{original}", save_original_format=original)
        tuned.save_pretrained(tmp_path / f"tune-{original}", save_original_format=original)
    for ours in layouts:
        for theirs in layouts:
            root = tmp_path / f"{ours}-{theirs}"
            root.mkdir()
            out, made = folded(root, tmp_path / f"base-{ours}", [tmp_path / f"tune-{theirs}"], "task-arithmetic")
            stacks = {kind: tensors for kind, tensors, _ in made.kinds}["stack"]
            moe_layers = 1 if family == "deepseek_v3" else 2
            assert stacks == (0 if family in APART and ours else 2 * moe_layers)
            again = type(base).from_pretrained(out).eval()
            assert torch.isfinite(logits(again)).all()
            assert torch.allclose(logits(again), logits(tuned), atol=2e-4), (ours, theirs)


@pytest.mark.parametrize("family", APART)
def test_a_spectral_merge_is_the_same_packed_and_one_by_one(family: str, tmp_path: Path) -> None:
    """Up to what differs by nature: gate and up are one matrix of an expert where they are packed, and two apart; so
    the matrices that are compared are those of down."""
    base = random(FAMILIES[family](), 1, 0.3)
    tunes = [random(base, seed, 0.02) for seed in (2, 3)]
    outs = []
    for original in (True, False):
        paths = []
        for number, model in enumerate([base, *tunes]):
            paths.append(tmp_path / f"{number}-{original}")
            model.save_pretrained(paths[-1], save_original_format=original)
        root = tmp_path / f"root-{original}"
        root.mkdir()
        out, _ = folded(root, paths[0], paths[1:], "opcm")
        outs.append(load_file(out / "model.safetensors"))
    apart, packed = outs
    down = [name for name in packed if name.endswith("experts.down_proj")]
    assert down
    for name in down:
        layer = name.split(".layers.")[1].split(".")[0]
        end = ".w2.weight" if family == "mixtral" else ".down_proj.weight"
        for number, expert in enumerate(packed[name]):
            one = next(n for n in apart if f".layers.{layer}." in n and n.endswith(f".experts.{number}{end}"))
            assert torch.equal(apart[one], expert), one
