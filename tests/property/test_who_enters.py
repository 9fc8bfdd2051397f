"""Which vertices are asked whether they may enter, when, and in which order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continual.selection.steps import STEPS, Step, always
from tests.helpers.hulls import (
    Asked,
    Quadratic,
    best_of,
    bound,
    by,
    line,
    quick,
    suited,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("step", STEPS)
@given(data=st.data())
@quick
def test_the_refused_stay_at_0_and_out_of_the_gap(step: Step, data: st.DataObject) -> None:
    f = data.draw(suited(step))
    m = len(f.caps)
    refused = data.draw(st.sets(st.integers(0, m - 1)))
    solved, points = f.run(by(step, f.rho, steps=10, tolerance=0.0), admit=lambda i, _: i not in refused)
    smaller = f.caps.clone()
    smaller[sorted(refused)] = 0.0
    gaps = [taken.gap for taken in solved.steps] + [solved.gap]
    for weights, found in zip(points, gaps, strict=True):
        assert not weights[sorted(refused)].any()
        assert found == pytest.approx(bound(weights, f.slopes(weights), f.rho, smaller), abs=1e-10 * f.scale)
    g = Quadratic(f.a, f.b, f.c, f.rho, smaller.numpy())
    assert gaps[-1] >= solved.loss - best_of(g) - 1e-10 * f.scale


@pytest.mark.parametrize("step", STEPS)
@given(data=st.data())
@quick
def test_who_is_asked(step: Step, data: st.DataObject) -> None:
    """Only vertices with a negative slope and no weight, best first, once at a point; a refused one again at the
    next."""
    f = data.draw(suited(step))
    asked = Asked(data.draw(st.sets(st.integers(0, len(f.caps) - 1))))
    f.run(by(step, f.rho, steps=6, tolerance=1e-6 * f.scale), admit=asked)
    assert len(set(asked.seen)) == len(asked.seen)
    for vertex, weights in asked.seen:
        order = f.slopes(torch.tensor(weights, dtype=torch.float64).reshape(f.caps.shape)).clamp(max=0).sum(1)
        assert order[vertex] < 0
        if f.caps.shape[1] == 1 and step != "soft":
            earlier = {other for other, place in asked.seen if place == weights and order[other] < order[vertex]}
            for other in range(len(f.caps)):
                if order[other] < order[vertex] and not torch.tensor(weights)[other] and f.caps[other, 0] > 0:
                    assert other in earlier


def test_the_best_is_asked_first_and_a_refused_one_again_at_the_next_step() -> None:
    f = Quadratic(np.diag([4.0, 3.0, 2.0]), np.ones(3), np.zeros(3), 1.0, np.full((3, 1), math.inf))
    asked = Asked({0})
    f.run(by("corrective", steps=2, tolerance=1e-9), admit=asked)
    assert [vertex for vertex, _ in asked.seen[:4]] == [0, 1, 0, 2]
    asked = Asked({0})
    f.run(by("soft", steps=1, best=2, tolerance=1e-9), admit=asked)
    assert [vertex for vertex, _ in asked.seen[:3]] == [0, 1, 2]


def test_of_several_picked_in_one_step_the_best_over_all_layers_is_asked_first() -> None:
    caps = np.full((3, 2), math.inf)
    a = np.zeros((6, 6))
    a[0, 0], a[1, 3], a[2, 4], a[3, 5] = 2.0, 3.0, 1.5, 2.9  # slopes (−2, 0), (0, −3), (−1.5, −2.9) at 0
    f = Quadratic(a, np.ones(6), np.zeros(6), 1.0, caps)
    asked = Asked(set())
    f.run(by("hard", steps=1), admit=asked)
    assert [vertex for vertex, weights in asked.seen if not any(weights)] == [1, 0]
    asked = Asked({1})
    solved, _ = f.run(by("corrective", active=1, steps=1), admit=asked)
    assert [vertex for vertex, weights in asked.seen if not any(weights)] == [1, 2]
    assert solved.steps[0].entered == (2,)


def test_nobody_is_asked_for_a_gain_within_the_tolerance() -> None:
    asked = Asked(set())
    solved, _ = line(1.0, 0.5, b=1e-2).run(by("corrective", tolerance=1e-2), admit=asked)
    assert (asked.seen, solved.steps, solved.gap) == ([], [], pytest.approx(1e-2))


@pytest.mark.parametrize("step", STEPS)
def test_beyond_the_most_none_enters_and_none_is_asked(step: Step) -> None:
    caps = np.full((6, 1), math.inf)
    caps[5] = 0.1  # does not count
    f = Quadratic(np.eye(6), np.full(6, 0.5), np.zeros(6), 2.0, caps)
    asked = Asked(set())
    start = torch.zeros(6, 1, dtype=torch.float64)
    start[5] = 0.1
    solved, points = f.run(by(step, 2.0, active=3, best=6, steps=60, tolerance=1e-6), start=start, admit=asked)
    assert {vertex for vertex, _ in asked.seen} == {0, 1, 2}
    assert all(int((w[:5] > 0).sum()) <= 3 for w in points)
    assert solved.weights[:3, 0].tolist() == pytest.approx([0.5] * 3, abs=2e-2)
    closed = f.caps.clone()
    closed[3:5] = 0.0
    assert solved.gap == pytest.approx(bound(solved.weights, f.slopes(solved.weights), 2.0, closed), abs=1e-10)


def test_in_a_full_house_a_vertex_with_a_cap_may_come_back() -> None:
    caps = np.array([[math.inf], [0.3], [math.inf]])
    f = Quadratic(np.eye(3), np.full(3, 0.5), np.zeros(3), 2.0, caps)
    asked = Asked(set())
    start = torch.tensor([[0.2], [0.0], [0.0]], dtype=torch.float64)
    solved, _ = f.run(by("corrective", 2.0, active=1, steps=9, tolerance=1e-9), start=start, admit=asked)
    assert {vertex for vertex, _ in asked.seen} == {1}
    assert solved.weights[:, 0].tolist() == pytest.approx([0.5, 0.3, 0.0])


def test_by_default_every_vertex_may_enter() -> None:
    assert always(0, torch.zeros(1, 1))
    solved, _ = line(1.0, b=0.5).run(by(tolerance=1e-9))
    assert solved.weights.item() == pytest.approx(0.5)
