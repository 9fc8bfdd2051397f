"""What tests of adapters share: a base opened, and the task vectors of an adapter of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
