"""The confidence that is fitted to logits, against a dense search."""

from __future__ import annotations

import pytest
import torch

from continual.objectives import fitted
from tests.helpers.calibrated import (
    searched,
)


def test_the_best_confidence_of_given_logits_and_its_bounds() -> None:
    torch.manual_seed(1)
    for scale in (1e-2, 1.0, 40.0):
        logits = torch.randn(60, 5, dtype=torch.float64) * scale
        labels = torch.where(torch.rand(60) < 0.6, logits.argmax(1), torch.randint(5, (60,)))
        assert fitted(logits, labels) == pytest.approx(searched(logits, labels), rel=1e-5)
        assert fitted(logits + 1e6, labels) == pytest.approx(searched(logits, labels), rel=1e-4)
        assert fitted(logits, logits.argmin(1)) == pytest.approx(0.1)
        assert fitted(logits, logits.argmax(1)) == pytest.approx(10)
    assert fitted(torch.ones(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])) == 1.0
    assert fitted(torch.tensor([[1.0, float("nan")]]), torch.tensor([0])) == 1.0
