"""Whose tokenizer and chat template an export has, and that its configurations say how a text ends there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from continual import api, making
from continual.config import Settings
from continual.errors import Misconfigured
from continual.publish.folder import Target
from tests.helpers import models, tokens

WORDS = [f"w{row}" for row in range(36)]


def put(directory: Path, files: dict[str, Any]) -> Path:
    for name, body in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(body if isinstance(body, str) else json.dumps(body))
    return directory


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A base of 40 rows and 36 tokens, without a chat template, and a fine-tune that chats with a token of its own."""
    base = tokens.write(models.base(tmp_path / "base"), WORDS)
    put(base, {"special_tokens_map.json": {"old": 1}, "generation_config.json": {"eos_token_id": 2}, "merges.txt": ""})
    put(base, {"preprocessor_config.json": {"size": 1}, "chat_templates/old.jinja": "old"})
    chat = tokens.write(models.fine_tune(base, tmp_path / "chat", 1), WORDS, {"<|im_end|>": 36})
    config = json.loads((base / "config.json").read_text()) | {"eos_token_id": 36, "pad_token_id": 900}
    put(chat, {"config.json": config, "generation_config.json": {"eos_token_id": [36, 2], "top_k": 5}})
    put(chat, {"tokenizer_config.json": {"eos_token": "<|im_end|>"}, "chat_template.jinja": "{{ messages }}"})
    put(chat, {"chat_templates/tools.jinja": "tools", "preprocessor_config.json": {"size": 2}})
    making.init(base, tmp_path / "state", making.Recipe(rule="mean"))
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:
        assert merge.fold(chat).fate == "folded"
    return tmp_path / "state"


def exported(state: Path, tokenizer: str, name: str = "out") -> Path:
    with api.Merge(Settings(state=state, tokenizer=tokenizer)) as merge:
        return merge.export(Target(state.parent / name))


def refused(state: Path, tokenizer: str, *words: str) -> None:
    with pytest.raises(Misconfigured) as error:
        exported(state, tokenizer, "never")
    assert all(word in str(error.value) for word in ("tokenizer", *words)), str(error.value)
    assert not (state.parent / "never").exists()


def read(path: Path) -> dict[str, Any]:
    body = json.loads(path.read_text())
    assert isinstance(body, dict)
    return body


def test_by_default_it_is_the_bases(state: Path) -> None:
    out = exported(state, "base")
    for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json", "chat_templates/old.jinja"):
        assert (out / name).read_bytes() == (state.parent / "base" / name).read_bytes()
    assert not (out / "chat_template.jinja").exists()
    assert "tokenizer" not in read(out / "continual.json")


@pytest.mark.parametrize("by_path", [False, True])
def test_it_is_that_of_a_model_that_was_folded(state: Path, by_path: bool) -> None:
    chat = state.parent / "chat"
    out = exported(state, str(chat) if by_path else "chat")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (chat / name).read_bytes()
    assert [path.name for path in (out / "chat_templates").iterdir()] == ["tools.jinja"]
    assert not (out / "special_tokens_map.json").exists()
    assert not (out / "merges.txt").exists()
    assert read(out / "preprocessor_config.json") == {"size": 1}
    config = read(out / "config.json")
    assert (config["eos_token_id"], config.get("pad_token_id")) == (36, None)  # 900 has no row
    assert config["num_hidden_layers"] == 2
    assert read(out / "continual.json")["tokenizer"] == {"origin": str(chat), "revision": None}


def test_an_adapters_tokenizer_says_how_a_text_ends(state: Path) -> None:
    adapter = tokens.write(_made(state.parent / "adapter"), WORDS, {"<|im_end|>": 36})
    put(adapter, {"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}})
    out = exported(state, str(adapter))
    assert read(out / "generation_config.json") == {"eos_token_id": 36}
    assert read(out / "config.json")["eos_token_id"] == 36


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_what_does_not_fit_is_refused(state: Path) -> None:
    refused(state, "nobody", "nobody", "no model in the merge")
    other = _made(state.parent / "other")
    refused(state, str(other), "has no tokenizer")
    tokens.write(other, WORDS, {f"<{row}>": row for row in range(36, 42)})
    refused(state, str(other), "<40>, <41>", "40 rows")
    tokens.write(other, WORDS[::-1])
    refused(state, str(other), "w0, w1", "other rows")
    (other / "tokenizer.json").write_text("<html>")
    refused(state, str(other), "cannot be read")


@pytest.mark.slow
def test_the_export_chats(tmp_path: Path) -> None:
    """With transformers: the export has the fine-tune's template, and generation ends where that says."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for name in ("base", "chat"):
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w1")
        model = transformers.LlamaForCausalLM(config)
        if name == "chat":
            fast.add_special_tokens({"eos_token": "<|im_end|>"})
            fast.chat_template = "{% for m in messages %}{{ m.content }} <|im_end|>{% endfor %}"
            model.generation_config.eos_token_id = fast.eos_token_id
        fast.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name)
    making.init(tmp_path / "base", tmp_path / "state", making.Recipe(rule="mean"))
    with api.Merge(Settings(state=tmp_path / "state", max_base_ratio=9.0), write=True) as merge:
        assert merge.fold(tmp_path / "chat").fate == "folded"
    out = exported(tmp_path / "state", "chat")
    found = transformers.AutoTokenizer.from_pretrained(out)
    text = found.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False)
    assert found(text)["input_ids"] == [3, 36]
    assert transformers.AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == 36
