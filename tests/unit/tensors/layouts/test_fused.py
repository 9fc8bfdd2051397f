"""Dense layers that are fused in one of base and fine-tune, and apart in the other, are the same weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from continual.errors import Refuse
from continual.gates.lineage import LineageGate, trace
from continual.records import Lineage
from continual.tensors import TaskVectors, open_model
from tests.helpers import models
from tests.helpers.adapters import Tensors, based, plain, refused, task_vectors

HIDDEN, HEADS, GROUPS, INNER = 16, 4, 2, 24
SIZE = HIDDEN // HEADS
QUERIES, KEYS = HEADS * SIZE, GROUPS * SIZE
ROWS = {"q_proj": (0, QUERIES), "k_proj": (QUERIES, QUERIES + KEYS), "v_proj": (QUERIES + KEYS, QUERIES + 2 * KEYS)}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "intermediate_size": INNER,
    "vocab_size": 20,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
}
PHI, LLAMA, GLM = ({"model_type": kind} | SIZES for kind in ("phi3", "llama", "glm4"))
SHAPES = {
    "model.embed_tokens.weight": (20, HIDDEN),
    f"{ATTENTION}.qkv_proj.weight": (QUERIES + 2 * KEYS, HIDDEN),
    f"{ATTENTION}.o_proj.weight": (HIDDEN, HIDDEN),
    f"{MLP}.gate_up_proj.weight": (2 * INNER, HIDDEN),
    f"{MLP}.down_proj.weight": (HIDDEN, INNER),
}


def weights(seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def apart(tensors: Tensors) -> Tensors:
    """The same in Llama's names."""
    found = {name: value for name, value in tensors.items() if "qkv" not in name and "gate_up" not in name}
    for part, (start, stop) in ROWS.items():
        found[f"{ATTENTION}.{part}.weight"] = tensors[f"{ATTENTION}.qkv_proj.weight"][start:stop]
    gate, up = tensors[f"{MLP}.gate_up_proj.weight"].chunk(2)
    return found | {f"{MLP}.gate_proj.weight": gate, f"{MLP}.up_proj.weight": up}


def vectors(base: Path, tune: Path) -> tuple[Tensors, str, Lineage]:
    origin = based(base)
    with origin.checkpoint, open_model(tune) as model:
        lineage = trace(origin, model, LineageGate())
        reader = TaskVectors(origin, model, lineage, run=23)
        found = {name: reader.vector(name) for name in lineage.folded}
        digest = reader.digest({name: vector.digest for name, vector in found.items()})
        model.check_unchanged()
        return {name: vector.tau for name, vector in found.items()}, digest, lineage


@pytest.mark.parametrize("fused", [True, False])
def test_the_two_layouts_are_one_model(fused: bool, tmp_path: Path) -> None:
    base, tuned = weights(0), weights(1)
    models.write(tmp_path / "base", base if fused else apart(base), PHI if fused else LLAMA)
    models.write(tmp_path / "fused", tuned, PHI)
    models.write(tmp_path / "apart", apart(tuned), LLAMA)
    here, there = ("fused", "apart") if fused else ("apart", "fused")
    same, digest, straight = vectors(tmp_path / "base", tmp_path / here)
    found, again, lineage = vectors(tmp_path / "base", tmp_path / there)
    assert all(torch.equal(found[name], same[name]) for name in same)
    assert (digest, found.keys(), lineage.unchanged, lineage.extra) == (again, same.keys(), (), ())
    pairs = (("gate_up_proj", "gate_proj + up_proj"), ("qkv_proj", "q_proj + k_proj + v_proj"))
    assert straight.repackings == ()
    assert sorted(lineage.repackings) == sorted(pairs if fused else [(theirs, ours) for ours, theirs in pairs])


def test_biases_go_with_their_weights(tmp_path: Path) -> None:
    base, tuned = weights(0), weights(1)
    for tensors, seed in ((base, 2), (tuned, 3)):
        torch.manual_seed(seed)
        tensors[f"{MLP}.gate_up_proj.bias"] = torch.randn(2 * INNER)
    single = apart({name: value for name, value in tuned.items() if not name.endswith("bias")})
    gate, up = tuned[f"{MLP}.gate_up_proj.bias"].chunk(2)
    single |= {f"{MLP}.gate_proj.bias": gate, f"{MLP}.up_proj.bias": up}
    models.write(tmp_path / "base", base, PHI)
    models.write(tmp_path / "apart", single, LLAMA)
    found, _, _ = vectors(tmp_path / "base", tmp_path / "apart")
    assert torch.equal(
        found[f"{MLP}.gate_up_proj.bias"], tuned[f"{MLP}.gate_up_proj.bias"] - base[f"{MLP}.gate_up_proj.bias"]
    )


