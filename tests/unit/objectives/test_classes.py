"""The confidence that is fitted to logits, against a dense search."""

from __future__ import annotations

import pytest
import torch

from continual.objectives import fitted
from continual.objectives.classes import shares_of_right
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


def test_shares_scatter_as_the_mean_with_its_fit_does() -> None:
    """Beside leaving out each row in turn and fitting again (the jackknife)."""
    torch.manual_seed(2)
    logits = 3 * torch.randn(120, 4, dtype=torch.float64)
    labels = torch.where(torch.rand(120) < 0.7, logits.argmax(1), torch.randint(4, (120,)))

    def right(rows: list[int]) -> float:
        confidence = fitted(logits[rows], labels[rows])
        found = torch.softmax(confidence * logits[rows], -1).gather(1, labels[rows][:, None])
        return float(found.mean())

    shares = shares_of_right(logits, labels)
    assert float(shares.mean()) == pytest.approx(right(list(range(120))), rel=1e-12)
    without = torch.tensor([right([i for i in range(120) if i != left]) for left in range(120)], dtype=torch.float64)
    jackknife = (119 * (without - without.mean()).square().mean()).sqrt()
    assert float(shares.std() / 120**0.5) == pytest.approx(float(jackknife), rel=0.05)
    plain = torch.softmax(fitted(logits, labels) * logits, -1).gather(1, labels[:, None])
    assert float(plain.std() / 120**0.5) != pytest.approx(float(jackknife), rel=0.05)


def test_where_no_confidence_is_fitted_shares_are_probabilities() -> None:
    logits = torch.tensor([[2.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    assert shares_of_right(logits, torch.tensor([0, 0])).tolist() == pytest.approx(
        torch.softmax(10 * logits, -1)[:, 0].tolist()
    )
    assert shares_of_right(0 * logits, torch.tensor([0, 1])).tolist() == [0.5, 0.5]
