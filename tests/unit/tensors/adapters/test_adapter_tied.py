"""Adapters about one of two tied tables, or about both: what they are taken for, and when they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual.errors import Refuse
from continual.tensors.bases.kept import kept_base, or_untied
from tests.helpers.adapters import plain, refused, task_vectors


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    (tmp_path / "tied").mkdir()
    save_file(
        {"model.embed_tokens.weight": torch.randn(4, 6), "model.l.weight": torch.randn(4, 6)},
        tmp_path / "tied" / "model.safetensors",
    )
    (tmp_path / "tied" / "config.json").write_text('{"tie_word_embeddings": true}')
    return tmp_path / "tied"


def test_a_tied_head_is_the_embedding(tied: Path, tmp_path: Path) -> None:
    head = {
        "base_model.model.lm_head.lora_A.weight": torch.randn(2, 6),
        "base_model.model.lm_head.lora_B.weight": torch.randn(4, 2),
    }
    table = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(2, 4),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(6, 2),
    }
    other = {
        "base_model.model.model.l.lora_A.weight": torch.randn(2, 6),
        "base_model.model.model.l.lora_B.weight": torch.randn(4, 2),
    }
    both = {"model.embed_tokens.weight", "model.l.weight"}
    assert task_vectors(tied, plain(tmp_path / "x", head | other), tied="both")[0].keys() == both
    assert task_vectors(tied, plain(tmp_path / "y", table | other), tied="both")[0].keys() == both
    assert task_vectors(tied, plain(tmp_path / "w", table | other, ensure_weight_tying=True))[0].keys() == both
    assert task_vectors(tied, plain(tmp_path / "v", table | other, task_type="SEQ_CLS"))[0].keys() == both
    assert refused(tied, plain(tmp_path / "z", head | table | other)).reason == "tied"
    for name, adapter in (("head", head), ("table", table)):
        refusal = refused(tied, plain(tmp_path / name, adapter | other))
        assert refusal.reason == "tied"
        for word in ("model.embed_tokens.weight", "lm_head", "tied = both", "--tied untie", "ensure_weight_tying"):
            assert word in str(refusal)
    a, b = table.values()
    turned = dict(zip(head, (b.T.contiguous(), a.T.contiguous()), strict=True))  # as PEFT stores tied factors
    found = task_vectors(tied, plain(tmp_path / "u", turned | table | other, ensure_weight_tying=True))[0]
    assert torch.allclose(found["model.embed_tokens.weight"], 2 * (b @ a).T)
    differ = plain(tmp_path / "t", head | table | other, ensure_weight_tying=True)
    with pytest.raises(Refuse, match="are about one table of the base, and differ"):
        task_vectors(tied, differ)


def test_a_state_of_adapters_keeps_tied_tables_as_one() -> None:
    """So what else to do is a state of the other form."""
    llama, t5 = (kept_base("b", {}, f'{{"model_type": "{family}"}}', (), {}) for family in ("llama", "t5"))
    assert or_untied(llama).endswith("'continual init --tied untie' and without --adapters")
    assert or_untied(t5) == ""


def test_trained_rows_of_a_tied_table(tied: Path, tmp_path: Path) -> None:
    rows = torch.randn(2, 6)
    end = "token_adapter.trainable_tokens_delta"
    both = {f"base_model.model.model.embed_tokens.{end}": rows, f"base_model.model.lm_head.{end}": rows.clone()}
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 3], "r": None, "lora_alpha": None}
    found = task_vectors(tied, plain(tmp_path / "same", both, **config))[0]["model.embed_tokens.weight"]
    table = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.allclose(found[[1, 3]], rows - table[[1, 3]])
    assert not found[[0, 2]].any()
    with pytest.raises(Refuse, match="are about one table of the base, and differ"):
        task_vectors(tied, plain(tmp_path / "differ", both | {next(iter(both)): rows + 1.0}, **config))


def test_a_whole_table_beside_the_factors(tied: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    whole = {
        name: torch.randn(4, 6),
        "base_model.model.model.l.lora_A.weight": torch.randn(2, 6),
        "base_model.model.model.l.lora_B.weight": torch.randn(4, 2),
    }
    assert "model.embed_tokens.weight" in task_vectors(tied, plain(tmp_path / "resized", whole))[0]
    refusal = refused(tied, plain(tmp_path / "trained", whole, modules_to_save=["embed_tokens"]))
    assert (refusal.reason, name in str(refusal)) == ("tied", True)
    both = whole | {"base_model.model.lm_head.weight": whole[name].clone()}
    saved = ["embed_tokens", "lm_head"]
    assert "model.embed_tokens.weight" in task_vectors(tied, plain(tmp_path / "b", both, modules_to_save=saved))[0]
    factors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(2, 4),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(6, 2),
    }
    for number, stored in enumerate((whole, both)):  # as PEFT stores the tables beside the factors of one of them
        refusal = refused(tied, plain(tmp_path / f"factors-{number}", stored | factors))
        assert (refusal.reason, "lora_embedding_A" in str(refusal)) == ("tied", True)
        assert task_vectors(tied, plain(tmp_path / f"tied-{number}", stored | factors), tied="both")


def test_a_resized_vocabulary_stored_beside_the_factors(tied: Path, tmp_path: Path) -> None:
    table = torch.randn(5, 6)
    factors = {
        "base_model.model.model.l.lora_A.weight": torch.randn(2, 6),
        "base_model.model.model.l.lora_B.weight": torch.randn(4, 2),
    }
    adapter = plain(tmp_path / "x", factors | {"base_model.model.model.embed_tokens.weight": table})
    assert refused(tied, adapter).reason == "vocab"
    taus, lineage, _ = task_vectors(tied, adapter, vocab="common-rows")
    assert lineage.rows == {"model.embed_tokens.weight": 4}
    assert torch.equal(
        taus["model.embed_tokens.weight"],
        table[:4] - load_file(tied / "model.safetensors")["model.embed_tokens.weight"],
    )
