"""The pairs of matrices of a candidate that moved far from the base's, read once more and compared by their products:
only where the lengths of their task vectors, which the fold has measured, give reason to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from continual.engine.outcomes import OpenCandidate
from continual.lazily import torch
from continual.tensors import Adapter, BaseModel, TaskVectors
from continual.tensors.checkpoints.checkpoint import TORCH
from continual.tensors.names.pairings import Pairing, pairings
from continual.tensors.vectors.products import FAR, HeadFigures, figures
from continual.tensors.vectors.vectors import RUN

_LAYERS = 8
"""Pairs of each kind that are read, those that moved farthest."""


def paired(
    base: BaseModel, opened: OpenCandidate, ours: Mapping[str, float], theirs: Mapping[str, float]
) -> tuple[HeadFigures, ...]:
    """Of the pairs that moved far. `ours`: ‖θ₀‖² of each tensor; `theirs`: ‖τ‖² of each that the candidate changes.
    Raises Retry where a file changed meanwhile."""
    if isinstance(opened.model, Adapter):
        return ()
    far: dict[str, list[tuple[float, Pairing]]] = {}
    for pair in pairings(base.specs, base.checkpoint.config):
        moved = min((theirs.get(n, 0.0) / ours[n] if ours.get(n) else 0.0) for n in pair.names)
        if math.sqrt(moved) > FAR:
            far.setdefault(pair.kind, []).append((moved, pair))
    chosen = [
        pair for found in far.values() for _, pair in sorted(found, key=lambda one: (-one[0], one[1].where))[:_LAYERS]
    ]
    if not chosen:
        return ()
    found = tuple(figures(pair, partial(_rows, base, opened)) for pair in chosen)
    opened.model.check_unchanged()
    base.checkpoint.check_unchanged()
    return found


def _rows(
    base: BaseModel, opened: OpenCandidate, name: str, step: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The base's tensor `name` and its task vector, in parts of about `RUN` elements, each a multiple of `step` rows of
    all columns."""
    info = base.checkpoint.tensors[name]
    columns = info.shape[1]
    run = columns * step * max(1, RUN // (columns * step))
    vectors = TaskVectors(base, opened.model, opened.lineage, run=run)
    vectors.begin([name])
    dtype = TORCH[info.dtype]
    raw = torch.empty(run, dtype=dtype)
    for start, stop, tau in vectors.runs(name, None):
        part = raw[: stop - start]
        base.checkpoint.read_part(info, start * dtype.itemsize, part.view(torch.uint8).numpy().data)
        yield part.float().numpy().reshape(-1, columns), tau.numpy().reshape(-1, columns)
