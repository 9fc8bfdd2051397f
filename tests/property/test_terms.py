"""Where X is a sum with a term of each model, coefficients multiply the terms and nothing else: not the directions that
others have made room for, and not how long X is made."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from continual.blocks import Explaining, Merged, ModelShare
from continual.rules import LayerInputs, read_options, rule, terms_of
from continual.rules.registry import ROWS
from tests.helpers.shelves import MATRICES, SPECS, Regime, adapters, dense, shelf, sides
from tests.helpers.streams import SHAPES, Stream

pytestmark = pytest.mark.slow

CHOSEN = {1: 1.0, 2: 0.5, 4: 2.0}
TIMES = {1: {name: 0.5 + place for place, name in enumerate(SPECS)}, 4: dict.fromkeys(SPECS, 3.0)}
OF_ADAPTERS = [name for name, row in ROWS.items() if terms_of(row.rule(), blocks=True)]
OF_TENSORS = [name for name, row in ROWS.items() if terms_of(row.rule())]


def known(name: str) -> dict[int, LayerInputs] | None:
    """Inputs of a layer on rows of each model's task, of the matrices."""
    if name not in MATRICES:
        return None
    random, n = torch.Generator().manual_seed(3), sides(name)[1]
    drawn = {number: torch.randn(6, n, generator=random, dtype=torch.float64) for number in (1, 2, 3, 4)}
    return {number: LayerInputs(x, x.square().sum(0) + 0.1) for number, x in drawn.items()}


def merged(name: str, regime: Regime, times: dict[int, dict[str, float]], chosen: dict[int, float]) -> Merged:
    """A merge of some of four adapters."""
    options = read_options(name, "spread:1.1" if ROWS[name].spectral else "norm:1.5", "0.5:1")
    made = Merged(shelf(adapters(regime, 4, rank=2)), chosen, rule(name), options)
    return made.by_inputs(known).by_term(times)


def whole(made: Merged) -> dict[str, Tensor]:
    """The merged task vector, each tensor flat, float64."""
    made.settle()
    return {name: made.dense(name).double().flatten() for name in SPECS}


def test_the_registry_says_which() -> None:
    assert OF_ADAPTERS == [
        "mean",
        "task-arithmetic",
        "tsv-m",
        "tsv-even",
        "tsv-u",
        "tsv-w",
        "esm",
        "tsv-flow",
        "regmean",
    ]
    assert OF_TENSORS == ["tsv-m", "tsv-even", "tsv-u", "tsv-w", "esm", "tsv-flow"]


@pytest.mark.parametrize("name", OF_ADAPTERS)
@pytest.mark.parametrize("regime", ["mixed", "shared", "partial"])
def test_coefficients_multiply_the_terms_alone(name: str, regime: Regime) -> None:
    plain, changed = merged(name, regime, {}, CHOSEN), merged(name, regime, TIMES, CHOSEN)
    before, after = whole(plain), whole(changed)
    assert changed.factors == plain.factors, "the length is that of X without coefficients"
    for tensor in SPECS:
        left, right, owner = plain.terms(tensor)
        expected = torch.zeros_like(before[tensor])
        for number in CHOSEN:
            mine = [column for column, one in enumerate(owner) if one == number]
            term = (left[:, mine] @ right[:, mine].mT).flatten()
            expected += TIMES.get(number, {}).get(tensor, 1.0) * plain.scale(tensor) * term
        near = 1e-5 * max(1e-9, float(before[tensor].norm()))
        assert float((after[tensor] - expected).norm()) <= 10 * near, tensor
        assert plain.terms(tensor).square == pytest.approx(plain.square(tensor), rel=1e-5, abs=1e-12)
        thin = changed.thin(tensor)
        assert float(((thin.left @ thin.right.mT).flatten() - expected).norm()) <= 10 * near, tensor
    alike = merged(name, regime, {number: dict.fromkeys(SPECS, 2.0) for number in CHOSEN}, CHOSEN)
    doubled = whole(alike)
    assert all(torch.allclose(doubled[n], 2 * before[n], rtol=1e-4, atol=1e-6) for n in SPECS)


@pytest.mark.parametrize("name", OF_ADAPTERS)
@pytest.mark.parametrize("regime", ["mixed", "shared"])
def test_shares_are_what_leaving_out_gives(name: str, regime: Regime) -> None:
    made = merged(name, regime, TIMES, CHOSEN)
    found, full = Explaining(merged(name, regime, TIMES, CHOSEN)).shares(), whole(made)
    taus = [{n: one.double().flatten() for n, one in model.items()} for model in dense(made.shelf, list(CHOSEN))]
    for index, number in enumerate(CHOSEN):
        rest = whole(merged(name, regime, TIMES, {n: w for n, w in CHOSEN.items() if n != number}))
        for tensor in SPECS:
            if not bool(taus[index][tensor].any()):
                continue
            tau, x = taus[index][tensor], full[tensor]
            lengths = [weight * float(one[tensor].norm()) for weight, one in zip(CHOSEN.values(), taus, strict=True)]
            expected = ModelShare(
                lengths[index] / math.fsum(lengths),
                float(tau @ x / (tau.norm() * x.norm())),
                float((x - rest[tensor]).norm() / x.norm()),
            )
            assert found.layers[tensor][number] == pytest.approx(expected, abs=3e-4), (tensor, number)


@pytest.mark.parametrize("name", OF_TENSORS)
def test_whole_tensors_have_the_terms_of_each_fold(name: str) -> None:
    """Of three models, of which the second did not touch one matrix; and past as many as there is room for."""
    for count in (3, 40):
        stream, random = Stream(name), torch.Generator().manual_seed(count)
        for number in range(count):
            model = {n: torch.randn(shape, generator=random) for n, shape in SHAPES.items()}
            for tensor, shape in SHAPES.items():
                if number == 1 and len(shape) == 2:
                    model[tensor] = torch.zeros(shape)
            stream.fold(model)
        read = stream.read()
        assert stream.rule.read.terms is not None
        for tensor, value in read.items():
            if "owner" not in stream.kept[tensor]:
                continue
            left, right, owner = stream.rule.read.terms(stream.kept[tensor], stream.totals)
            assert torch.allclose((left @ right.mT).view(value.shape), value.double(), atol=1e-5)
            assert set(owner) <= set(range(1, count + 1)) - ({2} if value.dim() == 2 else set())
            if count == 3 and min(value.shape[0], value[0].numel()) >= 3:
                assert {1, 3} <= set(owner)
