"""What is left over between a base and a fine-tune: buffers, heads, other layouts, parts of adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from continual.engine.outcomes import named
from continual.errors import Refuse
from continual.gates.lineage import LineageGate, trace
from continual.records import Lineage
from continual.tensors import BaseModel, Checkpoint, describe, open_model
from continual.tensors.buffers import is_buffer

Tensors = dict[str, torch.Tensor]
ATTENTION = "model.layers.0.self_attn."
TENSORS: Tensors = {
    "model.embed_tokens.weight": torch.randn(10, 4),
    f"{ATTENTION}q_proj.weight": torch.randn(4, 4),
    f"{ATTENTION}o_proj.weight": torch.randn(4, 4),
    "model.layers.0.mlp.experts.up_proj": torch.randn(2, 6, 4),
    "model.layers.0.rotary_emb.inv_freq": torch.randn(2),
    "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8),
    "model.norm.weight": torch.randn(4),
    "lm_head.dense.weight": torch.randn(4, 4),
}
BUFFERS = ("model.layers.0.attn.bias", "model.layers.0.rotary_emb.inv_freq")


def save(path: Path, tensors: Tensors) -> Path:
    path.mkdir()
    save_file({name: t.clone() for name, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Iterator[BaseModel]:
    with open_model(save(tmp_path / "base", TENSORS)) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        yield describe(checkpoint)


def traced(base: BaseModel, tmp_path: Path, tensors: Tensors, **policy: Any) -> Lineage:
    with open_model(save(tmp_path / "ft", tensors)) as model:
        return trace(base, model, LineageGate(**policy))


def without(*names: str) -> Tensors:
    return {name: t for name, t in TENSORS.items() if name not in names}


def test_buffers_may_be_missing_other_or_more(base: BaseModel, tmp_path: Path) -> None:
    lineage = traced(base, tmp_path, without(*BUFFERS))
    assert sorted(lineage.unchanged) == sorted(BUFFERS)
    (tmp_path / "ft").rename(tmp_path / "first")
    other = {
        BUFFERS[0]: torch.ones(1, 1, 16, 16, dtype=torch.bool),
        BUFFERS[1]: torch.zeros(9),
        "model.embeddings.position_ids": torch.arange(9),
        "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
    }
    lineage = traced(base, tmp_path, TENSORS | other)
    assert (sorted(lineage.unchanged), lineage.extra) == (sorted(BUFFERS), ())
    assert len(lineage.folded) == len(TENSORS) - 2


def test_a_bias_and_statistics_are_no_buffers() -> None:
    assert not is_buffer("h.0.attn.bias", (64,))
    assert not is_buffer("h.0.attn.bias", (1, 3, 8, 8))
    assert not is_buffer("bn.running_mean", (8,))
    assert not is_buffer("mlp.gate.e_score_correction_bias", (8,))
    assert is_buffer("h.0.attn.bias", (1, 1, 8, 8))


@pytest.mark.parametrize(
    ("gone", "instead"),
    [
        pytest.param(f"{ATTENTION}q_proj.weight", {f"{ATTENTION}qkv.weight": torch.zeros(12, 4)}, id="fused"),
        pytest.param(
            "model.layers.0.mlp.experts.up_proj",
            {"model.layers.0.mlp.experts.all.weight": torch.zeros(12, 4)},
            id="experts in another layout",
        ),
        pytest.param("model.embed_tokens.weight", {"tokens.weight": torch.zeros(10, 4)}, id="another name"),
        pytest.param("model.norm.weight", {"final.scale": torch.zeros(4)}, id="a vector"),
        pytest.param(f"{ATTENTION}q_proj.weight", {"blocks.7.query.weight": torch.zeros(4, 4)}, id="another stack"),
        pytest.param("model.norm.weight", {"blocks.7.head.norm.weight": torch.zeros(4)}, id="a head in a stack"),
    ],
)
@pytest.mark.parametrize("missing", ["refuse", "unchanged"])
def test_what_is_there_under_another_name_is_never_taken_for_left_out(
    base: BaseModel, tmp_path: Path, gone: str, instead: Tensors, missing: str
) -> None:
    with pytest.raises(Refuse) as refusal:
        traced(base, tmp_path, without(gone) | instead, missing=missing)
    message = str(refusal.value)
    assert refusal.value.reason == "missing"
    assert gone in message
    assert min(instead) in message
    assert "unchanged" not in message


def test_a_head_of_its_own_is_not_the_head_that_was_left_out(base: BaseModel, tmp_path: Path) -> None:
    tensors = without("lm_head.dense.weight") | {"classifier.dense.weight": torch.zeros(4, 4)}
    with pytest.raises(Refuse, match="missing = unchanged"):
        traced(base, tmp_path, tensors)
    (tmp_path / "ft").rename(tmp_path / "first")
    lineage = traced(base, tmp_path, tensors, missing="unchanged")
    assert (lineage.unchanged, lineage.extra) == (("lm_head.dense.weight",), ("classifier.dense.weight",))


@pytest.mark.parametrize("part", ["lora_A.weight", "base_layer.weight", "lora_B.default.weight"])
def test_an_adapter_that_was_not_merged_is_no_full_model(base: BaseModel, tmp_path: Path, part: str) -> None:
    with pytest.raises(Refuse) as refusal:
        traced(base, tmp_path, TENSORS | {f"{ATTENTION}q_proj.{part}": torch.zeros(2, 4)}, missing="unchanged")
    assert refusal.value.reason == "adapter-kind"
    assert f"q_proj.{part}" in str(refusal.value)


def test_only_buffers_in_common_is_nothing_in_common(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(Refuse, match="not a fine-tune of this base"):
        traced(base, tmp_path, {BUFFERS[1]: torch.zeros(2)}, missing="unchanged")


def test_the_line_says_what_stays_out() -> None:
    assert named((), 0) == ""
    assert named(("v_head.weight",), 1) == "v_head.weight"
    assert named(tuple("abcdefg"), 120) == "a, b, c, d, e and 115 more"
