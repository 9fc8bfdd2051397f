"""Transforms before a rule, weights, combined states, the variants of opcm: each is what its definition says, for every
rule that has it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.errors import Misconfigured
from continual.rules import Inputs, opcm, rule, together
from tests.helpers import batch, triplets
from tests.helpers.batch import BATCH
from tests.helpers.streams import FOLDING, MATRICES, SHAPES, SPECS, Models, Stream, bound, distance, model_lists

pytestmark = pytest.mark.slow

CHAINS: list[tuple[str, list[str]]] = [
    ("task-arithmetic", ["drop:rate=0.5"]),
    ("task-arithmetic", ["breadcrumbs:top=0.1:bottom=0.3"]),
    ("task-arithmetic", ["trim:density=0.3:over=tensor", "drop:rate=0.3:rescale=false:seed=5"]),
    ("mean", ["drop:rate=0.4", "trim:density=0.6"]),
    ("fisher", ["trim:density=0.4"]),
    ("magmax", ["drop:rate=0.9", "drop:rate=0.1"]),
    ("ties", ["trim:density=0.9", "drop:rate=0.2"]),
    ("iso-c", ["drop:rate=0.2"]),
    ("gram", ["trim:density=0.5"]),
]


@pytest.mark.parametrize(("name", "before"), CHAINS, ids=[f"{'+'.join(before)}+{name}" for name, before in CHAINS])
@given(models=model_lists())
@settings(max_examples=8, deadline=None)
def test_a_chain_is_its_rule_on_transformed_models(name: str, before: list[str], models: Models) -> None:
    stream = Stream(name, before=before)
    for step in range(1, len(models) + 1):
        stream.fold(models[step - 1])
        changed = [batch.transformed(model, before) for model in models[:step]]
        merged, expected = (
            stream.read(),
            BATCH[name](changed, MATRICES) if name != "fisher" else batch.fisher(changed, MATRICES, models[:step]),
        )
        for tensor in SHAPES:
            folded = [model[tensor].float() for model in changed]
            assert distance(merged[tensor], expected[tensor], folded) < bound(
                name, folded if tensor in MATRICES else ()
            ), (tensor, step)


@pytest.mark.parametrize("name", [n for n in FOLDING if rule(n).laws.combine])
@given(models=model_lists(), data=st.data())
@settings(max_examples=8, deadline=None)
def test_two_states_combined_are_one_that_folded_all(name: str, models: Models, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(models)))
    whole, one, other = Stream(name), Stream(name), Stream(name)
    for number, model in enumerate(models):
        whole.fold(model)
        (one if number < cut else other).fold(model)
    totals = together(one.totals, other.totals)
    assert one.rule.laws.combine is not None
    merged_sq = {n: one.rule.laws.combine(one.kept[n], other.kept[n], totals) for n in SHAPES}
    one.totals = replace(totals, merged_sq=math.fsum(merged_sq.values()))
    assert one.totals.body() == pytest.approx(whole.totals.body(), rel=1e-5, abs=1e-12)
    found = one.read()
    for tensor, expected in whole.read().items():
        folded = [model[tensor] for model in models]
        assert distance(found[tensor], expected, folded) < bound(name, folded if tensor in MATRICES else ()), tensor


@pytest.mark.parametrize("name", [n for n in FOLDING if rule(n).laws.weighted and rule(n).laws.combine])
@given(models=model_lists(), weight=st.sampled_from([2, 3]))
@settings(max_examples=6, deadline=None)
def test_a_weight_of_two_is_folding_twice(name: str, models: Models, weight: int) -> None:
    heavy, often = Stream(name), Stream(name)
    for model in models:
        heavy.fold(model, weight=float(weight))
        for _ in range(weight):
            often.fold(model)
    assert heavy.totals.weight == often.totals.weight
    for slot in heavy.kept["tall"]:
        for tensor in SHAPES:
            if slot in heavy.kept[tensor]:
                folded = [weight * model[tensor] for model in models]
                assert distance(heavy.kept[tensor][slot], often.kept[tensor][slot], folded) < 1e-5, (tensor, slot)


@pytest.mark.parametrize("name", triplets.WEIGHTED)
@given(models=model_lists(), weights=st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=5, max_size=5))
@settings(max_examples=5, deadline=None)
def test_triplets_with_weights_are_their_batch_form_with_weights(
    name: str, models: Models, weights: list[float]
) -> None:
    stream = Stream(name)
    for model, weight in zip(models, weights, strict=False):
        stream.fold(model, weight=weight)
    expected = batch.weighted(name, models, MATRICES, weights[: len(models)])
    for tensor, found in stream.read().items():
        folded = [model[tensor] for model in models]
        near = 3 * bound(name, folded if tensor in MATRICES else ())
        assert distance(found, expected[tensor], folded) < near, tensor


@given(models=model_lists())
@settings(max_examples=8, deadline=None)
def test_a_model_without_moments_for_a_tensor_weighs_nothing_there(models: Models) -> None:
    stream = Stream("fisher")
    for model in models:
        stream.fold(model)
    kept = {slot: value.clone() for slot, value in stream.kept["tall"].items()}
    after = stream.rule.fold.apply(
        stream.kept["tall"], torch.zeros(SHAPES["tall"]), Inputs(SPECS["tall"]), stream.totals
    ).accumulators
    assert all(torch.equal(after[slot], value) for slot, value in kept.items())


@pytest.mark.parametrize("variant", opcm.VARIANTS)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_every_variant_of_opcm_projects_what_its_formula_says(variant: opcm.Variant, shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(3)
    total, tau = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    expected = batch.opcm_step(total, tau, 0.5, variant)
    found = tau.clone()
    opcm.fold_matrix(total.clone(), found, 0.5, variant)
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (["drop:rate=1"], ("drop", "rate")),
        (["fade"], ("fade", "breadcrumbs")),
        (["drop:0.5"], ("drop:key=value", "0.5")),
        (["trim:level=3"], ("level", "density")),
        (["breadcrumbs:top=0.5:bottom=0.5"], ("leave nothing",)),
        (["breadcrumbs", "trim"], ("trim counts over the whole model", "breadcrumbs")),
        ("drop", ("list",)),
    ],
)
def test_a_chain_that_cannot_be_is_refused(before: object, words: tuple[str, ...]) -> None:
    with pytest.raises(Misconfigured) as raised:
        rule("task-arithmetic", {"before": before})
    assert all(word in str(raised.value) for word in words)
