"""What tests of adapters share: a base opened, an adapter written by hand, and the task vectors of an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from continual.errors import Refuse
from continual.gates.lineage import LineageGate, trace
from continual.records import Lineage
from continual.tensors import BaseModel, Checkpoint, TaskVectors, describe, open_model

Tensors = dict[str, torch.Tensor]


def based(path: Path) -> BaseModel:
    checkpoint = open_model(path)
    assert isinstance(checkpoint, Checkpoint)
    return describe(checkpoint)


def task_vectors(base: Path, adapter: Path, **policy: Any) -> tuple[Tensors, Lineage, str]:
    origin = based(base)
    with origin.checkpoint, open_model(adapter) as model:
        lineage = trace(origin, model, LineageGate(**policy))
        vectors = TaskVectors(origin, model, lineage)
        found = {name: vectors.vector(name) for name in lineage.folded}
        digest = vectors.digest({name: piece.digest for name, piece in found.items()})
        model.check_unchanged()
        return {name: piece.tau for name, piece in found.items()}, lineage, digest


def plain(path: Path, weights: Tensors | None = None, **config: Any) -> Path:
    """An adapter written by hand, by default one of the matrix `a.weight` (4 by 6)."""
    path.mkdir(exist_ok=True)
    default = {
        "base_model.model.a.lora_A.weight": torch.randn(2, 6),
        "base_model.model.a.lora_B.weight": torch.randn(4, 2),
    }
    save_file(default if weights is None else weights, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a"]} | config)
    )
    return path


def lora(
    directory: Path,
    base: Path,
    seed: int,
    *,
    rank: int = 4,
    modules: Sequence[str] = ("q_proj", "down_proj"),
    **config: Any,
) -> Path:
    """A LoRA adapter with random factors on these modules of a base."""
    random = torch.Generator().manual_seed(seed)
    weights: Tensors = {}
    with open_model(base) as model:
        assert isinstance(model, Checkpoint)
        for name, info in model.tensors.items():
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in modules:
                head = f"base_model.model.{module}"
                weights[f"{head}.lora_A.weight"] = torch.randn(rank, info.shape[1], generator=random) * 0.1
                weights[f"{head}.lora_B.weight"] = torch.randn(info.shape[0], rank, generator=random) * 0.1
    said = {"r": rank, "lora_alpha": rank, "target_modules": list(modules), "base_model_name_or_path": str(base)}
    return plain(directory, weights, **(said | config))


def refused(base: Path, adapter: Path) -> Refuse:
    """The refusal of an adapter by its headers: one line, not too long, that names it."""
    origin = based(base)
    with origin.checkpoint, pytest.raises(Refuse) as refusal, open_model(adapter) as model:
        trace(origin, model, LineageGate())
    assert adapter.name in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600
    return refusal.value
