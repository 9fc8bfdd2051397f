"""What is left over between a base and a fine-tune: buffers, heads, other layouts, parts of adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from continual.errors import Refuse
from continual.gates.lineage import LineageGate, trace
from continual.records import Lineage
from continual.tensors import BaseModel, Checkpoint, describe, open_model
from continual.tensors.checkpoints.buffers import is_buffer
from tests.unit.gates import cases

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


def save(path: Path, tensors: Tensors, kind: str = "", family: str = "llama") -> Path:
    return cases.save(path, tensors, {"model_type": family} | ({"architectures": [kind]} if kind else {}))


def of_classes(tmp_path: Path, ours: tuple[str, Tensors], theirs: tuple[str, Tensors], **policy: Any) -> Lineage:
    """The lineage of a fine-tune of one class, whose base is of another."""
    family = str(policy.pop("family", "bert"))
    with open_model(save(tmp_path / "base", ours[1], ours[0], family)) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        with open_model(save(tmp_path / "ft", theirs[1], theirs[0], family)) as model:
            return trace(describe(checkpoint), model, LineageGate(**policy))


@pytest.fixture
def base(tmp_path: Path) -> Iterator[BaseModel]:
    with cases.described(save(tmp_path / "base", TENSORS)) as found:
        yield found


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
    assert is_buffer("model.encoder.embed_positions.weights", (8, 4))


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


LAYER = {
    "bert.encoder.layer.0.output.dense.weight": torch.randn(4, 4),
    "bert.embeddings.LayerNorm.bias": torch.zeros(4),
}
WORDS = {"cls.predictions.transform.dense.weight": torch.randn(4, 4), "cls.predictions.bias": torch.zeros(9)}
POOLER = {"bert.pooler.dense.weight": torch.randn(4, 4)}


def _classes(count: int, head: str = "classifier") -> Tensors:
    return {f"{head}.weight": torch.randn(count, 4), f"{head}.bias": torch.zeros(count)}


@pytest.mark.parametrize(
    ("ours", "theirs", "lacking"),
    [
        pytest.param(
            ("BertForPreTraining", LAYER | WORDS | POOLER),
            ("BertForSequenceClassification", LAYER | POOLER | _classes(2)),
            WORDS,
            id="a classifier has no head of words",
        ),
        pytest.param(
            ("BertModel", LAYER | POOLER),
            ("BertForTokenClassification", LAYER | _classes(2)),
            POOLER,
            id="a class without a pooler",
        ),
        pytest.param(
            ("BertForMaskedLM", LAYER | WORDS | POOLER), ("BertForMaskedLM", LAYER | WORDS), POOLER, id="files of more"
        ),
        pytest.param(
            ("ModernBertForMaskedLM", LAYER | {"decoder.bias": torch.zeros(9)}),
            ("ModernBertForTokenClassification", LAYER | _classes(2)),
            {"decoder.bias": torch.zeros(9)},
            id="a head that is called decoder",
        ),
        pytest.param(
            ("ViTModel", LAYER | {"bert.pooler.dense.bias": torch.zeros(768)}),
            ("ViTForMaskedImageModeling", LAYER | {"decoder.0.bias": torch.zeros(768)}),
            {"bert.pooler.dense.bias": torch.zeros(768)},
            id="another head of its shape",
        ),
        pytest.param(
            ("Wav2Vec2ForPreTraining", LAYER | {"quantizer.codevectors": torch.ones(1, 4, 2)}),
            ("Wav2Vec2ForCTC", LAYER | _classes(5, "lm_head")),
            {"quantizer.codevectors": torch.ones(1, 4, 2)},
            id="what only the training needs",
        ),
    ],
)
def test_a_head_that_its_class_does_not_have_is_no_loss(
    tmp_path: Path, ours: tuple[str, Tensors], theirs: tuple[str, Tensors], lacking: Tensors
) -> None:
    lineage = of_classes(tmp_path, ours, theirs)
    assert lineage.lacking == tuple(sorted(lacking))
    assert set(lineage.folded) == ours[1].keys() & theirs[1].keys()


def test_the_class_may_be_said_of_the_text_alone(tmp_path: Path) -> None:
    place = save(tmp_path / "ft", LAYER)
    (place / "config.json").write_text(json.dumps({"text_config": {"architectures": ["Qwen2VLModel"]}}))
    with open_model(save(tmp_path / "base", LAYER | WORDS, "Qwen2VLForConditionalGeneration")) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        with open_model(place) as model:
            assert trace(describe(checkpoint), model, LineageGate()).lacking == tuple(sorted(WORDS))


@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        pytest.param("BertForMaskedLM", "cls.predictions.bias", id="the head of its own class"),
        pytest.param("", "cls.predictions.bias", id="no class is named"),
        pytest.param("BertModel", "bert.encoder.layer.0.output.dense.weight", id="no head"),
    ],
)
def test_what_its_class_has_may_not_be_missing(tmp_path: Path, kind: str, gone: str) -> None:
    tensors = {name: t for name, t in (LAYER | WORDS).items() if name != gone}
    with pytest.raises(Refuse, match=rf"lacks {gone} of the base; .*missing = unchanged"):
        of_classes(tmp_path, ("BertForMaskedLM", LAYER | WORDS), (kind, tensors))


@pytest.mark.parametrize(
    ("ours", "theirs", "stay"),
    [
        pytest.param(_classes(3), _classes(2), ("classifier.bias", "classifier.weight"), id="plain"),
        pytest.param(
            {"classifier.1.weight": torch.zeros(3, 4)},
            {"classifier.1.weight": torch.zeros(5, 4)},
            ("classifier.1.weight",),
            id="in a sequence",
        ),
        pytest.param(
            _classes(4, "classifier.dense") | _classes(3, "classifier.out_proj"),
            _classes(4, "classifier.dense") | _classes(2, "classifier.out_proj"),
            tuple(f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("bias", "weight")),
            id="all of a head",
        ),
        pytest.param(
            _classes(3, "decode_head.classifier") | _classes(4, "decode_head.linear_fuse"),
            _classes(2, "decode_head.classifier") | _classes(4, "decode_head.linear_fuse"),
            ("decode_head.classifier.bias", "decode_head.classifier.weight"),
            id="the last of a head",
        ),
        pytest.param(
            _classes(3, "model.decoder.class_embed.0"),
            _classes(2, "model.decoder.class_embed.0"),
            ("model.decoder.class_embed.0.bias", "model.decoder.class_embed.0.weight"),
            id="of a detector",
        ),
        pytest.param(
            _classes(32, "lm_head"), _classes(40, "lm_head"), ("lm_head.bias", "lm_head.weight"), id="letters"
        ),
    ],
)
def test_a_head_for_other_classes_stays_out_and_is_listed(
    tmp_path: Path, ours: Tensors, theirs: Tensors, stay: tuple[str, ...]
) -> None:
    kind = "XForImageClassification"
    lineage = of_classes(tmp_path, (kind, LAYER | ours), (kind, LAYER | theirs))
    assert lineage.extra == stay
    assert set(lineage.unchanged) == set(stay)
    assert set(lineage.folded) == {*LAYER, *theirs} - set(stay)
    assert not lineage.lacking


def test_what_paints_in_pretraining_may_be_missing(tmp_path: Path) -> None:
    painter = {"decoder.decoder_layers.0.output.dense.weight": torch.ones(4, 4), "decoder.head.bias": torch.ones(4)}
    pretrained = ("VideoMAEForPreTraining", LAYER | painter)
    classifier = ("VideoMAEForVideoClassification", LAYER | _classes(2))
    assert of_classes(tmp_path, pretrained, classifier, family="videomae").lacking == tuple(sorted(painter))
    (tmp_path / "base").rename(tmp_path / "first")
    (tmp_path / "ft").rename(tmp_path / "second")
    with pytest.raises(Refuse, match="decoder_layers"):
        of_classes(tmp_path, pretrained, classifier, family="bart")


def test_heads_for_other_classes_can_be_refused(tmp_path: Path) -> None:
    with pytest.raises(Refuse, match=r"classifier\.bias, classifier\.weight"):
        of_classes(tmp_path, ("X", LAYER | _classes(3)), ("X", LAYER | _classes(2)), extra="refuse")


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.classifier.weight", "lm_head.weight"])
def test_other_tensors_of_another_size_are_no_heads(tmp_path: Path, name: str) -> None:
    words = {"bert.embeddings.word_embeddings.weight": torch.zeros(9, 4)}
    with pytest.raises(Refuse) as refusal:
        of_classes(
            tmp_path, ("X", LAYER | words | {name: torch.zeros(9, 4)}), ("X", LAYER | words | {name: torch.zeros(7, 4)})
        )
    assert refusal.value.reason in ("shape", "tied")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"num_hidden_layers": 1}, {"num_hidden_layers": 2}, id="deeper"),
        pytest.param({"n_layer": 2}, {"n_layer": 1}, id="a part"),
        pytest.param(
            {"text_config": {"num_hidden_layers": 1}}, {"text_config": {"num_hidden_layers": 3}}, id="its text model"
        ),
    ],
)
def test_more_or_fewer_layers_are_another_model(tmp_path: Path, one: dict[str, Any], other: dict[str, Any]) -> None:
    deep = LAYER | {"bert.encoder.layer.1.output.dense.weight": torch.randn(4, 4)}
    shallow, deeper = (one, other) if "n_layer" not in one else (other, one)
    for ours, theirs in (((LAYER, shallow), (deep, deeper)), ((deep, deeper), (LAYER, shallow))):
        place = tmp_path / str(len(ours[0]))
        place.mkdir()
        for name, (tensors, config) in (("base", ours), ("ft", theirs)):
            folder = save(place / name, tensors)
            (folder / "config.json").write_text(json.dumps(config))
        with open_model(place / "base") as checkpoint, open_model(place / "ft") as model:
            assert isinstance(checkpoint, Checkpoint)
            with pytest.raises(Refuse, match=r"has \d layers and the base \d, by config.json"):
                trace(describe(checkpoint), model, LineageGate(missing="unchanged"))


def test_layers_beyond_those_of_the_configuration_stay_out(tmp_path: Path) -> None:
    """As DeepSeek's, which predict a token further and are in some files only."""
    more = {"bert.encoder.layer.1.eh_proj.weight": torch.randn(4, 8)}
    assert of_classes(tmp_path, ("X", LAYER), ("X", LAYER | more)).extra == tuple(more)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("layers.0.attention.wq.weight", "Mistral's own code"),
        ("model.diffusion_model.input_blocks.0.0.weight", "from_single_file"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", "Megatron or NeMo"),
        ("blk.0.attn_q.weight", "llama.cpp"),
    ],
)
@pytest.mark.parametrize("missing", ["refuse", "unchanged"])
def test_a_known_layout_is_said(base: BaseModel, tmp_path: Path, name: str, said: str, missing: str) -> None:
    other = {name: torch.zeros(4, 4), "norm.weight": TENSORS["model.norm.weight"]}
    with pytest.raises(Refuse, match=said) as refusal:
        traced(base, tmp_path, other, missing=missing)
    assert (refusal.value.reason, name in str(refusal.value)) == ("missing", True)


