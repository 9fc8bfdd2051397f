"""Convex quadratics over the hull of Frank-Wolfe, their optimum known from enumerating every face of it; and how
hypothesis draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from continual.config import StepSettings
from continual.selection.steps import WHOLE, Solved, Step, Stepping, solve

quick = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def by(step: Step = "corrective", rho: float = 1.0, **settings: float | str) -> Stepping:
    """How steps are made in these tests; `settings` are those of `config.StepSettings`."""
    given = {"steps": 30, "inner": 4, "tolerance": 1e-3, **settings}
    return Stepping.of(StepSettings.model_validate({"step": step, "rho": rho, **given}))


class Quadratic:
    """½‖A·vec(w) − b‖² + ⟨c, w⟩: column i·L + l of A is what vertex i does in layer l. Keeps where it was asked."""

    def __init__(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, rho: float, caps: np.ndarray) -> None:
        self.a, self.b, self.c, self.rho, self.caps = a, b, c, rho, torch.from_numpy(caps)
        self.losses: list[Tensor] = []
        self.gradients: list[Tensor] = []  # for some vertices and then for all counts once
        self.partial = False

    def value(self, weights: Tensor) -> float:
        w = weights.numpy().reshape(-1)
        return float(0.5 * np.sum((self.a @ w - self.b) ** 2) + self.c @ w)

    def loss(self, weights: Tensor) -> float:
        self.losses.append(weights.clone())
        return self.value(weights)

    def slopes(self, weights: Tensor) -> Tensor:
        w = weights.numpy().reshape(-1)
        return torch.from_numpy((self.a.T @ (self.a @ w - self.b) + self.c).reshape(weights.shape))

    def gradient(self, weights: Tensor, of: Tensor | None = None) -> tuple[float, Tensor]:
        """Whom it is not asked about it tempts to look at."""
        if not (self.partial and of is None and torch.equal(weights, self.gradients[-1])):
            self.gradients.append(weights.clone())
        self.partial = of is not None
        return self.value(weights), self.slopes(weights) if of is None else torch.where(
            of[:, None], self.slopes(weights), -1e3
        )

    @property
    def scale(self) -> float:
        return max(1.0, self.value(torch.zeros_like(self.caps)))

    def run(self, stepping: Stepping, start: Tensor | None = None, **more: Any) -> tuple[Solved, list[Tensor]]:
        """With every point on the way, the start first."""
        self.losses, self.gradients, self.partial = [], [], False
        points: list[Tensor] = []
        start = torch.zeros_like(self.caps) if start is None else start
        solved = solve(self, start, self.caps, stepping, hear=lambda _: points.append(self.gradients[-1]), **more)
        return solved, [self.gradients[0], *points]


def faces(caps: np.ndarray) -> Iterator[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Each coefficient at 0 (0), free (1) or at its cap (2), each column's budget used up or not."""
    kinds = [(0, 1, 2) if math.isfinite(cap) else (0, 1) for cap in caps.reshape(-1)]
    yield from product(product(*kinds), product((False, True), repeat=caps.shape[1]))


def optimum(a: np.ndarray, b: np.ndarray, c: np.ndarray, rho: float, caps: np.ndarray) -> tuple[float, np.ndarray]:
    """The least value and a minimiser: the stationary point of every face, the best of those that are feasible."""
    m, layers = caps.shape
    q, linear, flat = a.T @ a, a.T @ b - c, caps.reshape(-1)
    sums = np.tile(np.eye(layers), (1, m))  # L × mL
    best = (math.inf, np.zeros(0))
    for kinds, tight in faces(caps):
        kind, full = np.array(kinds), np.array(tight)
        free, fixed = np.flatnonzero(kind == 1), np.flatnonzero(kind == 2)
        w = np.zeros(m * layers)
        w[fixed] = flat[fixed]
        e = sums[full]
        size = len(free) + len(e)
        system, right = np.zeros((size, size)), np.zeros(size)
        system[: len(free), : len(free)] = q[np.ix_(free, free)]
        system[: len(free), len(free) :], system[len(free) :, : len(free)] = e[:, free].T, e[:, free]
        right[: len(free)], right[len(free) :] = linear[free] - q[free] @ w, rho - e @ w
        if size:
            w[free] = np.linalg.lstsq(system, right, rcond=1e-11)[0][: len(free)]
        if (w >= -1e-9).all() and (w <= flat + 1e-9).all() and (sums @ w <= rho + 1e-9).all():
            value = float(0.5 * np.sum((a @ w - b) ** 2) + c @ w)
            if value < best[0]:
                best = (value, w)
    return best[0], best[1].reshape(caps.shape)


