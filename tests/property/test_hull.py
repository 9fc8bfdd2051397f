"""The hull of Frank-Wolfe: its gap, the nearest point in it, and how weights are brought into it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.selection.hull import gap, oracle, project
from tests.helpers.hulls import (
    Quadratic,
    bound,
    by,
    feasible,
    halves,
    line,
    optimum,
    quick,
)

pytestmark = pytest.mark.slow


@given(
    values=st.lists(st.floats(-4, 4), min_size=1, max_size=5), data=st.data(), total=st.sampled_from([0.3, 1.0, 2.5])
)
@settings(quick, max_examples=60)
def test_project_is_the_nearest_point(values: list[float], data: st.DataObject, total: float) -> None:
    caps = data.draw(st.lists(st.sampled_from([0.0, 0.2, 1.0, math.inf]), min_size=len(values), max_size=len(values)))
    v, c = torch.tensor(values, dtype=torch.float64), torch.tensor(caps, dtype=torch.float64)
    found = project(v, total, c)
    m = len(values)
    _, nearest = optimum(np.eye(m), v.numpy(), np.zeros(m), total, c.numpy()[:, None])
    assert found.numpy() == pytest.approx(nearest[:, 0], abs=1e-8)
    assert float(found.sum()) <= total + 1e-14
    assert (found >= 0).all()
    assert (found <= c).all()
    assert project(found, total, c).numpy() == pytest.approx(found.numpy(), abs=1e-15)


@given(data=st.data(), shape=st.tuples(st.integers(1, 4), st.integers(1, 3)), rho=st.sampled_from([0.5, 1.0, 2.0]))
@quick
def test_the_gap_is_the_sum_over_the_columns_and_exact_with_caps(
    data: st.DataObject, shape: tuple[int, int], rho: float
) -> None:
    m, layers = shape
    slopes = torch.from_numpy(data.draw(halves(m * layers))).reshape(shape)
    caps = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 0.4, 1.0, math.inf]), min_size=m * layers, max_size=m * layers))
    )
    caps = caps.double().reshape(shape)
    allowed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=m, max_size=m)))
    weights = torch.where(allowed[:, None], torch.full(shape, rho / m, dtype=torch.float64).minimum(caps), 0.0)
    within = torch.where(allowed[:, None], caps, 0.0)
    assert gap(weights, slopes, rho, allowed, caps) == pytest.approx(bound(weights, slopes, rho, within))
    columns = [gap(weights[:, [c]], slopes[:, [c]], rho, allowed, caps[:, [c]]) for c in range(layers)]
    assert gap(weights, slopes, rho, allowed, caps) == pytest.approx(sum(columns))
    least = [min([0.0, *(rho * slopes[allowed, c]).tolist()]) for c in range(layers)]
    assert gap(weights, slopes, rho, allowed) == pytest.approx(float((weights * slopes).sum()) - sum(least))
    target = oracle(slopes, rho, allowed, caps)
    assert (target <= within).all()
    assert (target.sum(0) <= rho * (1 + 1e-15)).all()


def test_a_start_outside_another_hull_is_brought_into_it() -> None:
    f = line(1.0, 2.0, b=0.1, rho=0.5)
    solved, points = f.run(by("pairwise", 0.5, steps=1), start=torch.tensor([[0.9], [0.3]], dtype=torch.float64))
    assert points[0].reshape(-1).tolist() == pytest.approx([0.5, 0.0])
    assert feasible(solved.weights, f)
    f = Quadratic(np.eye(4), np.zeros(4), np.zeros(4), 1.0, np.array([[0.2, math.inf], [math.inf, math.inf]]))
    _, points = f.run(by("hard"), start=torch.tensor([[0.3, 1e-10], [1e-10, 1e-10]], dtype=torch.float64))
    assert points[0].tolist() == [
        [0.2, 1e-10],
        [0.0, 0.0],
    ]  # gone only where all of a vertex' weights are next to nothing
