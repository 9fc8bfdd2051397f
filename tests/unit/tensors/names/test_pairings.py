"""Which matrices of a layer only count as a product, and where their heads lie."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from continual.records import TensorSpec
from continual.tensors.names.pairings import Pairing, Side, pairings

Shapes = Mapping[str, tuple[int, ...]]


def found(config: Mapping[str, object], shapes: Shapes) -> dict[tuple[str, str], Pairing]:
    specs = [TensorSpec(name, shape, "F32", "matrix") for name, shape in sorted(shapes.items())]
    return {(one.where, one.kind): one for one in pairings(specs, config)}


def test_grouped_queries() -> None:
    config = {"model_type": "llama", "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2}
    head = "model.layers.0.self_attn"
    pairs = found(
        config,
        {
            f"{head}.q_proj.weight": (24, 24),
            f"{head}.k_proj.weight": (8, 24),
            f"{head}.v_proj.weight": (8, 24),
            f"{head}.o_proj.weight": (24, 24),
            "model.layers.0.mlp.gate_proj.weight": (40, 24),
            "model.layers.0.mlp.up_proj.weight": (40, 24),
            "model.layers.0.mlp.down_proj.weight": (24, 40),
        },
    )
    query, key = Side(f"{head}.q_proj.weight", 0, 4, False), Side(f"{head}.k_proj.weight", 0, 4, False)
    output, value = Side(f"{head}.o_proj.weight", 0, 4, True), Side(f"{head}.v_proj.weight", 0, 4, False)
    assert pairs == {
        (head, "query-key"): Pairing(head, "query-key", query, key, 6, 3, 4),
        (head, "value-output"): Pairing(head, "value-output", output, value, 6, 3, 4),
        ("model.layers.0.mlp", "channels"): Pairing(
            "model.layers.0.mlp",
            "channels",
            Side("model.layers.0.mlp.up_proj.weight", 0, 1, False),
            Side("model.layers.0.mlp.down_proj.weight", 0, 1, True),
            40,
            1,
            1,
        ),
    }


def test_fused_and_turned() -> None:
    config = {"model_type": "gpt2", "n_embd": 12, "n_head": 3}
    shapes = {
        "h.0.attn.c_attn.weight": (12, 36),
        "h.0.attn.c_proj.weight": (12, 12),
        "h.0.mlp.c_fc.weight": (12, 48),
        "h.0.mlp.c_proj.weight": (48, 12),
    }
    pairs = found(config, shapes)
    assert pairs["h.0", "query-key"].second == Side("h.0.attn.c_attn.weight", 12, 4, True)
    assert pairs["h.0", "value-output"].first == Side("h.0.attn.c_proj.weight", 0, 4, False)
    assert pairs["h.0", "value-output"].second == Side("h.0.attn.c_attn.weight", 24, 4, True)
    assert pairs["h.0", "channels"].first == Side("h.0.mlp.c_fc.weight", 0, 1, True)
    assert pairs["h.0", "channels"].second == Side("h.0.mlp.c_proj.weight", 0, 1, False)


def test_head_by_head() -> None:
    config = {"model_type": "gpt_neox", "hidden_size": 12, "num_attention_heads": 3}
    name = "layers.0.attention.query_key_value.weight"
    pairs = found(config, {name: (36, 12), "layers.0.attention.dense.weight": (12, 12)})
    assert pairs["layers.0.attention", "query-key"].second == Side(name, 4, 12, False)
    assert pairs["layers.0.attention", "value-output"].second == Side(name, 8, 12, False)
    assert not found(config | {"model_type": "falcon"}, {name: (36, 12), "layers.0.attention.dense.weight": (12, 12)})


@pytest.mark.parametrize(
    ("shapes", "where"),
    [
        ({"e.0.attention.self.query.weight": (8, 8), "e.0.attention.self.key.weight": (8, 8)}, "e.0.attention.self"),
        (
            {"e.0.attention.attention.value.weight": (8, 8), "e.0.attention.output.dense.weight": (8, 8)},
            "e.0.attention",
        ),
        ({"b.0.layer.0.SelfAttention.q.weight": (8, 8), "b.0.layer.0.SelfAttention.k.weight": (8, 8)}, "b.0.layer.0.S"),
        ({"e.0.intermediate.dense.weight": (32, 8), "e.0.output.dense.weight": (8, 32)}, "e.0"),
        ({"l.0.mlp.gate_up_proj.weight": (64, 8), "l.0.mlp.down_proj.weight": (8, 32)}, "l.0.mlp"),
    ],
)
def test_other_names(shapes: Shapes, where: str) -> None:
    (pair,) = found({"num_attention_heads": 2}, shapes).values()
    assert pair.where.startswith(where)
    assert pair.heads == (32 if pair.kind == "channels" else 2)


def test_a_layer_without_known_heads_is_one_of_them() -> None:
    shapes = {"l.0.q_proj.weight": (8, 8), "l.0.k_proj.weight": (8, 8)}
    assert found({}, shapes)["l.0", "query-key"].size == 8
    assert not found({}, {"l.0.q_proj.weight": (8, 8), "l.0.k_proj.weight": (4, 8)})
    assert not found({}, {"l.0.q_proj.weight": (2048, 8), "l.0.k_proj.weight": (2048, 8)}), "too large a square"
    assert found({"text_config": {"num_attention_heads": 4}}, shapes)["l.0", "query-key"].size == 2
