"""How weights are brought into the hull, and a point without numbers is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from continual.errors import Misconfigured
from continual.selection.hull import Hull


class Fixed:
    """The same loss and slopes everywhere."""

    def __init__(self, loss: float, slope: float) -> None:
        self.found = loss, slope

    def loss(self, weights: Tensor) -> float:
        return self.found[0] + 0.0 * float(weights.sum())

    def gradient(self, weights: Tensor, of: Tensor | None = None) -> tuple[float, Tensor]:
        assert of is None
        return self.found[0], torch.full_like(weights, self.found[1])


def hull(*caps: float, rho: float = 2.0, loss: float = 1.0, slope: float = -1.0) -> Hull:
    return Hull(Fixed(loss, slope), torch.tensor(caps, dtype=torch.float64)[:, None], rho)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1.5, 0.5), (1.5, 0.5)),  # as much as there may be
        ((1.5, 1.0), (1.25, 0.75)),  # a little more
        ((9.0, 0.0), (2.0, 0.0)),
        ((-0.1, 0.3), (0.0, 0.3)),
        ((1e-6, 0.3), (1e-6, 0.3)),  # little, and not nothing
        ((1e-9, 0.3), (0.0, 0.3)),
    ],
)
def test_weights_are_brought_into_the_hull_and_no_further(
    given: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    found = hull(math.inf, math.inf).feasible(torch.tensor(given, dtype=torch.float64)[:, None])
    assert found[:, 0].tolist() == list(expected)


def test_a_cap_holds_whatever_is_left_of_rho() -> None:
    found = hull(0.2, math.inf).feasible(torch.tensor([[0.9], [0.5]], dtype=torch.float64))
    assert found[:, 0].tolist() == [0.2, 0.5]


@pytest.mark.parametrize(("loss", "slope"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_point_whose_loss_or_slope_is_no_number_is_refused(loss: float, slope: float) -> None:
    with pytest.raises(Misconfigured, match="every slope have to be finite"):
        hull(math.inf, loss=loss, slope=slope).at(torch.ones(1, 1, dtype=torch.float64))
