"""A state that keeps a tied head as a table of its own: what changes one of the two changes one, and the export has
both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import continual
from continual.errors import Misconfigured
from tests.helpers import models

CONFIG = models.CONFIG | {"tie_word_embeddings": True}
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES = {name: shape for name, shape in models.SHAPES.items() if name != HEAD}
UNTIED = continual.Recipe(rule="mean", scale="1", untie=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    random = torch.Generator().manual_seed(0)
    return models.write(tmp_path / "base", {n: torch.randn(s, generator=random) for n, s in SHAPES.items()}, CONFIG)


def adapter(path: Path, module: str, **config: object) -> Path:
    path.mkdir()
    kind = ("lora_A.weight", "lora_B.weight") if module == "lm_head" else ("lora_embedding_A", "lora_embedding_B")
    a, b = (torch.randn(2, 16), torch.randn(40, 2)) if module == "lm_head" else (torch.randn(2, 40), torch.randn(16, 2))
    name = f"base_model.model.{module}"
    save_file({f"{name}.{kind[0]}": 0.1 * a, f"{name}.{kind[1]}": 0.1 * b}, path / "adapter_model.safetensors")
    body = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    (path / "adapter_config.json").write_text(json.dumps(body))
    return path


@pytest.mark.parametrize(
    ("module", "config", "changed"),
    [
        ("lm_head", {}, {HEAD}),
        ("model.embed_tokens", {}, {TABLE}),
        ("model.embed_tokens", {"ensure_weight_tying": True}, {TABLE, HEAD}),
    ],
)
def test_an_adapter_changes_what_it_changes_in_use(
    base: Path, tmp_path: Path, module: str, config: dict[str, object], changed: set[str]
) -> None:
    continual.init(base, tmp_path / "state", UNTIED)
    with continual.open(tmp_path / "state", write=True) as merge:
        outcome = merge.fold(adapter(tmp_path / "a", module, **config))
        assert outcome.fate == "folded", outcome.message
        merge.export(tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    before[HEAD] = before[TABLE]
    assert {name for name in after if not torch.equal(after[name], before[name])} == changed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_full_fine_tunes_with_one_table_and_with_two(base: Path, tmp_path: Path) -> None:
    continual.init(base, tmp_path / "state", UNTIED)
    one = models.fine_tune(base, tmp_path / "one", 1)
    tensors = load_file(one / "model.safetensors")
    with continual.open(tmp_path / "state", write=True, max_mean_ratio=100) as merge:
        assert merge.fold(one).fate == "folded"
        merge.export(tmp_path / "first")
        told = CONFIG | {"tie_word_embeddings": False}
        two = models.write(tmp_path / "two", tensors | {HEAD: tensors[TABLE] + 0.1}, told)
        assert merge.fold(two).fate == "folded"
        merge.export(tmp_path / "second")
    first = load_file(tmp_path / "first" / "model.safetensors")
    assert torch.allclose(first[HEAD], tensors[TABLE], atol=1e-6)
    assert torch.equal(first[HEAD], first[TABLE])
    second = load_file(tmp_path / "second" / "model.safetensors")
    assert torch.allclose(second[HEAD] - second[TABLE], torch.full((40, 16), 0.05), atol=1e-6)


def test_a_base_that_ties_nothing_cannot_be_untied(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="no output head"):
        continual.init(models.base(tmp_path / "base"), tmp_path / "state", UNTIED)
