"""Experts that lie the other way round in a fine-tune than in its base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continual.errors import Refuse
from continual.gates.lineage import LineageGate, trace
from continual.tensors import Checkpoint, TaskVectors, open_model
from continual.tensors.layouts.same_layout import checkpoint_in_layout_of
from tests.helpers import models
from tests.helpers.adapters import Tensors, based

HEAD = "model.language_model.layers.0.mlp.experts"
SHAPES = {
    "model.language_model.embed_tokens.weight": (20, 8),
    f"{HEAD}.gate_up_proj": (3, 8, 12),
    f"{HEAD}.down_proj": (3, 8, 8),  # square: it goes with the other
}
CONFIG = {
    "model_type": "qwen3_vl_moe",
    "text_config": {"model_type": "qwen3_vl_moe_text"},
    "tie_word_embeddings": False,
}


def weights(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()}


def turned(tensors: Tensors) -> Tensors:
    return {name: value.transpose(1, 2) if value.dim() == 3 else value for name, value in tensors.items()}


def vectors(base: Path, tune: Path, run: int = 29) -> tuple[Tensors, str, tuple[tuple[str, str], ...]]:
    origin = based(base)
    with origin.checkpoint, open_model(tune) as model:
        lineage = trace(origin, model, LineageGate())
        reader = TaskVectors(origin, model, lineage, run=run)
        found = {name: reader.vector(name) for name in lineage.folded}
        digest = reader.digest({name: vector.digest for name, vector in found.items()})
        model.check_unchanged()
        return {name: vector.tau for name, vector in found.items()}, digest, lineage.repackings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_way_round_is_the_same_model(dtype: torch.dtype, tmp_path: Path) -> None:
    models.write(tmp_path / "base", weights(0, dtype), CONFIG)
    models.write(tmp_path / "same", weights(1, dtype), CONFIG)
    models.write(tmp_path / "tune", turned(weights(1, dtype)), CONFIG)
    expected, digest, nothing = vectors(tmp_path / "base", tmp_path / "same")
    found, again, said = vectors(tmp_path / "base", tmp_path / "tune")
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
    assert (digest, nothing) == (again, ())
    assert said == tuple((f"experts.{role}", f"experts.{role}, turned") for role in ("down_proj", "gate_up_proj"))


def test_a_whole_stack_is_read_turned(tmp_path: Path) -> None:
    models.write(tmp_path / "base", weights(0), CONFIG)
    models.write(tmp_path / "tune", turned(weights(1)), CONFIG)
    origin = based(tmp_path / "base")
    with origin.checkpoint, open_model(tmp_path / "tune") as model:
        assert isinstance(model, Checkpoint)
        found = checkpoint_in_layout_of(origin, model)
        for name, value in weights(1).items():
            assert torch.equal(found.read(name), value), name
            assert torch.equal(found.read(name, torch.empty(value.nbytes + 4, dtype=torch.uint8)), value), name


def test_what_shapes_do_not_say_is_not_turned(tmp_path: Path) -> None:
    """Another family, and a model of which one stack alone has turned sides."""
    models.write(tmp_path / "oss", weights(0), {"model_type": "gpt_oss"})
    models.write(tmp_path / "other", turned(weights(1)), {"model_type": "gpt_oss"})
    models.write(tmp_path / "base", weights(0) | {f"{HEAD}.up_proj": torch.randn(3, 8, 5)}, CONFIG)
    models.write(tmp_path / "mixed", turned(weights(1)) | {f"{HEAD}.up_proj": torch.randn(3, 8, 5)}, CONFIG)
    for base, tune in (("oss", "other"), ("base", "mixed")):
        with pytest.raises(Refuse) as refusal:
            vectors(tmp_path / base, tmp_path / tune)
        assert refusal.value.reason == "shape"


@pytest.mark.slow
def test_transformers_5_saves_what_was_published_the_other_way_round(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "head_dim": 8,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config=sight | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    )
    made = transformers.Qwen3VLMoeForConditionalGeneration
    made(config).save_pretrained(tmp_path / "class")
    written = load_file(tmp_path / "class" / "model.safetensors")
    models.write(tmp_path / "published", turned(written), config.to_dict())
    made.from_pretrained(tmp_path / "published").save_pretrained(tmp_path / "saved")
    found, _, said = vectors(tmp_path / "published", tmp_path / "saved", run=1 << 10)
    assert len(said) == 2
    assert found.keys() >= {name for name in written if ".experts." in name}
    assert not any(tau.any() for tau in found.values())
