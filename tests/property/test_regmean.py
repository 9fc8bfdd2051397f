"""RegMean from factors: whatever the models, their weights and their inputs, it is what its paper computes from whole
matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from continual.blocks import Explaining, Merged
from continual.rules import LayerInputs, read_options, readings, rule
from continual.rules.regmean import solved
from tests.helpers import batch
from tests.helpers.shelves import MATRICES, SPECS, HeldLayers, Regime, adapters, dense, shelf, sides

Moments = dict[str, dict[int, Tensor]]


def moments(count: int, rows: int, *, across: bool = False) -> Moments:
    """C of each layer and model, of so many inputs; one input of every layer is always zero."""
    random, found = torch.Generator().manual_seed(rows), Moments()
    for name in MATRICES:
        n = sides(name)[0 if across else 1]
        found[name] = {}
        for number in range(1, count + 1):
            x = torch.randn(rows, n, generator=random, dtype=torch.float64) * torch.linspace(0.1, 2.0, n)
            x[:, 3] = 0.0
            found[name][number] = x.mT @ x / rows
    return found


def kept(moment: Tensor, rank: int, *, across: bool = False) -> LayerInputs:
    """As it is kept: so many of its eigenvalues, and its diagonal."""
    values, vectors = torch.linalg.eigh(moment)
    factor = (vectors * values.clamp(min=0).sqrt()).mT.flip(0)[:rank]
    return LayerInputs(factor, moment.diagonal(), across)


def merged(held: HeldLayers, chosen: dict[int, float], known: Moments, rank: int, alpha: float, across: bool) -> Merged:
    made = Merged(held, chosen, rule("regmean", {"alpha": alpha}), read_options("regmean"))
    return made.by_inputs(
        lambda name: (
            {number: kept(c, rank, across=across) for number, c in known[name].items()} if name in known else None
        )
    )


@pytest.mark.parametrize("across", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("regime", ["mixed", "shared", "twins", "zero", "partial"])
def test_it_is_what_the_paper_computes(regime: Regime, across: bool) -> None:
    held, chosen = shelf(adapters(regime, 4)), {1: 1.0, 2: 2.5, 4: 0.5}
    known = moments(4, 60, across=across)
    found, models = merged(held, chosen, known, 99, 0.9, across), dense(held, list(chosen))
    for name, spec in SPECS.items():
        taus = [model[name] for model in models]
        total = sum(chosen.values())
        expected = sum(w * tau.double() for w, tau in zip(chosen.values(), taus, strict=True)) / total
        if name in MATRICES:
            mine = [known[name][number] for number in chosen]
            expected = batch.regmean(taus, mine, list(chosen.values()), 0.9, across=across).view(spec.shape)
        scale = max(float(tau.norm()) for tau in taus)
        assert float((found.unit(name).double() - expected).norm()) <= 1e-5 * scale, name
        thin = found.thin(name)
        assert float(((thin.left @ thin.right.mT).view(spec.shape) - expected).norm()) <= 1e-5 * scale, name
        assert found.square(name) == pytest.approx(float(expected.square().sum()), rel=1e-6)
        cut = found.thin(name, 2)
        assert cut.left.shape[1] <= 2
        assert cut.square + cut.cut == pytest.approx(thin.square, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.sampled_from([0.0, 0.5, 0.95]), st.integers(0, 99))
def test_few_eigenvalues_and_many_are_solved_alike(models: int, rank: int, alpha: float, seed: int) -> None:
    """Woodbury's identity, and the whole matrix where there are more vectors than inputs."""
    random = torch.Generator().manual_seed(seed)
    n = 20
    inputs = [
        LayerInputs(
            factor := torch.randn(rank, n, generator=random, dtype=torch.float64),
            factor.square().sum(0) * (1 + 0.1 * k),
        )
        for k in range(models)
    ]
    v = torch.randn(n, 2 * models, generator=random, dtype=torch.float64)
    rows, weights = {k: slice(2 * k, 2 * k + 2) for k in range(models)}, [1.0 + k for k in range(models)]
    found = solved(v, rows, inputs, weights, alpha)
    whole = []
    for one, weight in zip(inputs, weights, strict=True):
        off = alpha * (one.factor.mT @ one.factor)
        level = sum(float(other.diagonal.mean()) for other in inputs) / models
        alone = one.diagonal - off.diagonal() + 1e-6 * level
        whole.append(weight * (off + torch.diag(alone)))
    total = torch.stack(whole).sum(0)
    for k in range(models):
        expected = torch.linalg.solve(total, whole[k] @ v[:, rows[k]]) / weights[k]
        assert torch.allclose(found[:, rows[k]], expected, rtol=1e-6, atol=1e-8)


