"""States of the rule frank-wolfe in the world of `tests.helpers.quadratic`, and what tests ask of their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch import Tensor

from continual import api, making
from continual.config import Settings
from continual.objectives import calibration
from continual.objectives.wanted_losses import Wanted
from continual.selection.active import active_at
from continual.selection.in_memory import ModelInMemory
from tests.helpers import quadratic

STEPS = ("hard", "pairwise", "soft", "corrective")


def opened(
    state: Path,
    base: Path,
    *,
    on_step: Callable[[str], None] | None = None,
    rounds: Mapping[str, Any] | None = None,
    **more: Any,
) -> api.Merge:
    if not state.exists():
        making.init(base, state, making.Recipe(rule="frank-wolfe"))
    asked = {
        "objective": "tests.helpers.quadratic:make",
        "max_base_ratio": 10.0,
        "device": "cpu",
        "state": state,
        "rounds": {"batch": quadratic.ROWS, **(rounds or {})},  # all rows of a task at once
    }
    return api.Merge(Settings(**{**asked, **more}), write=True, on_step=on_step)


def weights(merge: api.Merge) -> dict[str, tuple[float, ...]]:
    now = active_at(merge.state)
    return {now.members[key].name: found for key, found in now.weights.items()}


def merged(merge: api.Merge) -> dict[str, Tensor]:
    return {spec.name: merge.read(spec.name).double() for spec in merge.state.format.tensors}


def bits(merge: api.Merge) -> dict[str, bytes]:
    return {name: merge.state.read(name, "sum").tobytes() for name in merge.state.format.slots}


def vectors(base: Path, *named: str) -> dict[str, dict[str, Tensor]]:
    """Task vectors in float64."""
    origin = load_file(base / "model.safetensors")
    pool = base.parent / "pool"
    return {
        n: {t: v.double() - origin[t].double() for t, v in load_file(pool / n / "model.safetensors").items()}
        for n in named
    }


def layers(merge: api.Merge, *, by_layer: bool) -> dict[str, int]:
    loaded = ModelInMemory(
        merge.engine,
        calibration.load(merge.asked().calibration, merge.base.checkpoint.path, torch.device("cpu")),
        by_layer=by_layer,
    )
    return dict(loaded.layers)


def is_the_sum(
    merge: api.Merge, taus: Mapping[str, Mapping[str, Tensor]], given: Mapping[str, tuple[float, ...]]
) -> None:
    """X = Σ w_i τ_i, tensor by tensor."""
    wide = max((len(w) for w in given.values()), default=1) > 1
    layer = layers(merge, by_layer=wide)
    for name, found in merged(merge).items():
        expected = sum((taus[m][name] * w[layer[name]] for m, w in given.items()), torch.zeros_like(found))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


class Best:
    """The loss on the driving rows as a function of weights, one of each model, and its least value over ρ·conv({0} ∪
    models): dense, in float64."""

    def __init__(self, base: Path, *named: str) -> None:
        loaded = calibration.load(Wanted("tests.helpers.quadratic:make"), base, torch.device("cpu"))
        origin = quadratic.flat(load_file(base / "model.safetensors")).double()
        taus = torch.stack([quadratic.flat(v) for v in vectors(base, *named).values()], dim=1)
        parts = []
        for dealt in loaded.dealt:
            task: Any = dealt.task
            signs, scale = task.signs[dealt.drive].double(), (len(dealt.drive) * len(loaded.dealt)) ** -0.5
            parts.append((scale * (signs @ taus), scale * (task.wanted[dealt.drive].double() - signs @ origin)))
        self.a, self.b = (torch.cat(side).numpy() for side in zip(*parts, strict=True))

    def loss(self, weights: Any) -> float:
        return float(0.5 * np.square(self.a @ np.asarray(weights) - self.b).sum())

    def optimum(self, rho: float) -> float:
        count = self.a.shape[1]
        found = minimize(
            self.loss,
            np.full(count, min(1.0, rho / count / 2)),
            jac=lambda w: self.a.T @ (self.a @ w - self.b),
            bounds=[(0, None)] * count,
            constraints={"type": "ineq", "fun": lambda w: rho - w.sum()},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return float(found.fun)
