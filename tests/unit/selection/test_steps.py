"""Steps where none lowers the loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from continual.selection.steps import STEPS, Step, solve
from tests.helpers.hulls import by


class Flat:
    """A loss that is the same everywhere, though its slopes promise more."""

    def __init__(self) -> None:
        self.asked = 0

    def loss(self, weights: Tensor) -> float:
        self.asked += 1
        return 1.0 + 0.0 * float(weights.sum())

    def gradient(self, weights: Tensor, of: Tensor | None = None) -> tuple[float, Tensor]:
        assert of is None or of.any()
        return 1.0, torch.full_like(weights, -1.0)


@pytest.mark.parametrize("step", STEPS)
def test_where_no_step_lowers_the_loss_the_steps_end_where_they_began(step: Step) -> None:
    start = torch.tensor([[0.25], [0.5], [0.0]], dtype=torch.float64)
    flat = Flat()
    solved = solve(flat, start, torch.full_like(start, math.inf), by(step, tolerance=0.0, steps=9))
    assert solved.steps == []
    assert torch.equal(solved.weights, start)
    assert (solved.loss, solved.first, solved.gap) == (1.0, 1.0, pytest.approx(0.25))
    assert flat.asked == 8, "one search, and not one a step"