def corners(caps: np.ndarray, rho: float) -> list[np.ndarray]:
    """Of one column: some coefficients at their cap, at most one with the rest of ρ."""
    found = []
    for count in range(len(caps) + 1):
        for full in combinations(range(len(caps)), count):
            left = rho - sum(caps[i] for i in full)
            if left < 0:
                continue
            point = np.zeros(len(caps))
            point[list(full)] = caps[list(full)]
            found.append(point)
            for i in set(range(len(caps))) - set(full):
                if left <= caps[i]:
                    found.append(point.copy())
                    found[-1][i] = left
    return found


def bound(weights: Tensor, slopes: Tensor, rho: float, caps: Tensor) -> float:
    """The gap, from the corners."""
    w, s, c = weights.numpy(), slopes.numpy(), caps.numpy()
    return sum(
        float(s[:, layer] @ w[:, layer]) - min(float(s[:, layer] @ corner) for corner in corners(c[:, layer], rho))
        for layer in range(w.shape[1])
    )


def halves(size: int, most: int = 6) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(-most, most), min_size=size, max_size=size).map(lambda found: np.array(found) / 2)


@st.composite
def quadratics(draw: st.DrawFn, layers: int | None = None, capped: bool = True, linear: bool = True) -> Quadratic:
    wide = draw(st.integers(1, 2)) if layers is None else layers
    m = draw(st.integers(1, 5 if wide == 1 else 3))
    n = draw(st.integers(1, 5))
    a = draw(halves(n * m * wide)).reshape(n, m * wide)
    rho = draw(st.sampled_from([0.5, 1.0, 1.75]))
    caps = np.full((m, wide), math.inf)
    if capped and draw(st.booleans()):
        caps[draw(st.integers(0, m - 1))] = draw(
            st.lists(st.sampled_from([0.0, 0.25, 0.3, 1.0]), min_size=wide, max_size=wide)
        )
    c = draw(halves(m * wide, 2)) if linear else np.zeros(m * wide)
    return Quadratic(a, draw(halves(n, 10)), c, rho, caps)


def task_wise(capped: bool = True) -> st.SearchStrategy[Quadratic]:
    return quadratics(layers=1, capped=capped)


def suited(step: Step) -> st.SearchStrategy[Quadratic]:
    return task_wise() if step in WHOLE else quadratics()


def best_of(f: Quadratic) -> float:
    return optimum(f.a, f.b, f.c, f.rho, f.caps.numpy())[0]


def feasible(weights: Tensor, f: Quadratic) -> bool:
    return bool((weights >= 0).all() and (weights <= f.caps).all() and (weights.sum(0) <= f.rho * (1 + 1e-11)).all())


def line(*ends: float, b: float, rho: float = 1.0) -> Quadratic:
    """Vertices on one line, a target on it."""
    return Quadratic(np.array([ends]), np.array([b]), np.zeros(len(ends)), rho, np.full((len(ends), 1), math.inf))


class Asked:
    """Refuses some; keeps who was asked at which weights."""

    def __init__(self, refused: set[int]) -> None:
        self.refused = refused
        self.seen: list[tuple[int, tuple[float, ...]]] = []

    def __call__(self, vertex: int, weights: Tensor) -> bool:
        assert not weights[vertex].any()
        self.seen.append((vertex, tuple(weights.reshape(-1).tolist())))
        return vertex not in self.refused