def test_a_resized_table_of_positions_is_said(tmp_path: Path) -> None:
    name = "vit.embeddings.position_embeddings"
    with pytest.raises(Refuse, match=r"\[1, 9, 4\], the base's has \[1, 5, 4\]: its table of positions was resized"):
        of_classes(tmp_path, ("X", LAYER | {name: torch.zeros(1, 5, 4)}), ("X", LAYER | {name: torch.zeros(1, 9, 4)}))


def test_sines_that_a_class_does_not_save_are_no_loss(tmp_path: Path) -> None:
    sines = {"model.encoder.embed_positions.weight": torch.randn(8, 4)}
    lineage = of_classes(tmp_path, ("MarianMTModel", LAYER | sines), ("MarianMTModel", LAYER), family="marian")
    assert lineage.unchanged == tuple(sines)
    (tmp_path / "base").rename(tmp_path / "first")
    (tmp_path / "ft").rename(tmp_path / "second")
    with pytest.raises(Refuse, match="embed_positions"):
        of_classes(tmp_path, ("BartModel", LAYER | sines), ("BartModel", LAYER), family="bart")


@pytest.mark.parametrize("part", ["lora_A.weight", "base_layer.weight", "lora_B.default.weight"])
def test_an_adapter_that_was_not_merged_is_no_full_model(base: BaseModel, tmp_path: Path, part: str) -> None:
    with pytest.raises(Refuse) as refusal:
        traced(base, tmp_path, TENSORS | {f"{ATTENTION}q_proj.{part}": torch.zeros(2, 4)}, missing="unchanged")
    assert refusal.value.reason == "adapter-kind"
    assert f"q_proj.{part}" in str(refusal.value)


def test_only_buffers_in_common_is_nothing_in_common(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(Refuse, match="not a fine-tune of this base"):
        traced(base, tmp_path, {BUFFERS[1]: torch.zeros(2)}, missing="unchanged")