def broken(change: str) -> Tensors:
    found = apart(weights(1))
    name = f"{ATTENTION}.k_proj.weight"
    if change == "missing":
        del found[name]
    elif change == "dtype":
        found[name] = found[name].bfloat16()
    elif change == "shape":
        found[name] = torch.randn(KEYS + SIZE, HIDDEN)
    elif change == "prefix":
        found[f"{ATTENTION}.qkv_proj.weight"] = weights(1)[f"{ATTENTION}.qkv_proj.weight"]
    else:  # as many rows in all, and not those of keys and values
        found[name] = torch.randn(KEYS + SIZE, HIDDEN)
        found[f"{ATTENTION}.v_proj.weight"] = torch.randn(KEYS - SIZE, HIDDEN)
    return found


@pytest.mark.parametrize("change", ["missing", "dtype", "shape", "prefix", "uneven"])
def test_parts_that_do_not_fit_together_are_refused(change: str, tmp_path: Path) -> None:
    models.write(tmp_path / "base", weights(0), PHI)
    models.write(tmp_path / "tune", broken(change), LLAMA)
    with pytest.raises(Refuse) as refusal:
        vectors(tmp_path / "base", tmp_path / "tune")
    assert refusal.value.reason == {"uneven": "shape"}.get(change, change)
    assert "tune: " in str(refusal.value)
    assert "k_proj" in str(refusal.value)


def test_a_fused_tensor_of_other_heads_is_refused(tmp_path: Path) -> None:
    models.write(tmp_path / "base", apart(weights(0)), LLAMA)
    tuned = weights(1)
    tuned[f"{ATTENTION}.qkv_proj.weight"] = torch.randn(3 * QUERIES, HIDDEN)
    models.write(tmp_path / "tune", tuned, PHI)
    with pytest.raises(Refuse, match=r"qkv_proj.weight has shape \[48, 16\], and the base has .*q_proj") as refusal:
        vectors(tmp_path / "base", tmp_path / "tune")
    assert refusal.value.reason == "shape"


@pytest.mark.parametrize("kind", ["gpt_neox", "persimmon", ""])
def test_what_a_family_may_interleave_is_not_cut(kind: str, tmp_path: Path) -> None:
    models.write(tmp_path / "base", weights(0), {"model_type": kind} | SIZES)
    models.write(tmp_path / "tune", apart(weights(1)), LLAMA)
    with pytest.raises(Refuse) as refusal:
        vectors(tmp_path / "base", tmp_path / "tune")
    assert refusal.value.reason == "missing"


def factors(name: str, rows: int, columns: int = HIDDEN, **more: torch.Tensor) -> Tensors:
    module = f"base_model.model.{name}"
    return {f"{module}.lora_A.weight": torch.randn(2, columns), f"{module}.lora_B.weight": torch.randn(rows, 2)} | {
        f"{module}.{role}": value for role, value in more.items()
    }