def test_one_model_reads_as_it_is_and_one_c_for_all_gives_the_mean() -> None:
    held, known = shelf(adapters("mixed", 3)), moments(3, 30)
    alone = merged(held, {2: 3.0}, known, 9, 0.95, across=False)
    (model,) = dense(held, [2])
    for name in SPECS:
        torch.testing.assert_close(alone.unit(name).double(), model[name], rtol=1e-5, atol=1e-6)
    one = {name: dict.fromkeys((1, 2, 3), mine[1]) for name, mine in known.items()}
    shared = merged(held, dict.fromkeys((1, 2, 3), 1.0), one, 99, 0.95, across=False)
    models = dense(held, [1, 2, 3])
    for name in SPECS:
        mean = torch.stack([each[name] for each in models]).mean(0)
        torch.testing.assert_close(shared.unit(name).double(), mean, rtol=1e-5, atol=1e-6)


def test_where_a_task_has_no_inputs_the_others_decide_and_where_none_has_it_is_the_mean() -> None:
    held, known = shelf(adapters("mixed", 3)), moments(3, 60)
    models = dense(held, [1, 2, 3])
    for mine in known.values():
        mine[2] = torch.zeros_like(mine[2])
    found = merged(held, dict.fromkeys((1, 2), 1.0), known, 99, 0.5, across=False)
    torch.testing.assert_close(
        found.unit("tall").double()[:, 4:],
        models[0]["tall"][:, 4:],
        rtol=1e-3,
        atol=1e-4,
        msg="the first's inputs decide",
    )
    none = {name: {number: torch.zeros_like(c) for number, c in mine.items()} for name, mine in known.items()}
    found = merged(held, dict.fromkeys((1, 2, 3), 1.0), none, 99, 0.95, across=False)
    for name in SPECS:
        mean = torch.stack([each[name] for each in models]).mean(0)
        torch.testing.assert_close(found.unit(name).double(), mean, rtol=1e-5, atol=1e-6)


def test_shares_are_what_leaving_out_gives() -> None:
    held, known = shelf(adapters("partial", 4)), moments(4, 40)
    chosen = {1: 1.0, 2: 2.0, 3: 0.5}
    whole = merged(held, chosen, known, 12, 0.9, across=False)
    shares = Explaining(whole).shares()
    models = dict(zip(chosen, dense(held, list(chosen)), strict=True))
    for name in MATRICES:
        x = whole.unit(name).double()
        for number, told in shares.layers[name].items():
            rest = merged(held, {k: w for k, w in chosen.items() if k != number}, known, 12, 0.9, across=False)
            tau = models[number][name].double()
            assert told.change == pytest.approx(float((x - rest.unit(name).double()).norm() / x.norm()), abs=1e-4)
            assert told.cosine == pytest.approx(float((tau * x).sum() / (tau.norm() * x.norm())), abs=1e-5)


def test_a_state_of_whole_tensors_is_read_by_it_in_no_way() -> None:
    assert "regmean" in readings(rule("iso-c"), blocks=True)
    assert all("regmean" not in readings(rule(name)) for name in ("mean", "tsv-m", "gram", "regmean"))
