"""The laws of every rule in the registry: streaming is the batch form at every step, sizes are constant, and what a
rule claims of order and unfolding holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.errors import Misconfigured
from continual.records import Totals
from continual.rules import RULES, Inputs, Pass, Size, dc, flow, gram, read_options, readings, rule, trimming
from tests.helpers import batch
from tests.helpers.batch import BATCH
from tests.helpers.streams import (
    FOLDING,
    MATRICES,
    READINGS,
    SHAPES,
    SPECS,
    Models,
    Stream,
    bound,
    distance,
    measure,
    model_lists,
)

pytestmark = pytest.mark.slow
SHORTER = ("gram", "flow")
"""One model alone reads nearly as itself: a ridge, or an early stop, shortens what is small."""


def test_every_rule_has_a_batch_form() -> None:
    assert RULES.keys() == BATCH.keys(), "write the paper's form in tests/helpers/batch.py"


@pytest.mark.parametrize(("name", "by"), READINGS.items())
def test_a_reading_folds_as_the_rule_does_whose_states_it_reads(name: str, by: str) -> None:
    """Bit for bit, so either can read what the other made."""
    one, other, random = Stream(name), Stream(by), torch.Generator().manual_seed(1)
    for _ in range(3):
        model = {n: torch.randn(shape, generator=random) for n, shape in SHAPES.items()}
        one.fold(model)
        other.fold(model)
    assert one.totals == other.totals
    for tensor, kept in one.kept.items():
        assert kept.keys() == other.kept[tensor].keys()
        assert all(torch.equal(value, other.kept[tensor][slot]) for slot, value in kept.items())
    assert name in readings(rule(by))
    assert by in readings(rule(name))


@pytest.mark.parametrize("name", FOLDING)
@given(models=model_lists())
@settings(max_examples=12, deadline=None)
def test_streaming_is_the_batch_form_at_every_step(name: str, models: Models) -> None:
    as_in_the_batch(name, models)


@pytest.mark.parametrize("name", READINGS)
@given(models=model_lists())
@settings(max_examples=5, deadline=None)
def test_a_reading_is_its_batch_form_at_every_step(name: str, models: Models) -> None:
    as_in_the_batch(name, models)


def as_in_the_batch(name: str, models: Models) -> None:
    stream = Stream(name)
    for step in range(1, len(models) + 1):
        stream.fold(models[step - 1])
        merged, expected = stream.read(), BATCH[name](models[:step], MATRICES)
        for tensor in SHAPES:
            folded = [model[tensor] for model in models[:step]]
            within = bound(name, folded if tensor in MATRICES else ())
            assert distance(merged[tensor], expected[tensor], folded) < within, (tensor, step)


@pytest.mark.parametrize("smooth", dc.SMOOTH)
@given(models=model_lists(), density=st.sampled_from([1e-3, 0.1, 0.3]))
@settings(max_examples=4, deadline=None)
def test_dc_smooths_and_trims_as_its_options_say(smooth: dc.Smooth, models: Models, density: float) -> None:
    stream = Stream("dc", smooth=smooth, density=density)
    for model in models:
        stream.fold(model)
    expected = batch.dc(models, MATRICES, smooth, density)
    for tensor, found in stream.read().items():
        folded = [model[tensor] for model in models]
        assert distance(found, expected[tensor], folded) < bound("dc", folded if tensor in MATRICES else ()), tensor


@pytest.mark.parametrize("name", [n for n in FOLDING if RULES[n].read.policy == "spread" and n not in SHORTER])
@given(models=model_lists())
@settings(max_examples=15, deadline=None)
def test_one_model_alone_reads_as_itself(name: str, models: Models) -> None:
    alone(name, models)


@pytest.mark.parametrize("name", [n for n in READINGS if n not in SHORTER])
@given(models=model_lists())
@settings(max_examples=4, deadline=None)
def test_one_model_alone_is_itself_in_every_reading(name: str, models: Models) -> None:
    alone(name, models)


def alone(name: str, models: Models) -> None:
    stream = Stream(name)
    stream.fold(models[0])
    merged = stream.read()
    matrices, rest = (
        math.sqrt(
            sum(float(merged[tensor].double().square().sum()) for tensor in SHAPES if (tensor in MATRICES) == one)
        )
        for one in (True, False)
    )
    found = read_options(name).factors(stream.totals, Size(None, math.inf, (matrices, rest)))
    for tensor, tau in models[0].items():
        read = merged[tensor] * found[0 if tensor in MATRICES else 1]
        assert distance(read, tau, [tau]) < bound(name, [tau] if tensor in MATRICES else ()), tensor


@given(models=model_lists())
@settings(max_examples=12, deadline=None)
def test_float64_statistics_are_exact(models: Models) -> None:
    stream = Stream("gram", grams="float64")
    for model in models:
        stream.fold(model)
    solved, flowed = BATCH["gram"](models, MATRICES), BATCH["flow"](models, MATRICES)
    for name in MATRICES:
        found, other = gram.solve(stream.kept[name], 0.1, 0.0), flow.flowed(stream.kept[name], flow.FlowOptions())
        assert distance(found, solved[name].reshape(found.shape)) < 1e-10, name
        assert distance(other, flowed[name].reshape(found.shape)) < 1e-10, name


@pytest.mark.parametrize("side", gram.SIDES)
@pytest.mark.parametrize("start", flow.STARTS)
@given(models=model_lists(), time=st.sampled_from([0.3, 3.0, 30.0]), top=st.sampled_from([0.3, 1.0]))
@settings(max_examples=4, deadline=None)
def test_flow_stops_where_its_options_say(
    side: gram.Side, start: flow.Start, models: Models, time: float, top: float
) -> None:
    stream = Stream("flow", side=side, start=start, time=time, top=top)
    for model in models:
        stream.fold(model)
    expected = batch.flow(models, MATRICES, side, time, top, start)
    for tensor, found in stream.read().items():
        assert distance(found, expected[tensor], [model[tensor] for model in models]) < 1e-5, tensor


@pytest.mark.parametrize("name", FOLDING)
@given(models=model_lists())
@settings(max_examples=5, deadline=None)
def test_size_is_constant_from_the_first_fold_on(name: str, models: Models) -> None:
    stream = Stream(name)
    for model in models:
        stream.fold(model)
        for tensor, spec in SPECS.items():
            slots = stream.rule.slots(spec)
            kept = {s: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for s, v in stream.kept[tensor].items()}
            assert kept == {s: (slot.shape, slot.dtype) for s, slot in slots.items()}
            if stream.rule.fold.elementwise(spec):
                assert all(slot.shape == spec.shape for slot in slots.values())


@pytest.mark.parametrize("name", [n for n in FOLDING if rule(n).laws.order_free])
@given(models=model_lists(), seed=st.randoms())
@settings(max_examples=8, deadline=None)
def test_order_of_the_models_does_not_matter_where_that_is_claimed(name: str, models: Models, seed: object) -> None:
    shuffled = list(models)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = Stream(name), Stream(name)
    for a, b in zip(models, shuffled, strict=True):
        one.fold(a)
        other.fold(b)
    for tensor, found in one.read().items():
        folded = [model[tensor] for model in models]
        assert distance(other.read()[tensor], found, folded) < bound(name, folded if tensor in MATRICES else ()), tensor


@pytest.mark.parametrize("name", FOLDING)
@given(models=model_lists())
@settings(max_examples=5, deadline=None)
def test_order_of_the_tensors_does_not_matter(name: str, models: Models) -> None:
    one, other = Stream(name), Stream(name)
    for model in models:
        one.fold(model)
        other.fold(model, order=tuple(reversed(SHAPES)))
    assert one.totals == other.totals
    assert all(torch.equal(found, other.read()[tensor]) for tensor, found in one.read().items())


@pytest.mark.parametrize("name", [n for n in FOLDING if rule(n).laws.combine])
@given(models=model_lists(), data=st.data())
@settings(max_examples=8, deadline=None)
def test_unfolding_is_as_if_it_had_never_been_folded(name: str, models: Models, data: st.DataObject) -> None:
    out = data.draw(st.integers(0, len(models) - 1))
    stream, without = Stream(name), Stream(name)
    for model in models:
        stream.fold(model)
    stream.fold(models[out], weight=-1.0)
    for model in models[:out] + models[out + 1 :]:
        without.fold(model)
    for tensor, expected in without.read().items():
        scale = max(float(model[tensor].double().norm()) for model in models)
        assert float((stream.read()[tensor].double() - expected.double()).norm()) <= 1e-4 * scale, tensor
    for model in models[:out] + models[out + 1 :]:
        stream.fold(model, weight=-1.0)
    assert not any(bool(value.any()) for kept in stream.kept.values() for value in kept.values()), (
        "none left is exact zero"
    )
    assert not any(stream.totals.body().values())


@pytest.mark.parametrize("name", [n for n in RULES if not rule(n).laws.combine])
def test_the_others_refuse_a_weight(name: str) -> None:
    with pytest.raises(Misconfigured, match="unfolded"):
        Stream(name).fold({n: torch.ones(s) for n, s in SHAPES.items()}, weight=-1.0)


@pytest.mark.parametrize("name", [n for n in RULES if rule(n).read.size(Totals()).length is not None])
@given(models=model_lists())
@settings(max_examples=5, deadline=None)
def test_the_totals_know_how_long_the_merge_is_where_the_rule_says_so(name: str, models: Models) -> None:
    stream = Stream(name)
    for model in models:
        stream.fold(model)
        read = [stream.rule.read.unit(SPECS[tensor], stream.kept[tensor], stream.totals) for tensor in SHAPES]
        length = math.sqrt(math.fsum(float(value.double().square().sum()) for value in read))
        assert stream.rule.read.size(stream.totals).length == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("name", ["task-arithmetic+", *FOLDING])
@given(models=model_lists(), run=st.integers(1, 40))
@settings(max_examples=5, deadline=None)
def test_runs_of_a_tensor_fold_as_the_whole(name: str, models: Models, run: int) -> None:
    made = rule(name) if name in FOLDING else rule("task-arithmetic", {"before": ["drop:rate=0.5", "trim:density=0.7"]})
    measured = [measure(made, model) for model in models]
    for tensor in ("bias", "stack", "tall"):
        spec = SPECS[tensor]
        if not made.fold.elementwise(spec):
            continue
        whole = {s: torch.zeros(slot.shape, dtype=getattr(torch, slot.dtype)) for s, slot in made.slots(spec).items()}
        parts = {s: value.clone() for s, value in whole.items()}
        for model, found in zip(models, measured, strict=True):
            flat = model[tensor].reshape(-1)
            shipped = batch.moments_of(flat) if made.needs.shipped else None
            inputs = Inputs(spec, seed=batch.seed_of(tensor, flat), measured=found)
            given = inputs._replace(moments=None if shipped is None else shipped.view(model[tensor].shape))
            whole = made.fold.apply(whole, model[tensor].clone(), given, Totals()).accumulators
            for i in range(0, len(flat), run):
                piece = {s: value.view(-1)[i : i + run].clone() for s, value in parts.items()}
                given = inputs._replace(start=i, moments=None if shipped is None else shipped[i : i + run])
                for s, value in made.fold.apply(piece, flat[i : i + run].clone(), given, Totals()).accumulators.items():
                    parts[s].view(-1)[i : i + run] = value
        assert all(torch.equal(parts[s], value) for s, value in whole.items())


@pytest.mark.parametrize("name", RULES)
def test_reading_before_the_first_fold_is_zero(name: str) -> None:
    assert not any(bool(tensor.any()) for tensor in Stream(name).read().values())


@given(
    models=model_lists(),
    density=st.sampled_from([0.05, 0.2, 0.5, 0.999, 1.0]),
    trim=st.sampled_from(["model", "tensor"]),
)
@settings(max_examples=20, deadline=None)
def test_ties_at_every_density_over_the_model_and_per_tensor(models: Models, density: float, trim: str) -> None:
    stream = Stream("ties", density=density, trim=trim)
    for step in range(1, len(models) + 1):
        stream.fold(models[step - 1])
        merged, expected = stream.read(), batch.ties(models[:step], MATRICES, density, trim)
        for tensor in SHAPES:
            folded = [model[tensor] for model in models[:step]]
            assert distance(merged[tensor], expected[tensor], folded) < 1e-5, (tensor, step)


def test_ties_reads_a_draw_as_zero() -> None:
    model = {n: torch.full(s, 0.3) for n, s in SHAPES.items()}
    stream = Stream("ties", density=1.0)
    stream.fold(model)
    stream.fold({n: -t for n, t in model.items()})
    assert not any(bool(t.any()) for t in stream.read().values())


@pytest.mark.parametrize("density", [0.01, 0.2, 0.73])
@pytest.mark.parametrize("kind", ["cubed", "sorted", "zeros", "steps", "tiny"])
def test_the_measured_threshold_is_the_exact_one(density: float, kind: str) -> None:
    """Also where a sample misleads (sorted values), most are zero, few values occur, or all are subnormal."""
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(2)) ** 3
    if kind == "sorted":
        values = values.sort().values
    elif kind == "zeros":
        values[torch.arange(len(values)) % 50 != 0] = 0.0
    elif kind == "steps":
        values = values.bfloat16().float().round(decimals=1)
    elif kind == "tiny":
        values = values * 1e-41
    made = rule("ties", {"density": density})
    found: object = made.needs.measure
    while isinstance(found, Pass):
        counts, share = np.zeros(found.bins, np.int64), found.share
        for part in values.split(999):
            some = part if share == 1.0 else part[: int(share * len(part))]
            found.tally(some, Inputs(SPECS["bias"]), counts, round(1 / share))
        found = found.conclude(counts, len(values))
    assert isinstance(found, trimming.Threshold)
    assert found.value == float(values.abs().sort(descending=True).values[int(density * len(values)) - 1])


def test_magmax_takes_the_positive_one_of_equal_magnitudes() -> None:
    model = {n: torch.full(s, 0.5) for n, s in SHAPES.items()}
    opposite = {n: -t for n, t in model.items()}
    for order in ((model, opposite), (opposite, model)):
        stream = Stream("magmax")
        for one in order:
            stream.fold(one)
        assert torch.equal(stream.kept["bias"]["sum"], model["bias"])


def test_beyond_p_models_tsv_m_keeps_one_triplet_of_those_that_are_largest_with_their_weights() -> None:
    stream, random = Stream("tsv-m"), torch.Generator().manual_seed(1)
    p = min(SHAPES["wide"])
    models = [
        {n: (i % 7 + 1) * 0.01 * torch.randn(s, generator=random) for n, s in SHAPES.items()} for i in range(p + 6)
    ]
    weights = [1.0 + 3 * (i % 3) for i in range(p + 6)]
    for model, weight in zip(models, weights, strict=True):
        stream.fold(model, weight)
    lengths = [w * float(torch.linalg.matrix_norm(m["wide"], 2)) for m, w in zip(models, weights, strict=True)]
    largest = sorted(lengths, reverse=True)[:p]
    found = sorted(stream.kept["wide"]["sigma"].tolist(), reverse=True)
    assert found == pytest.approx(largest, rel=1e-5)
    assert len(set(stream.kept["wide"]["owner"].tolist())) == p
