"""OPCM over sequences against a float64 reference written from the formulas: full SVD, D rescaled at every step, no
shortcut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from continual.records import TensorSpec, Totals
from continual.rules import Inputs, ReadOptions, Sums, rule, settle
from tests.helpers import reference

pytestmark = pytest.mark.slow

SHAPES = {
    "tall": (96, 40),
    "wide": (40, 96),
    "square": (64, 64),
    "tiny": (2, 3),
    "conv": (24, 8, 3, 3),
    "bias": (50,),
    "scalar": (),
}
MATRICES = {name for name, shape in SHAPES.items() if len(shape) >= 2}


def task_vectors(count: int, seed: int, *, gap: bool = False) -> list[dict[str, Tensor]]:
    """Task vectors with decaying spectra that share some directions, so that the projections have something to remove.

    `gap`: a few strong directions and a tail a hundred times weaker, so that the share of Σσ jumps over any α.
    """
    random = torch.Generator().manual_seed(seed)
    shared = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    found = []
    for _ in range(count):
        tau = {}
        for name, shape in SHAPES.items():
            x = torch.randn(shape, generator=random)
            if len(shape) >= 2:
                flat = x.reshape(shape[0], -1)
                columns = torch.arange(flat.shape[1])
                decay = torch.where(columns < 4, 1.0, 0.01) if gap else torch.logspace(0, -2, flat.shape[1])
                x = (flat * decay).reshape(shape)
            tau[name] = (0.01 * (x + (0.0 if gap else 0.7) * shared[name])).float()
        found.append(tau)
    return found


def ours(taus: list[dict[str, Tensor]], alpha: float, variant: str) -> dict[str, Tensor]:
    """The same by the rule, as the engine drives it."""
    made = rule("opcm", {"alpha": alpha, "variant": variant})
    specs = {n: TensorSpec(n, s, "F32", "matrix" if len(s) >= 2 else "plain") for n, s in SHAPES.items()}
    state = {n: {"sum": torch.zeros(s)} for n, s in SHAPES.items()}
    totals = Totals()
    for tau in taus:
        folded = {n: made.fold.apply(state[n], tau[n].clone(), Inputs(specs[n]), totals) for n in sorted(SHAPES)}
        state = {n: f.accumulators for n, f in folded.items()}
        totals = settle(totals, Sums.total([f.sums for f in folded.values()]), 1.0)
    factor = ReadOptions("norm", 1.0).factors(totals, made.read.size(totals))[0]
    return {n: factor * made.read.unit(specs[n], state[n], totals) for n in SHAPES}


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("variant", ["block", "block+radial", "rows+columns"])
@pytest.mark.parametrize("gap", [False, True])
def test_six_models_within_1e_5_of_float64(alpha: float, variant: str, gap: bool) -> None:
    taus = task_vectors(6, seed=3, gap=gap)
    expected, found = reference.opcm(taus, MATRICES, alpha, variant), ours(taus, alpha, variant)
    for name in SHAPES:
        error = float((found[name].double() - expected[name]).norm() / expected[name].norm())
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_block_diagonal_one_step(alpha: float) -> None:
    taus = task_vectors(2, seed=4)
    expected, found = reference.opcm(taus, MATRICES, alpha, "block+diagonal"), ours(taus, alpha, "block+diagonal")
    for name in SHAPES:
        assert float((found[name].double() - expected[name]).norm() / expected[name].norm()) < 1e-5, name


def test_radial_is_orthogonal_to_what_was_merged() -> None:
    taus = task_vectors(4, seed=5)
    made = rule("opcm", {"variant": "block+radial"})
    for name in ("tall", "wide", "square", "conv"):
        spec, total = TensorSpec(name, SHAPES[name], "F32", "matrix"), torch.zeros(SHAPES[name])
        for tau in taus:
            before = total.double().clone()
            made.fold.apply({"sum": total}, tau[name].clone(), Inputs(spec), Totals())
            c = total.double() - before
            if float(before.norm()) > 0:
                assert abs(float((c * before).sum())) < 1e-6 * float(c.norm() * before.norm()), name


def test_the_projection_removes_something() -> None:
    """Against a test that a plain sum would pass."""
    taus = task_vectors(3, seed=6)
    plain = sum(t["square"].double() for t in taus)
    assert isinstance(plain, Tensor)
    found = ours(taus, 0.5, "block")["square"].double()
    direction = plain / plain.norm()
    assert float((found / found.norm() * direction).sum()) < 0.999