def product(tensors: Tensors, name: str) -> torch.Tensor:
    a, b = (tensors[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
    return 2.0 * b @ a


def test_an_adapter_of_parts_changes_their_rows(tmp_path: Path) -> None:
    """As Unsloth's of Phi-4, which it rewrites in Llama's names; keys are not adapted."""
    models.write(tmp_path / "base", weights(0), PHI)
    tensors = factors(f"{ATTENTION}.q_proj", QUERIES) | factors(f"{ATTENTION}.v_proj", KEYS)
    tensors |= factors(f"{MLP}.up_proj", INNER) | factors(f"{MLP}.down_proj", HIDDEN, INNER)
    found, lineage, _ = task_vectors(tmp_path / "base", plain(tmp_path / "x", tensors))
    assert lineage.repackings == (("gate_up_proj", "gate_proj + up_proj"), ("qkv_proj", "q_proj + k_proj + v_proj"))
    expected = torch.zeros(QUERIES + 2 * KEYS, HIDDEN)
    for part in ("q_proj", "v_proj"):
        start, stop = ROWS[part]
        expected[start:stop] = product(tensors, f"{ATTENTION}.{part}")
    torch.testing.assert_close(found[f"{ATTENTION}.qkv_proj.weight"], expected)
    up = torch.cat([torch.zeros(INNER, HIDDEN), product(tensors, f"{MLP}.up_proj")])
    torch.testing.assert_close(found[f"{MLP}.gate_up_proj.weight"], up)
    torch.testing.assert_close(found[f"{MLP}.down_proj.weight"], product(tensors, f"{MLP}.down_proj"))
    assert len(found) == 3


def test_an_adapter_of_a_fused_layer_changes_all_parts(tmp_path: Path) -> None:
    models.write(tmp_path / "base", apart(weights(0)), LLAMA)
    tensors = factors(f"{ATTENTION}.qkv_proj", QUERIES + 2 * KEYS) | factors(f"{MLP}.gate_up_proj", 2 * INNER)
    found, lineage, _ = task_vectors(tmp_path / "base", plain(tmp_path / "x", tensors))
    assert lineage.repackings == (("gate_proj + up_proj", "gate_up_proj"), ("q_proj + k_proj + v_proj", "qkv_proj"))
    whole = product(tensors, f"{ATTENTION}.qkv_proj")
    for part, (start, stop) in ROWS.items():
        torch.testing.assert_close(found[f"{ATTENTION}.{part}.weight"], whole[start:stop])
    gate, up = product(tensors, f"{MLP}.gate_up_proj").chunk(2)
    torch.testing.assert_close(found[f"{MLP}.gate_proj.weight"], gate)
    torch.testing.assert_close(found[f"{MLP}.up_proj.weight"], up)


def test_dora_of_parts_on_a_fused_base(tmp_path: Path) -> None:
    models.write(tmp_path / "fused", weights(0), PHI)
    models.write(tmp_path / "apart", apart(weights(0)), LLAMA)
    tensors = factors(f"{MLP}.gate_proj", INNER, lora_magnitude_vector=torch.rand(INNER))
    adapter = plain(tmp_path / "x", tensors, use_dora=True)
    single, _, _ = task_vectors(tmp_path / "apart", adapter)
    found, _, _ = task_vectors(tmp_path / "fused", adapter)
    torch.testing.assert_close(found[f"{MLP}.gate_up_proj.weight"][:INNER], single[f"{MLP}.gate_proj.weight"])
    assert not found[f"{MLP}.gate_up_proj.weight"][INNER:].any()
    fused = factors(f"{MLP}.gate_up_proj", 2 * INNER, lora_magnitude_vector=torch.rand(2 * INNER))
    assert refused(tmp_path / "apart", plain(tmp_path / "y", fused, use_dora=True)).reason == "adapter-kind"


@pytest.mark.parametrize(
    ("config", "name", "rows", "reason", "said"),
    [
        (PHI, "q_proj", QUERIES + SIZE, "shape", "rows 0 on of model.layers.0.self_attn.qkv_proj.weight"),
        (
            PHI | {"num_key_value_heads": 4},
            "q_proj",
            QUERIES,
            "shape",
            "config.json (heads and their size) q_proj + k_proj + v_proj take 48",
        ),
        (GLM, "q_proj", QUERIES, "adapter-target", "q_proj"),
        ({"model_type": "persimmon"} | SIZES, "q_proj", QUERIES, "adapter-target", "q_proj"),
    ],
)
def test_an_adapter_of_parts_that_have_no_place(
    config: dict[str, Any], name: str, rows: int, reason: str, said: str, tmp_path: Path
) -> None:
    models.write(tmp_path / "base", weights(0), config)
    refusal = refused(tmp_path / "base", plain(tmp_path / "x", factors(f"{ATTENTION}.{name}", rows)))
    assert refusal.reason == reason
    assert said in str(refusal)


@pytest.mark.slow
def test_phi_3_in_the_names_of_llama_answers_alike(tmp_path: Path) -> None:
    """The order of the rows is that of transformers' classes: both models say the same."""
    transformers = pytest.importorskip("transformers")
    sizes = SIZES | {
        "pad_token_id": 0,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(0)
    phi = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes)).eval()
    phi.save_pretrained(tmp_path / "phi")
    written = load_file(tmp_path / "phi" / "model.safetensors")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    llama.load_state_dict(apart(written))
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(llama(tokens).logits, phi(tokens).logits)
    llama.save_pretrained(tmp_path / "llama")
    found, _, lineage = vectors(tmp_path / "phi", tmp_path / "llama")
    assert not any(tau.any() for tau in found.values())
    assert found.keys() == written.keys()
    assert len(lineage.repackings) == 2
