"""Rows of a vocabulary by the texts of their tokens: which row of a fine-tune is which of the base's, and what stays
out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from continual.errors import Refuse
from continual.gates.lineage import LineageGate, trace
from continual.records import Lineage
from continual.tensors import BaseModel, Checkpoint, TaskVectors, describe, open_model
from tests.helpers import tokens
from tests.helpers.adapters import plain

Tensors = dict[str, torch.Tensor]
WORDS = [f"w{i}" for i in range(10)]
EMBED, HEAD, BIAS, UP = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "lm_head.bias",
    "model.layers.0.mlp.up_proj.weight",
)
WHOLE = "base_model.model.model.embed_tokens"
BASE: Tensors = {
    EMBED: torch.randn(12, 4),
    HEAD: torch.randn(12, 4),
    BIAS: torch.randn(12),
    UP: torch.randn(6, 4),
}
"""Ten tokens, and two rows that no token has."""


def save(path: Path, tensors: Tensors) -> Path:
    path.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Iterator[BaseModel]:
    with open_model(tokens.write(save(tmp_path / "base", BASE), WORDS)) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        yield describe(checkpoint)


def traced(base: BaseModel, path: Path, vocab: str = "by-token") -> tuple[Lineage, Tensors]:
    gate = LineageGate(vocab=vocab)  # type: ignore[arg-type]
    with open_model(path) as model:
        lineage = trace(base, model, gate)
        vectors = TaskVectors(base, model, lineage, run=7)
        found = {name: vectors.vector(name) for name in lineage.folded}
        again = TaskVectors(base, model, trace(base, model, gate, again=True))
        assert all(again.vector(name).digest == vector.digest for name, vector in found.items())
        return lineage, {name: vector.tau for name, vector in found.items()}


def refused(base: BaseModel, path: Path, *words: str, vocab: str = "refuse") -> None:
    with pytest.raises(Refuse) as refusal:
        traced(base, path, vocab)
    assert refusal.value.reason == "vocab"
    assert all(word in str(refusal.value) for word in ("ft", *words)), str(refusal.value)


def turned(order: list[int | None], **dtype: Any) -> Tensors:
    """A fine-tune each of whose rows is that of the base, moved a little, or a new one."""
    made: Tensors = {UP: BASE[UP] + 0.1}
    for name in (EMBED, HEAD, BIAS):
        rows = [BASE[name][row] + 0.1 if row is not None else torch.full(BASE[name].shape[1:], 9.0) for row in order]
        made[name] = torch.stack(rows).to(**dtype)
    return made


def check(taus: Tensors, changed: set[int], atol: float = 1e-6) -> None:
    for name in (EMBED, HEAD, BIAS):
        for row in range(12):
            expected = torch.full(BASE[name].shape[1:], 0.1 if row in changed else 0.0)
            torch.testing.assert_close(taus[name][row], expected, rtol=0, atol=atol if row in changed else 0.0)


@pytest.mark.parametrize("form", [tokens.write, tokens.older, tokens.lines])
def test_tokens_that_were_added_in_front_of_others(base: BaseModel, tmp_path: Path, form: Callable[..., Path]) -> None:
    """A fine-tune has a token of its own where the base has the last, and one more, and its table is padded."""
    order = [*range(9), None, 9, None, None, None, None, None]
    path = form(save(tmp_path / "ft", turned(order)), WORDS[:9], {"<new>": 9, "w9": 10, "<more>": 11})
    lineage, taus = traced(base, path)
    check(taus, set(range(10)))
    (rows,) = lineage.tokens
    assert (rows.runs, rows.left_out, rows.lacking) == (((0, 0, 9), (9, 10, 1)), ("<new>", "<more>"), ())
    assert rows.tables == tuple(sorted((EMBED, HEAD, BIAS)))
    assert lineage.rows == {}
    for vocab in ("refuse", "common-rows"):
        refused(base, path, "'w9' is in row 10, and in row 9 there", "vocab = by-token", vocab=vocab)


def test_another_order_of_the_same_size(base: BaseModel, tmp_path: Path) -> None:
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10, 11]
    path = tokens.write(save(tmp_path / "ft", turned(order)), WORDS[::-1])
    for vocab in ("refuse", "common-rows"):
        refused(base, path, "than the base's (10)", "'w0' is in row 9", vocab=vocab)
    lineage, taus = traced(base, path)
    check(taus, set(range(12)))  # the rows that no token has are in the same places
    assert (lineage.tokens[0].left_out, lineage.tokens[0].lacking) == ((), ())


def test_tokens_that_the_fine_tune_has_not(base: BaseModel, tmp_path: Path) -> None:
    path = tokens.write(save(tmp_path / "ft", turned([1, 2, 4, None])), ["w1", "w2", "w4", "other"])
    lineage, taus = traced(base, path)
    check(taus, {1, 2, 4})
    (rows,) = lineage.tokens
    assert (rows.left_out, rows.lacking) == (("other",), ("w0", "w3", "w5", "w6", "w7", "w8", "w9"))


def test_a_token_in_place_of_a_reserved_one(base: BaseModel, tmp_path: Path) -> None:
    """Its row is not that of the token that the base has there; without by-token nothing tells that from training."""
    path = tokens.write(save(tmp_path / "ft", turned(list(range(12)))), [*WORDS[:5], "<chat>", *WORDS[6:]])
    check(traced(base, path, "refuse")[1], set(range(12)))
    lineage, taus = traced(base, path)
    check(taus, set(range(12)) - {5})
    assert (lineage.tokens[0].left_out, lineage.tokens[0].lacking) == (("<chat>",), ("w5",))


@pytest.mark.parametrize("vocab", ["refuse", "common-rows", "by-token"])
def test_the_same_vocabulary_is_folded_as_ever(base: BaseModel, tmp_path: Path, vocab: str) -> None:
    path = tokens.write(save(tmp_path / "ft", turned(list(range(12)))), WORDS)
    (path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    lineage, taus = traced(base, path, vocab)
    assert (lineage.tokens, lineage.rows) == ((), {})
    check(taus, set(range(12)))
    tokens.older(path, WORDS)
    (path / "tokenizer.json").unlink()  # the same in another form
    assert traced(base, path, vocab)[0].tokens == ()


def test_padding_alone_is_rows_in_common(base: BaseModel, tmp_path: Path) -> None:
    path = tokens.write(save(tmp_path / "ft", turned([*range(12), None, None])), WORDS)
    refused(base, path, "vocab = common-rows")
    lineage, taus = traced(base, path)
    assert (lineage.rows, lineage.tokens) == (dict.fromkeys((EMBED, HEAD, BIAS), 12), ())
    check(taus, set(range(12)))
    path = tokens.write(path, [*WORDS, "<a>", "<b>", "<c>"])
    refused(base, path, "vocab = by-token")
    lineage, taus = traced(base, path)
    assert (lineage.rows, lineage.tokens[0].left_out) == ({}, ("<a>", "<b>", "<c>"))
    check(taus, set(range(10)))  # what is a token in one of the two alone is another row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_fine_tune_changes_nothing_where_it_has_no_row(
    base: BaseModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tokens.write(save(tmp_path / "ft", turned([1, 0, None], dtype=dtype)), ["w1", "w0", "other"])
    _, taus = traced(base, path)
    check(taus, {0, 1}, atol=0.03)


def test_without_tokenizers_nothing_is_known(base: BaseModel, tmp_path: Path) -> None:
    path = save(tmp_path / "ft", turned(list(range(12))))
    assert traced(base, path)[0].tokens == ()
    (path / "tokenizer.json").write_text("<html>")
    assert traced(base, path)[0].tokens == ()
    assert traced(base, path, "refuse")[0].tokens == ()
    path = save(tmp_path / "ft2", turned(list(range(9))))
    refused(base, path, "needs the tokenizers of both", vocab="by-token")
    tokens.write(path, ["another", "tokenizer"])
    refused(base, path, "no token in common", vocab="by-token")


def test_a_table_that_is_not_of_this_tokenizer(tmp_path: Path) -> None:
    """A table of sounds may be called as one of words; it has fewer rows than there are words."""
    sounds = {EMBED: torch.randn(4, 4), UP: BASE[UP]}
    with open_model(tokens.write(save(tmp_path / "sounds", sounds), WORDS)) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        other = describe(checkpoint)
        path = tokens.write(save(tmp_path / "ft", {EMBED: sounds[EMBED] + 1, UP: BASE[UP]}), WORDS[::-1])
        for vocab in ("refuse", "by-token"):
            torch.testing.assert_close(traced(other, path, vocab)[1][EMBED], torch.ones(4, 4))


def test_a_sentencepiece_model_that_both_have(tmp_path: Path) -> None:
    """It is not read, but it is the same: the rows that it does not name stay, those of added tokens are matched."""
    with open_model(save(tmp_path / "base", BASE)) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        other = describe(checkpoint)
        path = save(tmp_path / "ft", turned([*range(10), None, 11]))
        for where in (tmp_path / "base", path):
            (where / "tokenizer.model").write_bytes(b"pieces")
        (tmp_path / "base" / "added_tokens.json").write_text('{"<a>": 10}')
        (path / "added_tokens.json").write_text('{"<b>": 10}')
        lineage, taus = traced(other, path)
        check(taus, {*range(10), 11})
        assert (lineage.tokens[0].left_out, lineage.tokens[0].lacking) == (("<b>",), ("<a>",))
        (path / "tokenizer.model").write_bytes(b"others")
        assert traced(other, path)[0].tokens == ()


def reversed_factors(order: list[int]) -> tuple[Tensors, torch.Tensor]:
    """Factors on the embedding in another order of rows, and what they add in the base's."""
    a, b = torch.randn(2, 12), torch.randn(4, 2)
    product = 2 * (b @ a).T
    return {f"{WHOLE}.lora_embedding_A": a, f"{WHOLE}.lora_embedding_B": b}, product[order]


