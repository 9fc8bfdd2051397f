"""What PEFT cannot adapt, or takes for something else, is not among the modules of an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from continual.publish.adaptable import adaptable
from tests.helpers import models
from tests.helpers.adapters import based

LAYER = "model.layers.0."
Q = f"{LAYER}self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("family", "left_out", "kept"),
    [
        ("mamba", {f"{LAYER}mixer.out_proj.weight"}, {f"{LAYER}mixer.in_proj.weight"}),
        ("llama", set(), {f"{LAYER}self_attn.out_proj.weight", f"{LAYER}mlp.up_proj.weight"}),
        ("granitemoe", {f"{LAYER}block_sparse_moe.router.layer.weight"}, {Q}),
        ("deepseek_v3", {f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.shared_experts.down_proj.weight"}, {Q}),
        ("qwen2_moe", set(), {f"{LAYER}mlp.shared_expert.down_proj.weight", Q}),
    ],
)
def test_by_family(tmp_path: Path, family: str, left_out: set[str], kept: set[str]) -> None:
    tensors = {name: torch.zeros(4, 6) for name in (*left_out, *kept)}
    base = based(models.write(tmp_path / "base", tensors, {"model_type": family}))
    with base.checkpoint:
        assert {one.spec.name for one in adaptable(base)} == kept


def test_a_table_of_classes_is_a_table(tmp_path: Path) -> None:
    tensors = {"class_embedder.embedding_table.weight": torch.zeros(4, 6)}
    base = based(models.write(tmp_path / "base", tensors, {"model_type": "dit"}))
    with base.checkpoint:
        (one,) = adaptable(base)
        assert (one.embedding, one.spec.kind) == (True, "plain")
