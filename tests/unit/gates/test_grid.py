"""Models that were quantised and written as floats again, by what was seen of them and as models that are folded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import continual
from continual.errors import Refuse
from continual.gates.contract import Numbers
from continual.gates.grid import GridGate
from continual.records import Totals
from tests.helpers import models
from tests.unit.gates.cases import Case

Weights = dict[str, torch.Tensor]


def numbers(*grids: str) -> Numbers:
    return Numbers("alice", 1.0, 10.0, Totals(), grids=grids)


REFUSED = {"requantised": lambda _place: Case(GridGate(), numbers("NF4", "", "", "NF4", "", "", "", ""))}


@pytest.mark.parametrize("grids", [(), ("",) * 8, ("NF4", *("",) * 7)])
def test_let_in(grids: Sequence[str]) -> None:
    GridGate().judge(numbers(*grids))


def test_the_setting_says_where_the_line_is() -> None:
    with pytest.raises(Refuse, match=r"NF4 in 1 of 8 matrices"):
        GridGate(matrices=0.1).judge(numbers("NF4", *("",) * 7))
    GridGate(matrices=0.5).judge(numbers("NF4", "NF4", *("",) * 6))


def rounded(weights: Weights) -> None:
    """Matrices in int8, one scale a row, and saved in bfloat16."""
    for name, value in weights.items():
        if value.ndim == 2:
            step = value.float().abs().amax(1, keepdim=True) / 127
            value = torch.round(value.float() / step) * step
        weights[name] = value.bfloat16()


def halved(weights: Weights) -> None:
    """Saved in bfloat16."""
    for name, value in weights.items():
        weights[name] = value.bfloat16()


@pytest.mark.parametrize(("change", "reason"), [(rounded, "requantised"), (halved, None), (None, None)])
@pytest.mark.parametrize("size", [0.02, 0.4])
def test_models(tmp_path: Path, change: Callable[[Weights], None] | None, reason: str | None, size: float) -> None:
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (96, 64) for n in range(4)}
    base = models.base(tmp_path / "base", shapes=shapes)
    model = models.fine_tune(base, tmp_path / "alice", 1, size=size, change=change)
    continual.init(base, tmp_path / "state")
    with continual.open(tmp_path / "state", write=True, workers=1) as merge:
        outcome = merge.fold(model)
    assert outcome.reason == reason, outcome.message
    assert not reason or "int8" in outcome.message
