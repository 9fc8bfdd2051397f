"""Kinds, depths and ties from the names and configs that real architectures have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from continual.errors import Misconfigured, Refuse
from continual.tensors import BaseModel, Checkpoint, describe, open_model
from continual.tensors.names.kinds import as_made, is_vocabulary, kind_of
from continual.tensors.names.tied import tables_apart

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def opened(path: Path) -> Checkpoint:
    model = open_model(path)
    assert isinstance(model, Checkpoint)
    return model


def made(tmp_path: Path, model: transformers.PreTrainedModel) -> BaseModel:
    model.save_pretrained(tmp_path / "m")
    with opened(tmp_path / "m") as checkpoint:
        return describe(checkpoint)


def stored(tmp_path: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Checkpoint:
    (tmp_path / "m").mkdir()
    save_file({name.replace("__", "."): t for name, t in tensors.items()}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    return opened(tmp_path / "m")


def matrices(base: BaseModel) -> set[str]:
    return {spec.name for spec in base.specs if spec.kind == "matrix"}


def test_bert(tmp_path: Path) -> None:
    base = made(tmp_path, transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=8)))
    layer = [
        f"bert.encoder.layer.{i}.{n}.weight"
        for i in range(3)
        for n in ("intermediate.dense", "output.dense", "attention.output.dense")
    ]
    attention = [
        f"bert.encoder.layer.{i}.attention.self.{n}.weight" for i in range(3) for n in ("query", "key", "value")
    ]
    assert matrices(base) == {*layer, *attention, "cls.predictions.transform.dense.weight"}
    depth = {spec.name: spec.depth for spec in base.specs}
    assert depth["bert.embeddings.word_embeddings.weight"] == depth["bert.embeddings.LayerNorm.weight"] == 0.0
    assert [depth[f"bert.encoder.layer.{i}.output.dense.weight"] for i in range(3)] == [0.0, 0.5, 1.0]
    assert depth["cls.predictions.transform.dense.weight"] == 1.0
    assert base.aliases["cls.predictions.decoder.weight"] == "bert.embeddings.word_embeddings.weight"
    assert [spec.name for spec in base.specs] == sorted(spec.name for spec in base.specs)


def test_gpt2(tmp_path: Path) -> None:
    base = made(
        tmp_path,
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
        ),
    )
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert matrices(base) == {f"transformer.h.{i}.{p}.weight" for i in range(2) for p in parts}
    assert base.aliases["lm_head.weight"] == "transformer.wte.weight"
    assert {spec.name: spec.depth for spec in base.specs}["transformer.ln_f.weight"] == 1.0


def test_llama_is_not_tied(tmp_path: Path) -> None:
    base = made(tmp_path, transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))
    assert len(matrices(base)) == 3 * 7
    assert base.aliases == {}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {spec.name for spec in base.specs if spec.kind == "plain"}
    assert {spec.name: spec.depth for spec in base.specs}["lm_head.weight"] == 1.0


def test_t5_has_two_stacks_and_a_shared_table(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2
    )
    base = made(tmp_path, transformers.T5ForConditionalGeneration(config))
    depth = {spec.name: spec.depth for spec in base.specs}
    assert depth["encoder.block.1.layer.1.DenseReluDense.wi.weight"] == 1.0
    assert depth["decoder.block.1.layer.2.DenseReluDense.wi.weight"] == 0.5
    assert {a for a, n in base.aliases.items() if n == "shared.weight"} >= {
        "lm_head.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    }
    assert not [name for name in matrices(base) if "relative_attention_bias" in name or "shared" in name]


def test_vit_patches_are_a_convolution(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    base = made(tmp_path, transformers.ViTForImageClassification(config))
    kinds = {spec.name: spec.kind for spec in base.specs}
    patches = next(n for n in kinds if "patch_embeddings" in n and n.endswith("weight"))
    assert kinds[patches] == "plain", "the mean, as embeddings of words are"
    assert kinds["classifier.weight"] == "plain"
    earlier = [replace(spec, kind="matrix") if spec.name == patches else spec for spec in base.specs]
    assert as_made(base.specs, earlier) == tuple(earlier), "a state that has it as a matrix goes on so"
    assert as_made(base.specs, base.specs) == base.specs
    assert {spec.name: spec.depth for spec in base.specs}[patches] == 0.0


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "kind"),
    [
        ("a.fc1.weight", (4, 4), "F32", "matrix"),
        ("a.conv.weight", (4, 4, 3, 3), "BF16", "matrix"),
        ("attn.in_proj_weight", (12, 4), "F32", "matrix"),
        ("a.conv1d.weight", (4, 1, 4), "F32", "plain"),
        ("a.conv.weight", (4, 1, 3, 3), "F32", "matrix"),
        ("visual.conv1.weight", (8, 3, 4, 4), "F32", "plain"),
        ("vision_model.embeddings.patch_embedding.weight", (8, 3, 4, 4), "F32", "plain"),
        ("vision_tower.patch_conv.weight", (8, 3, 4, 4), "F32", "plain"),
        ("patch_embed.proj.weight", (8, 1, 4, 4), "F32", "plain"),
        ("patch_embed.proj.weight", (8, 16, 2, 2), "F32", "matrix"),
        ("layer1.0.conv1.weight", (8, 8, 3, 3), "F32", "matrix"),
        ("mlp.experts.gate_up_proj", (8, 4, 4), "F32", "plain"),
        ("mixer.A_log", (4, 4), "F32", "plain"),
        ("attn.relative_position_bias_table", (9, 2), "F32", "plain"),
        ("norm.weight", (4,), "F32", "plain"),
        ("scale", (), "F32", "plain"),
        ("a.fc1.weight", (0, 4), "F32", "plain"),
        ("embeddings.position_ids", (1, 8), "I64", "carried"),
        ("attn.mask", (8, 8), "BOOL", "carried"),
        ("model.embed_tokens.weight", (40, 4), "F32", "plain"),
        ("model.decoder.embed_positions.weight", (40, 4), "F32", "plain"),
        ("transformer.wpe.weight", (8, 4), "F32", "plain"),
        ("embeddings.token_type_embeddings.weight", (2, 4), "F32", "plain"),
        ("model.embed_proj.weight", (4, 4), "F32", "matrix"),
        ("encoder.embedding_hidden_mapping_in.weight", (4, 8), "F32", "matrix"),
        ("embed_out.weight", (40, 4), "F32", "plain"),
        ("score.weight", (3, 4), "F32", "plain"),
        ("classifier.out_proj.weight", (3, 4), "F32", "plain"),
        ("output.weight", (40, 4), "F32", "plain"),
        ("layer.0.attention.output.dense.weight", (4, 4), "F32", "matrix"),
    ],
)
def test_kinds_by_name(name: str, shape: tuple[int, ...], dtype: str, kind: str) -> None:
    assert kind_of(name, shape, dtype) == kind


def test_globs_and_carried_float64(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(2, 2),
        "b.weight": torch.zeros(2, 2),
        "c.weight": torch.zeros(2, 2, dtype=torch.float64),
    }
    with stored(tmp_path, {}, **tensors) as checkpoint:
        base = describe(checkpoint, plain=["b.*"], exclude=["c*"])
        assert [spec.kind for spec in base.specs] == ["matrix", "plain", "carried"]
        with pytest.raises(Refuse, match=r"c\.weight is F64"):
            describe(checkpoint)
        with pytest.raises(Misconfigured, match=r"'d\.\*'"):
            describe(checkpoint, plain=["d.*"], exclude=["c*"])


def test_only_word_tables_have_vocabulary_rows() -> None:
    yes = (
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "lm_head.weight",
        "lm_head.bias",
        "bert.embeddings.word_embeddings.weight",
        "shared.weight",
    )
    no = (
        "transformer.wpe.weight",
        "classifier.weight",
        "score.weight",
        "embeddings.token_type_embeddings.weight",
        "model.layers.0.mlp.up_proj.weight",
    )
    assert [is_vocabulary(name) for name in (*yes, *no)] == [True] * len(yes) + [False] * len(no)


TABLE = torch.arange(8.0).reshape(4, 2)


def test_an_alias_in_the_base_is_dropped_where_it_is_equal(tmp_path: Path) -> None:
    config = {"model_type": "llama", "tie_word_embeddings": True}
    with stored(tmp_path, config, model__embed_tokens__weight=TABLE, lm_head__weight=TABLE.clone()) as checkpoint:
        base = describe(checkpoint)
    assert [spec.name for spec in base.specs] == ["model.embed_tokens.weight"]
    assert base.aliases["lm_head.weight"] == "model.embed_tokens.weight"


def test_what_differs_is_two_tables_whatever_the_config_says(tmp_path: Path) -> None:
    """The file is right, as where transformers loads it; names of other places of that head are none of the other
    table."""
    config = {"model_type": "llama", "tie_word_embeddings": True}
    with stored(tmp_path, config, model__embed_tokens__weight=TABLE, lm_head__weight=TABLE + 1) as checkpoint:
        base = describe(checkpoint)
        assert [spec.name for spec in base.specs] == ["lm_head.weight", "model.embed_tokens.weight"]
        assert base.aliases == {}
        assert tables_apart(base.checkpoint, base.aliases)


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5", "longt5"])
def test_a_family_that_ties_a_head_that_is_not_there_whatever_the_config_says(tmp_path: Path, family: str) -> None:
    config = {"model_type": family, "tie_word_embeddings": False}
    (tmp_path / "one").mkdir()
    with stored(tmp_path / "one", config, shared__weight=TABLE) as checkpoint:
        assert describe(checkpoint).aliases["lm_head.weight"] == "shared.weight"
    with stored(tmp_path, config, shared__weight=TABLE, lm_head__weight=TABLE.clone()) as checkpoint:
        base = describe(checkpoint)
        assert [spec.name for spec in base.specs] == ["lm_head.weight", "shared.weight"]
        assert base.aliases["decoder.embed_tokens.weight"] == "shared.weight"
        assert not tables_apart(base.checkpoint, base.aliases)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "gpt2"},
        {"model_type": "llama"},
        {"tie_word_embeddings": False},
        {"text_config": {"tie_word_embeddings": False}},
    ],
)
def test_without_a_word_of_the_config_what_differs_is_two_tensors(tmp_path: Path, config: dict[str, Any]) -> None:
    with stored(tmp_path, config, transformer__wte__weight=TABLE, lm_head__weight=TABLE + 1) as checkpoint:
        base = describe(checkpoint)
    assert [spec.name for spec in base.specs] == ["lm_head.weight", "transformer.wte.weight"]
    assert "lm_head.weight" not in base.aliases


def test_a_nested_config_ties(tmp_path: Path) -> None:
    with stored(
        tmp_path, {"text_config": {"tie_word_embeddings": True}}, language_model__model__embed_tokens__weight=TABLE
    ) as checkpoint:
        assert (
            describe(checkpoint).aliases["language_model.lm_head.weight"] == "language_model.model.embed_tokens.weight"
        )
