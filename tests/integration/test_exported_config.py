"""The configurations of an export say what its weights are: transformers loads it as it loads the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from continual import api, making
from continual.config import Settings
from continual.publish.folder import Target

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", SMALL),
    "Qwen2 (tied)": ("Qwen2ForCausalLM", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Gemma2": ("Gemma2ForCausalLM", SMALL | {"num_key_value_heads": 1, "head_dim": 8}),
    "Mixtral": ("MixtralForCausalLM", SMALL | {"num_key_value_heads": 2, "num_local_experts": 2}),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}),
    "T5": ("T5ForConditionalGeneration", T5),
    "T5 v1.1": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "MT5": ("MT5ForConditionalGeneration", T5),
    "Bart": (
        "BartForConditionalGeneration",
        {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
    ),
    "Bert": ("BertForMaskedLM", SMALL),
    "ViT": ("ViTForImageClassification", VISION | {"patch_size": 4, "num_labels": 3}),
    "CLIP": ("CLIPModel", {"text_config": SMALL, "vision_config": VISION | {"patch_size": 4}, "projection_dim": 8}),
}


def saved(kind: type[Any], config: Any, path: Path, seed: int) -> Any:
    """A model of random weights; its two tables differ where the class lets them, whatever the config says."""
    torch.manual_seed(seed)
    model = kind(config)
    if hasattr(model, "lm_head") and "T5" in kind.__name__:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k != "lm_head.weight"}
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_loaded_as_its_base(tmp_path: Path, family: str) -> None:
    name, settings = FAMILIES[family]
    kind = getattr(transformers, name)
    config = kind.config_class(**settings)
    saved(kind, config, tmp_path / "base", 0)
    tuned = saved(kind, config, tmp_path / "ft", 1)
    making.init(tmp_path / "base", tmp_path / "state", making.Recipe(rule="task-arithmetic", scale="1"))
    with api.Merge(Settings(state=tmp_path / "state", max_base_ratio=99.0), write=True) as merge:
        outcome = merge.fold(tmp_path / "ft")
        assert outcome.fate == "folded", outcome.message
        merge.export(Target(tmp_path / "out"))
        merge.export(Target(tmp_path / "half", dtype="BF16"))
    for file in tmp_path.glob("base/*.json"):
        body, out = (json.loads((path / file.name).read_text()) for path in (file.parent, tmp_path / "out"))
        assert body == out
    loaded, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (set(told["missing_keys"]), set(told["unexpected_keys"])) == (set(), set())
    for (part, ours), (_, theirs) in zip(loaded.named_parameters(), tuned.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=part)
    half = kind.from_pretrained(tmp_path / "half", dtype="auto")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    said = (tmp_path / "half" / "config.json").read_text()
    assert '"float32"' not in said


def test_a_config_that_ties_two_tables_that_differ_says_so_no_more(tmp_path: Path) -> None:
    """But in the T5 family, where that word decides whether the decoder's output is scaled."""
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)
    for seed, name in enumerate(("base", "ft")):
        saved(transformers.LlamaForCausalLM, config, tmp_path / name, seed)
        file = tmp_path / name / "config.json"
        file.write_text(file.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    making.init(tmp_path / "base", tmp_path / "state", making.Recipe(rule="task-arithmetic", scale="1"))
    with api.Merge(Settings(state=tmp_path / "state", max_base_ratio=99.0), write=True) as merge:
        assert merge.fold(tmp_path / "ft").fate == "folded"
        merge.export(Target(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
