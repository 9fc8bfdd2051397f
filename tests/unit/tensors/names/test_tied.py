"""Which names are one tensor, in the families of transformers; all of them: python -m tests.campaigns.ties."""

from __future__ import annotations

import importlib

import pytest

from continual.tensors.names.tied import ties
from tests.campaigns.ties import differing, ties_of

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")

FAMILIES = [
    *("llama", "gemma3", "gpt2", "gpt_neox", "t5", "bart", "whisper", "bert", "roberta", "modernbert", "electra"),
    *("albert", "biogpt", "ctrl", "rwkv", "git", "prophetnet", "speecht5", "xlnet", "kosmos2", "qwen2_vl", "llava"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_ties_is_known(family: str) -> None:
    found = list(ties_of(importlib.import_module(f"transformers.models.{family}.modeling_{family}")))
    assert found
    assert [line for tie in found if (line := differing(tie))] == []


def test_another_word_of_the_config_unties_a_head_and_no_shared_table() -> None:
    names = ["shared.weight", "lm_head.weight"]
    tied = ties(names, {"model_type": "t5"})
    assert (tied["lm_head.weight"], tied["encoder.embed_tokens.weight"]) == ("shared.weight", "shared.weight")
    untied = ties(names, {"model_type": "t5", "tie_word_embeddings": False})
    assert "lm_head.weight" not in untied
    assert untied["decoder.embed_tokens.weight"] == "shared.weight"


def test_a_name_is_not_another_familys() -> None:
    assert "output_projection.weight" not in ties(["model.embed_tokens.weight"], {"model_type": "gemma"})
    assert "output.weight" not in ties(["bert.embeddings.word_embeddings.weight"], {"model_type": "bert"})
