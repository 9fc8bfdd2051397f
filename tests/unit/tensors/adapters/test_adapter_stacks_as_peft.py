"""LoRA on the parameters of experts against PEFT: what PEFT saves, read as task vectors, is what PEFT merges, whether
the base's files have the experts packed or one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from continual.records import Lineage
from tests.helpers.adapters import plain, task_vectors
from tests.unit.tensors.adapters.test_adapter_kinds_as_peft import saved

pytestmark = pytest.mark.slow

LAYERS = 1
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
PACKED = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral(**more: Any) -> Any:
    config = transformers.MixtralConfig(**SIZES | {"num_local_experts": 3} | more)
    return transformers.MixtralForCausalLM(config).eval()


def qwen(**more: Any) -> Any:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | {"num_experts": 3} | more)).eval()


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **{name: size for name, size in SIZES.items() if name != "head_dim"} | {"num_key_value_heads": 2},
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=0,
    )
    return transformers.DeepseekV3ForCausalLM(config).eval()


def oss(**more: Any) -> Any:
    config = transformers.GptOssConfig(**SIZES | {"num_local_experts": 3, "sliding_window": 16} | more)
    return transformers.GptOssForCausalLM(config).eval()


def llama4(**more: Any) -> Any:
    config = transformers.Llama4TextConfig(
        **SIZES | {"num_local_experts": 3, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 1} | more
    )
    return transformers.Llama4ForCausalLM(config).eval()


def granite() -> Any:
    return transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**SIZES, num_local_experts=3)).eval()


def nemotron() -> Any:
    """Experts without a gate: two stacks whose factors have the same shapes, one the other way round."""
    config = transformers.NemotronHConfig(
        **SIZES,
        hybrid_override_pattern="*E",
        n_routed_experts=3,
        n_group=1,
        topk_group=1,
        moe_shared_expert_intermediate_size=12,
    )
    return transformers.NemotronHForCausalLM(config).eval()


def lora(**more: Any) -> Any:
    return peft.LoraConfig(r=2, lora_alpha=5, **{"target_modules": [], "target_parameters": PACKED} | more)


CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "mixtral": (mixtral, lora()),
    "mixtral-all-linear": (mixtral, lora(target_modules="all-linear", target_parameters=None)),
    "mixtral-one-parameter": (mixtral, lora(target_parameters=["experts.down_proj"])),
    "mixtral-router": (mixtral, lora(target_parameters=["mlp.gate.weight"])),
    "mixtral-patterns": (
        mixtral,
        lora(
            rank_pattern={r".*\.gate_up_proj": 4},
            alpha_pattern={r"layers\.0\.mlp\.experts\.down_proj": 3},
            target_modules=["q_proj"],
            use_rslora=True,
        ),
    ),
    "qwen3-moe": (qwen, lora(target_modules="all-linear", target_parameters=None)),
    "qwen3-moe-one-layer": (lambda: qwen(num_hidden_layers=2), lora(target_parameters=["1.mlp.experts.gate_up_proj"])),
    "qwen3-moe-square": (lambda: qwen(moe_intermediate_size=16), lora(target_parameters=["down_proj"])),
    "deepseek-v3": (deepseek, lora(target_modules="all-linear", target_parameters=None)),
    "gpt-oss": (oss, lora(target_modules=["q_proj"])),
    "gpt-oss-square": (lambda: oss(intermediate_size=16), lora()),
    "gpt-oss-biases": (
        oss,
        lora(target_parameters=[*PACKED, "experts.gate_up_proj_bias", "experts.down_proj_bias", "router.weight"]),
    ),
    "llama-4": (llama4, lora()),
    "llama-4-square": (lambda: llama4(intermediate_size=16), lora()),
    "granite-moe": (granite, lora()),
    "granite-moe-router": (granite, lora(target_parameters=["experts.down_proj", "router.weight"])),
    "nemotron-h": (nemotron, lora(target_parameters=["experts.up_proj", "experts.down_proj"])),
}


def agrees(make: Callable[[], Any], base: Path, adapter: Path, merged: Path) -> Lineage:
    """Checks every task vector of `adapter`, and that nothing else is changed, against the files that PEFT's merge is
    saved to, tensor by tensor of the base's files; and that the model with the adapter answers as the merged one."""
    taus, lineage, _ = task_vectors(base, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
        loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), adapter)
        tokens = torch.arange(12).view(2, 6)
        with torch.no_grad():
            answers = loaded(tokens).logits
        loaded.merge_and_unload().save_pretrained(merged)
        before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
        assert before.keys() == after.keys()
        for name, value in before.items():
            expected = after[name] - value
            tau = taus.get(name, torch.zeros_like(value))
            torch.testing.assert_close(tau, expected, rtol=1e-5, atol=1e-6, msg=name)
            assert name not in taus or tau.count_nonzero(), name
        state = {name: value + taus.get(name, 0) for name, value in before.items()}
        save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
        with torch.no_grad():
            ours = type(model).from_pretrained(merged)(tokens).logits
    torch.testing.assert_close(ours, answers, rtol=1e-4, atol=1e-5)
    return lineage


