"""`opcm` over adapters: the rank that a tensor of the merge can have at most is known, and no Gram is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from continual import api, making
from continual.config import Settings
from continual.state import Transaction
from tests.helpers import models


def opened(state: Path, base: Path) -> api.Merge:
    making.init(base, state, making.Recipe(rule="opcm"))
    given = Settings(
        state=state,
        keep=20,
        missing="unchanged",
        max_base_ratio=1e9,
        max_mean_ratio=1e9,
        gates={"noise": {"act": "off"}},
    )
    return api.Merge(given, write=True)


def test_opcm_knows_the_rank_of_what_adapters_made(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no Gram is taken, and the merge is that of the usual way. A fine-tune of all tensors ends it, and is folded
    to the bit as ever."""
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
    base = models.base(memory / "wide", shapes=dict.fromkeys(names, (72, 80)))
    adapters = [thin(memory / f"adapter-{n}", names[:1] if n == 2 else names, n) for n in range(3)]
    tuned = models.fine_tune(base, memory / "tuned", 1)

    def ranks(merge: api.Merge) -> dict[str, int]:
        generation = merge.state.generation_of(merge.state.ledger.head)
        assert generation is not None
        return dict(generation.receipts.ranks or {})

    with opened(memory / "a", base) as merge, opened(memory / "b", base) as other:
        with monkeypatch.context() as no_gram:
            no_gram.setattr("continual.linalg.right_singular", None)
            assert [merge.fold(model).fate for model in adapters] == ["folded"] * 3
        assert ranks(merge) == dict(zip(names, (6, 4), strict=True))
        with monkeypatch.context() as unknown:
            unknown.setattr("continual.tensors.TaskVectors.rank", lambda *_: None)
            assert [other.fold(model).fate for model in adapters] == ["folded"] * 3
        assert ranks(other) == {}
        for name in names:
            one, same = merge.read(name), other.read(name)
            assert float((one - same).norm() / same.norm()) < 1e-6
        merge.unfold(merge.look_unfold("adapter-1"))
        assert ranks(merge) == dict(zip(names, (4, 2), strict=True))
        merge.state.rollback(3)
        assert ranks(merge) == dict(zip(names, (6, 4), strict=True))
        copy = memory / "copy"
        shutil.copytree(memory / "a", copy)
        merge.fold(tuned)
        assert ranks(merge) == {}
    with api.Merge(Settings(state=copy, max_mean_ratio=1e9, gates={"noise": {"act": "off"}}), write=True) as again:
        monkeypatch.setattr(Transaction, "rank", lambda *_: None)
        again.fold(tuned)
        with api.Merge(Settings(state=memory / "a")) as merge:
            assert all(torch.equal(merge.read(name), again.read(name)) for name in names)


def thin(place: Path, names: list[str], seed: int) -> Path:
    """A LoRA adapter of rank 2 on matrices of 72 x 80."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name in names:
        head = f"base_model.model.{name.removesuffix('.weight')}"
        weights[f"{head}.lora_A.weight"] = torch.randn(2, 80, generator=random) * 0.1
        weights[f"{head}.lora_B.weight"] = torch.randn(72, 2, generator=random) * 0.1
    place.mkdir()
    save_file(weights, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place