def test_an_adapter_of_another_order(base: BaseModel, tmp_path: Path) -> None:
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10, 11]
    weights, product = reversed_factors(order)
    path = tokens.write(plain(tmp_path / "ft", weights), WORDS[::-1])
    refused(base, path, "than the base's (10)")
    _, taus = traced(base, path)
    torch.testing.assert_close(taus[EMBED], product, rtol=1e-5, atol=1e-6)


def test_an_adapter_with_the_whole_table_beside_its_factors(base: BaseModel, tmp_path: Path) -> None:
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10, 11]
    weights, product = reversed_factors(order)
    table = BASE[EMBED][order] + 0.5
    path = tokens.write(plain(tmp_path / "ft", weights | {f"{WHOLE}.base_layer.weight": table}), WORDS[::-1])
    _, taus = traced(base, path)
    torch.testing.assert_close(taus[EMBED], product + 0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beside", [False, True])
def test_trained_tokens_of_another_order(base: BaseModel, tmp_path: Path, beside: bool) -> None:
    """Rows 0 and 3 of the adapter are w9 and w6; row 12 is a token of its own."""
    delta = torch.randn(3, 4)
    weights = {
        f"{WHOLE}.token_adapter.trainable_tokens_delta": delta,
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.randn(2, 4),
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.randn(6, 2),
    }
    if beside:
        table = torch.cat([BASE[EMBED][:10].flip(0), BASE[EMBED][10:], torch.zeros(1, 4)])
        weights[f"{WHOLE}.base_layer.weight"] = table + 0.5
    config = {"peft_type": "LORA", "trainable_token_indices": {"embed_tokens": [0, 3, 12]}}
    path = tokens.write(plain(tmp_path / "ft", weights, **config), WORDS[::-1], {"<new>": 12})
    lineage, taus = traced(base, path)
    expected = torch.full((12, 4), 0.5 if beside else 0.0)
    expected[9], expected[6] = delta[0] - BASE[EMBED][9], delta[1] - BASE[EMBED][6]
    torch.testing.assert_close(taus[EMBED], expected, rtol=1e-5, atol=1e-6)
    assert lineage.tokens[0].left_out == ("<new>",)


def test_dora_by_all_rows_needs_all_of_them(base: BaseModel, tmp_path: Path) -> None:
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10, 11]
    weights, product = reversed_factors(order)
    weights[f"{WHOLE}.lora_magnitude_vector"] = torch.rand(4) + 1
    path = tokens.write(plain(tmp_path / "ft", weights, use_dora=True), WORDS[::-1])
    _, taus = traced(base, path)
    whole = BASE[EMBED] + product
    expected = whole * weights[f"{WHOLE}.lora_magnitude_vector"] / whole.norm(dim=0) - BASE[EMBED]
    torch.testing.assert_close(taus[EMBED], expected, rtol=1e-4, atol=1e-5)
    tokens.write(path, [*WORDS[:0:-1], "<new>"])
    refused(base, path, "the base lacks 1", vocab="by-token")


def test_what_was_let_in_before_is_read_as_it_was(base: BaseModel, tmp_path: Path) -> None:
    """Its tokenizer may have come, or have been looked at, only since."""
    path = tokens.write(save(tmp_path / "ft", turned([9, 8, 7, 6, 5, 4, 3, 2, 1, 0])), WORDS[::-1])
    refused(base, path, "than the base's (10)")
    with open_model(path) as model:
        lineage = trace(base, model, LineageGate(), again=True)
    assert (lineage.rows, lineage.tokens) == (dict.fromkeys((EMBED, HEAD, BIAS), 10), ())