@pytest.mark.parametrize("case", CASES)
def test_factors_of_experts_are_as_peft_merges_them(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    base, adapter = saved(tmp_path, make(), config)
    agrees(make, base, adapter, tmp_path / "merged")


ONE_BY_ONE = {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}


def of_transformers_4(path: Path, dora: bool = False) -> Path:
    """An adapter of Mixtral as PEFT wrote it under transformers 4: of each expert's layers by itself."""
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for layer, number in ((layer, number) for layer in range(LAYERS) for number in range(3)):
        for role, (rows, columns) in ONE_BY_ONE.items():
            name = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{number}.{role}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=random)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=random)
            if dora:
                tensors[f"{name}.lora_magnitude_vector"] = torch.rand(rows, generator=random)
    return plain(path, tensors, target_modules=["w1", "w2", "w3"], use_dora=dora)


def packed(base: Path, to: Path) -> Path:
    """The base with its experts packed, as the class has them."""
    model = transformers.MixtralForCausalLM.from_pretrained(base)
    (to / "base").mkdir(parents=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, to / "base" / "model.safetensors", metadata={"format": "pt"})
    (to / "base" / "config.json").write_bytes((base / "config.json").read_bytes())
    return to / "base"


def test_factors_of_single_experts_are_as_peft_merges_them(tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path / "base")
    adapter = of_transformers_4(tmp_path / "adapter")
    agrees(mixtral, tmp_path / "base", adapter, tmp_path / "merged")
    merged = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    before = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    found, lineage, _ = task_vectors(packed(tmp_path / "base", tmp_path / "packed"), adapter)
    assert len(found) == 2 * LAYERS
    for name, tau in found.items():
        torch.testing.assert_close(tau, merged[name] - before[name], rtol=1e-5, atol=1e-5)
    assert lineage.repackings == (("experts.down_proj", "experts.*"), ("experts.gate_up_proj", "experts.*"))


@pytest.mark.parametrize("case", ["mixtral", "mixtral-patterns", "mixtral-all-linear"])
def test_a_base_in_either_layout_gives_the_same(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    base, adapter = saved(tmp_path, make(), config)
    single, lineage, _ = task_vectors(base, adapter)
    stacks, straight, _ = task_vectors(packed(base, tmp_path / "packed"), adapter)
    assert straight.repackings == ()
    assert lineage.repackings == (
        ("experts.*.w1.weight + experts.*.w3.weight", "experts.gate_up_proj"),
        ("experts.*.w2.weight", "experts.down_proj"),
    )
    for layer, number in ((layer, number) for layer in range(LAYERS) for number in range(3)):
        ours = f"model.layers.{layer}.block_sparse_moe.experts.{number}"
        theirs = f"model.layers.{layer}.mlp.experts"
        fused = torch.cat([single[f"{ours}.w1.weight"], single[f"{ours}.w3.weight"]])
        torch.testing.assert_close(stacks[f"{theirs}.gate_up_proj"][number], fused)
        torch.testing.assert_close(stacks[f"{theirs}.down_proj"][number], single[f"{ours}.w2.weight"])


def test_dora_of_single_experts_on_a_base_that_packs_them(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base")
    adapter = of_transformers_4(tmp_path / "adapter", dora=True)
    single, _, _ = task_vectors(tmp_path / "base", adapter)
    stacks, _, _ = task_vectors(packed(tmp_path / "base", tmp_path / "packed"), adapter)
    for layer, number in ((layer, number) for layer in range(LAYERS) for number in range(3)):
        ours = f"model.layers.{layer}.block_sparse_moe.experts.{number}"
        fused = torch.cat([single[f"{ours}.w1.weight"], single[f"{ours}.w3.weight"]])
        torch.testing.assert_close(stacks[f"model.layers.{layer}.mlp.experts.gate_up_proj"][number], fused)
