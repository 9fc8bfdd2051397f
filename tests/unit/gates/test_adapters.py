"""What an adapter brings is folded, listed as left out, or refused: nothing in its file is passed over in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from continual.errors import Refuse
from continual.gates.lineage import LineageGate, trace
from continual.records import Lineage
from continual.tensors import Checkpoint, TaskVectors, describe, open_model
from tests.helpers.adapters import Tensors, plain

HEAD = {"gpt_neox.embed_in.weight": torch.randn(8, 6), "embed_out.weight": torch.randn(8, 6)}
BASE = HEAD | {
    "gpt_neox.layers.0.mlp.weight": torch.randn(4, 6),
    "gpt_neox.layers.0.mlp.bias": torch.randn(4),
    "steps": torch.zeros(1, dtype=torch.int64),
}
MLP = {
    "gpt_neox.layers.0.mlp.lora_A.weight": torch.randn(2, 6),
    "gpt_neox.layers.0.mlp.lora_B.weight": torch.randn(4, 2),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(BASE, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def traced(base: Path, adapter: Path, exclude: tuple[str, ...] = (), **settings: Any) -> tuple[Lineage, Tensors]:
    origin = open_model(base)
    assert isinstance(origin, Checkpoint)
    with origin, open_model(adapter) as model:
        described = describe(origin, exclude=exclude)
        lineage = trace(described, model, LineageGate(**settings))
        vectors = TaskVectors(described, model, lineage)
        return lineage, {name: vectors.vector(name).tau for name in lineage.folded}


def adapter(path: Path, weights: Tensors, **config: Any) -> Path:
    return plain(path, {f"base_model.model.{name}": tensor.clone() for name, tensor in weights.items()}, **config)


def refused(base: Path, model: Path, *words: str, **settings: Any) -> Refuse:
    with pytest.raises(Refuse) as refusal:
        traced(base, model, **settings)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    return refusal.value


def test_factors_on_a_weight_that_is_not_folded(base: Path, tmp_path: Path) -> None:
    head = {"embed_out.lora_A.weight": torch.randn(2, 6), "embed_out.lora_B.weight": torch.randn(8, 2)}
    model, without = adapter(tmp_path / "x", MLP | head), ("embed_out.weight",)
    assert refused(base, model, "embed_out.weight", "lineage.carried", exclude=without).reason == "adapter-target"
    lineage, _ = traced(base, model, without, carried="leave-out")
    assert lineage.extra == ("embed_out.weight",)
    assert lineage.folded == ("gpt_neox.layers.0.mlp.weight",)


def test_a_whole_weight_that_is_not_folded(base: Path, tmp_path: Path) -> None:
    model = adapter(tmp_path / "x", MLP | {"embed_out.weight": torch.randn(8, 6)})
    refused(base, model, "embed_out.weight", exclude=("embed_*",))
    assert traced(base, model, ("embed_*",), carried="leave-out")[0].extra == ("embed_out.weight",)


def test_integers_that_are_trained_are_refused_and_counters_stay_out(base: Path, tmp_path: Path) -> None:
    counter = {"head.norm.num_batches_tracked": torch.zeros((), dtype=torch.int64)}
    assert traced(base, adapter(tmp_path / "x", MLP | counter, modules_to_save=["head"]))[0].extra == ()
    other = {"head.kind": torch.zeros(1, dtype=torch.int64)}
    assert refused(base, adapter(tmp_path / "y", MLP | other, modules_to_save=["head"]), "I64").reason == "dtype"


@pytest.mark.parametrize("family", ["gpt_neox", ""])
def test_a_head_under_another_name(base: Path, tmp_path: Path, family: str) -> None:
    """Where the family says that the two names are one weight it is folded, else it is refused."""
    (base / "config.json").write_text(f'{{"model_type": "{family}"}}' if family else "{}")
    head = torch.randn(8, 6)
    model = adapter(tmp_path / "x", MLP | {"lm_head.weight": head}, modules_to_save=["lm_head"])
    if family:
        torch.testing.assert_close(traced(base, model)[1]["embed_out.weight"], head - BASE["embed_out.weight"])
    else:
        assert refused(base, model, "lm_head.weight", "embed_out.weight").reason == "adapter-target"


def test_a_head_that_the_base_has_not(base: Path, tmp_path: Path) -> None:
    model = adapter(tmp_path / "x", MLP | {"score.weight": torch.randn(2, 6)}, modules_to_save=["score"])
    assert traced(base, model)[0].extra == ("score.weight",)
    assert refused(base, model, "score.weight", extra="refuse").reason == "extra"


def test_a_weight_that_the_layer_has_not(base: Path, tmp_path: Path) -> None:
    bias = {"gpt_neox.layers.0.norm.bias": torch.randn(4)}
    assert refused(base, adapter(tmp_path / "x", MLP | bias, bias="all"), "norm.bias").reason == "adapter-target"


def test_a_bias_that_lora_adds_to_layers_without_one(base: Path, tmp_path: Path) -> None:
    left = {"embed_out.lora_B.weight": torch.randn(8, 2), "embed_out.lora_B.bias": torch.randn(8)}
    model = adapter(tmp_path / "x", {"embed_out.lora_A.weight": torch.randn(2, 6), **left}, lora_bias=True)
    assert refused(base, model, "embed_out.bias", "without lora_bias").reason == "adapter-target"


def test_trained_biases_are_folded(base: Path, tmp_path: Path) -> None:
    bias = {"gpt_neox.layers.0.mlp.base_layer.bias": torch.randn(4)}
    expected = next(iter(bias.values())) - BASE["gpt_neox.layers.0.mlp.bias"]
    for word in ("lora_only", "none"):  # PEFT loads what is there beside the factors, whatever the configuration says
        _, taus = traced(base, adapter(tmp_path / word, MLP | bias, bias=word))
        torch.testing.assert_close(taus["gpt_neox.layers.0.mlp.bias"], expected)
    bare = {"gpt_neox.layers.0.mlp.bias": torch.randn(4)}
    assert refused(base, adapter(tmp_path / "y", MLP | bare), "mlp.bias").reason == "adapter-kind"


def test_a_bias_that_the_base_has_not_can_be_scaled_and_not_added(base: Path, tmp_path: Path) -> None:
    """IA³ scales a bias where there is one; the bias of lora_B has to go somewhere."""
    module = {"embed_out.ia3_l": torch.randn(8, 1)}
    path = adapter(tmp_path / "x", module, peft_type="IA3", r=None, lora_alpha=None)
    assert traced(base, path)[0].folded == ("embed_out.weight",)
    lora = {
        "embed_out.lora_A.weight": torch.randn(2, 6),
        "embed_out.lora_B.weight": torch.randn(8, 2),
        "embed_out.lora_B.bias": torch.randn(8),
    }
    assert refused(base, adapter(tmp_path / "y", lora, lora_bias=True), "embed_out.bias").reason == "adapter-target"


@pytest.mark.parametrize("rows", [5, 11])
def test_rows_in_common_of_a_resized_table(base: Path, tmp_path: Path, rows: int) -> None:
    a, b = torch.randn(2, rows), torch.randn(6, 2)
    down, up = torch.randn(2, 6), torch.randn(rows, 2)
    weights = {
        "gpt_neox.embed_in.lora_embedding_A": a,
        "gpt_neox.embed_in.lora_embedding_B": b,
        "embed_out.lora_A.weight": down,
        "embed_out.lora_B.weight": up,
    }
    model = adapter(tmp_path / "x", weights)
    assert refused(base, model, f"[{rows}, 6]", "common-rows").reason == "vocab"
    lineage, taus = traced(base, model, vocab="common-rows")
    both = min(rows, 8)
    assert lineage.rows == {"gpt_neox.embed_in.weight": both, "embed_out.weight": both}
    for name, product in (("gpt_neox.embed_in.weight", 2 * (b @ a).T), ("embed_out.weight", 2 * up @ down)):
        torch.testing.assert_close(taus[name][:both], product[:both], rtol=1e-5, atol=1e-6)
        assert not taus[name][both:].any()
    table = {"gpt_neox.embed_in.base_layer.weight": torch.randn(rows, 6)}
    _, taus = traced(base, adapter(tmp_path / "y", weights | table), vocab="common-rows")
    whole = table["gpt_neox.embed_in.base_layer.weight"] + 2 * (b @ a).T
    expected = whole[:both] - BASE["gpt_neox.embed_in.weight"][:both]
    torch.testing.assert_close(taus["gpt_neox.embed_in.weight"][:both], expected, rtol=1e-5, atol=1e-6)
    assert not taus["gpt_neox.embed_in.weight"][both:].any()
    other = {"gpt_neox.embed_in.base_layer.weight": torch.randn(rows + 1, 6)}
    assert refused(base, adapter(tmp_path / "z", weights | other), vocab="common-rows").reason == "shape"


def test_trained_tokens_that_the_base_has_not(base: Path, tmp_path: Path) -> None:
    rows = torch.randn(2, 6)
    weights = {"gpt_neox.embed_in.trainable_tokens_delta": rows}
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [9, 1], "r": None, "lora_alpha": None}
    model = adapter(tmp_path / "x", weights, **config)
    assert refused(base, model, "[10, 6]").reason == "vocab"
    _, taus = traced(base, model, vocab="common-rows")
    expected = torch.zeros(8, 6)
    expected[1] = rows[1] - BASE["gpt_neox.embed_in.weight"][1]
    assert torch.equal(taus["gpt_neox.embed_in.weight"], expected)


def test_dora_needs_the_table_that_it_was_trained_on(base: Path, tmp_path: Path) -> None:
    weights = {
        "gpt_neox.embed_in.lora_embedding_A": torch.randn(2, 11),
        "gpt_neox.embed_in.lora_embedding_B": torch.randn(6, 2),
        "gpt_neox.embed_in.lora_magnitude_vector": torch.rand(6) + 1,
    }
    model = adapter(tmp_path / "x", weights, use_dora=True)
    assert refused(base, model, "DoRA", vocab="common-rows").reason == "shape"
    table = torch.randn(11, 6)
    model = adapter(tmp_path / "y", weights | {"gpt_neox.embed_in.base_layer.weight": table}, use_dora=True)
    _, taus = traced(base, model, vocab="common-rows")
    a, b, magnitude = weights.values()
    whole = table + 2 * (b @ a).T
    expected = (magnitude / whole.norm(dim=0) * whole)[:8] - BASE["gpt_neox.embed_in.weight"]
    torch.testing.assert_close(taus["gpt_neox.embed_in.weight"], expected, rtol=1e-5, atol=1e-5)
