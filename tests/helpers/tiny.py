"""Tiny transformers models with a tokenizer of twelve words, one for each objective. Tests that need them are skipped
where transformers is not installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "book", "a", "very", "the", "is", "was", "not"]
CPU = torch.device("cpu")

SMALL = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def gpt() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    )


def classifier() -> Any:
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, max_position_embeddings=32, **names)
    ).bfloat16()


def encoder() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=32))


MODELS: dict[str, Callable[[], Any]] = {"causal-lm": gpt, "classification": classifier, "heads": encoder}

AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "heads": "AutoModel",
}


def write_tokenizer(directory: Path) -> None:
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        directory
    )


def embedded(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """One text after the other, without padding."""
    each = [model(torch.tensor([tokenizer(t)["input_ids"]])).last_hidden_state[0].mean(0) for t in texts]
    return torch.nn.functional.normalize(torch.stack(each), dim=-1)


def loaded(name: str, directory: Path) -> Any:
    return getattr(transformers, AUTO[name]).from_pretrained(directory, local_files_only=True).float().eval()
