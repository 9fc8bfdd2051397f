"""Tokenizer files for small models, in the forms in which they are published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def write(model: Path, words: Sequence[str], added: Mapping[str, int] | None = None) -> Path:
    """A `tokenizer.json` whose model has `words` in this order, and the tokens that were `added` with their rows."""
    body = {
        "version": "1.0",
        "added_tokens": [{"id": row, "content": text, "special": True} for text, row in (added or {}).items()],
        "model": {
            "type": "BPE",
            "vocab": {word: row for row, word in enumerate(words)},
            "merges": [["a", "]"], ['"', "\\"]],
        },
    }
    (model / "tokenizer.json").write_text(json.dumps(body))
    return model


def unigram(model: Path, words: Sequence[str]) -> Path:
    """The same of a Unigram model, which lists its pieces with their scores."""
    body = {"model": {"type": "Unigram", "vocab": [[word, -1.0] for word in words]}, "added_tokens": []}
    (model / "tokenizer.json").write_text(json.dumps(body))
    return model


def older(model: Path, words: Sequence[str], added: Mapping[str, int] | None = None) -> Path:
    """A `vocab.json`, and an `added_tokens.json` where there are any."""
    (model / "vocab.json").write_text(json.dumps({word: row for row, word in enumerate(words)}))
    if added:
        (model / "added_tokens.json").write_text(json.dumps(added))
    return model


def lines(model: Path, words: Sequence[str], added: Mapping[str, int] | None = None) -> Path:
    """A `vocab.txt`, and the added tokens in `tokenizer_config.json`."""
    (model / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    decoder = {str(row): {"content": text} for text, row in (added or {}).items()}
    (model / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    return model
