"""A model in memory whose parameters are set to one way of reading after the other, scored on calibration rows. What is
good is the objective's to say."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from blake3 import blake3

from continual.engine.reading import Reading
from continual.errors import Misconfigured
from continual.executors.contract import Executor, Task
from continual.objectives.objectives import Ask, Objective
from continual.publish.folder import merged
from continual.records import TensorSpec
from continual.tensors import BaseModel

Places = dict[str, list[torch.Tensor]]
"""By the name of a base's tensor, the parameters and buffers of a model that hold it."""


def places(model: Any, base: BaseModel) -> Places:
    """Where each tensor of `base` is in the transformers model `model`: under its name, or its name with or without the
    prefix of the model's body.

    Raises Misconfigured for one that is nowhere, or has another shape there; carried ones may be left out.
    """
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    prefix = f"{getattr(model, 'base_model_prefix', 'model')}."
    names: dict[str, list[str]] = {spec.name: [spec.name] for spec in base.specs}
    for alias, name in base.aliases.items():
        names[name].append(alias)
    found: Places = {}
    for spec in base.specs:
        if spec.kind == "carried":
            continue
        tensors = [
            held[n] for name in names[spec.name] for n in (name, name.removeprefix(prefix), prefix + name) if n in held
        ]
        if not tensors:
            raise Misconfigured(
                f"tensor {spec.name} of the base is no parameter of {type(model).__name__}: take another objective, or evaluate with --command"
            )
        if wrong := next((t for t in tensors if tuple(t.shape) != spec.shape), None):
            raise Misconfigured(
                f"tensor {spec.name} of the base has the shape {list(spec.shape)}, and {list(wrong.shape)} in {type(model).__name__}: evaluate with --command"
            )
        found[spec.name] = list({t.data_ptr(): t for t in tensors}.values())
    return found


def fill(held: Places, base: BaseModel, reading: Reading, executor: Executor) -> None:
    """Sets the parameters to what an export of `reading` holds, tensor by tensor; what is not folded stays."""
    tasks = [
        Task(s.name, s.nbytes + 4 * s.numel + reading.need(s), partial(_set, held[s.name], base, reading, s))
        for s in base.specs
        if s.name in held
    ]
    for _ in executor.map(tasks):
        pass


def told(ask: Ask) -> dict[str, Any]:
    """What a record keeps of an objective: the files by name and digest."""
    files = {key: file for key, file in (("file", ask.file), ("heads", ask.heads)) if file is not None}
    named = {
        key: {"name": file.name, "digest": f"blake3:{blake3(file.read_bytes()).hexdigest()}"}
        for key, file in files.items()
    }
    return {"kind": "rows", "objective": ask.name, "batch": ask.batch, **named}


def score(objective: Objective, held: Places, base: BaseModel, reading: Reading, executor: Executor) -> float:
    """What the merge that `reading` reads is worth."""
    fill(held, base, reading, executor)
    return objective.score()


def _set(tensors: list[torch.Tensor], base: BaseModel, reading: Reading, spec: TensorSpec) -> None:
    value = merged(base, reading, spec, spec.dtype)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(value)
