"""States that keep adapters as they are, made and read for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from continual import api, making
from continual.config import Settings
from continual.engine.views import ReadView

Tensors = dict[str, torch.Tensor]


def opened(
    state: Path, base: Path, *, width: int | None = 64, name: str = "task-arithmetic", write: bool = True
) -> api.Merge:
    if not state.exists():
        making.init(base, state, making.Recipe(rule=name, width=width))
    return api.Merge(Settings(state=state, max_base_ratio=100.0, max_mean_ratio=1e6), write=write)


def folded(
    state: Path, base: Path, fine_tunes: list[Path], *, width: int | None = 64, name: str = "task-arithmetic"
) -> Path:
    with opened(state, base, width=width, name=name) as merge:
        for model in fine_tunes:
            outcome = merge.fold(model)
            assert outcome.fate == "folded", outcome.message
    return state


def merged(state: Path, view: ReadView | None = None) -> Tensors:
    with api.Merge(Settings(state=state)) as merge:
        reading = merge.reading(view=view)
        reading.settle(merge.executor, lambda *_: None)
        return {spec.name: reading.vector(spec) for spec in merge.state.format.tensors}


def same(found: Tensors, expected: Tensors, *, rtol: float = 1e-5) -> None:
    scale = max(float(value.norm()) for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= rtol * scale, name
