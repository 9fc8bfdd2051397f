"""The base of a state: measured when the state is made, found again and compared when it is opened."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from continual.errors import Damaged, Misconfigured
from continual.executors.contract import Progress, silent
from continual.linalg import dot
from continual.state import State
from continual.tensors import Adapter, BaseModel, Checkpoint, describe, open_model
from continual.tensors.checkpoint import TORCH

_HASHED = 1 << 20
"""Bytes of the base read at a time at init."""


def open_base(state: State, moved: Path | None = None) -> BaseModel:
    """The base of `state`, from where it was at init or from `moved`.

    Where the files' sizes and times are those of init they are taken as they are, else every tensor is hashed and compared.
    Raises Misconfigured if it is not there, Damaged naming the first tensor that differs.
    """
    record = state.format.base
    path = moved or Path(record["path"])
    if not path.exists():
        raise Misconfigured(f"base {path} is gone: put it back, or say where it is now with base = DIR (--base)")
    model = describe(open_checkpoint(path), plain=record["plain"], exclude=record["exclude"])
    if model.specs != state.format.tensors:
        raise Damaged(f"base {path} is not the one this state was made from: its tensors have other names, shapes or dtypes")
    if files_of(model.checkpoint) != list(record["files"]):
        digests = measure_base(model, silent)["digests"]
        if differing := sorted(name for name, digest in record["digests"].items() if digests.get(name) != digest):
            raise Damaged(f"base {path} is not the one this state was made from: tensor {differing[0]} differs")
    return model


def measure_base(base: BaseModel, progress: Progress) -> dict[str, dict[str, Any]]:
    """`digests`: BLAKE3 of every tensor's bytes, by name; `squares`: ‖θ₀‖² of those that are folded."""
    digests: dict[str, str] = {}
    squares: dict[str, float] = {}
    folded = {spec.name for spec in base.specs if spec.kind != "carried"}
    names = sorted(base.checkpoint.tensors)
    buffer = torch.empty(_HASHED, dtype=torch.uint8)
    progress("hash", 0, len(names))
    for done, name in enumerate(names, 1):
        info, whole, parts = base.checkpoint.tensors[name], blake3(), []
        for start in range(0, info.nbytes, _HASHED):
            part = buffer[: min(_HASHED, info.nbytes - start)]
            base.checkpoint.read_part(info, start, part.numpy().data)
            whole.update(part.numpy().data)
            if name in folded:
                values = part.view(TORCH[info.dtype])
                parts.append(dot(values, values))
        digests[name] = whole.hexdigest()
        if name in folded:
            squares[name] = math.fsum(parts)
        progress("hash", done, len(names))
    return {"digests": digests, "squares": squares}


def open_checkpoint(path: Path) -> Checkpoint:
    if not path.exists():
        raise Misconfigured(f"base {path}: no such directory")
    model = open_model(path)
    if isinstance(model, Adapter):
        model.close()
        raise Misconfigured(f"base {path} is an adapter: a state needs the full model it adapts")
    return model


def files_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [{"name": f.name, "size": f.size, "mtime_ns": f.mtime_ns} for f in checkpoint.files]
