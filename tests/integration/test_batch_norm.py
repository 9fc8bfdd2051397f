"""Statistics of batch norms in a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import continual
from tests.helpers import models

TENSORS = {
    "conv.weight": torch.ones(4, 3, 3, 3),
    "bn.weight": torch.ones(4),
    "bn.running_mean": torch.zeros(4),
    "bn.running_var": torch.full((4,), 1.0),
}


@pytest.mark.parametrize(("rule", "means", "variances"), [("mean", 0.2, 0.3), ("task-arithmetic", 0.4, 0.0)])
def test_a_variance_is_never_below_zero(tmp_path: Path, rule: str, means: float, variances: float) -> None:
    base = models.write(tmp_path / "base", TENSORS, {"model_type": "resnet"})
    continual.init(base, tmp_path / "state", continual.Recipe(rule=rule, scale="1"))
    with continual.open(tmp_path / "state", write=True, gates=["copies.act=off"]) as merge:
        for name, mean, variance in (("one", 0.1, 0.2), ("two", 0.3, 0.4)):
            changed = TENSORS | {
                "bn.running_mean": torch.full((4,), mean),
                "bn.running_var": torch.full((4,), variance),
            }
            outcome = merge.fold(models.write(tmp_path / name, changed, {"model_type": "resnet"}))
            assert outcome.fate == "folded", outcome.message
        merge.export(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.allclose(found["bn.running_mean"], torch.full((4,), means))
    assert torch.allclose(found["bn.running_var"], torch.full((4,), variances))
