"""The laws of every rule in the registry: streaming is the batch form at every step, sizes are constant, and what a rule claims of order and unfolding holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from continual.errors import Misconfigured
from continual.records import TensorSpec
from continual.rules import RULES, Inputs, Rule, gram, opcm, read_options, rule, together
from tests import batch
from tests.batch import BATCH

SHAPES = {
    "tall": (24, 9),
    "wide": (8, 21),
    "square": (12, 12),
    "conv": (10, 3, 2, 2),
    "stack": (3, 4, 5),
    "bias": (11,),
    "scalar": (),
    "empty": (0, 4),
}
MATRICES = {"tall", "wide", "square", "conv"}
SPECS = {n: TensorSpec(n, s, "F32", "matrix" if n in MATRICES else "plain") for n, s in SHAPES.items()}
Model = dict[str, Tensor]


def measure(made: Rule, model: Model) -> dict[str, float]:
    """The passes before a fold, as the engine makes them: over what the model changes, in runs."""
    found: dict[str, float] = {}
    for number in range(made.measure.passes if made.measure else 0):
        assert made.measure is not None
        share = made.measure.share(number, found)
        if share == 0.0:
            continue
        parts = [(n, i, run) for n, tau in model.items() if tau.any() for i, run in enumerate(tau.clone().reshape(-1).split(7))]
        runs = [(n, i, run if share == 1.0 else run[:1]) for n, i, run in parts]
        tallies = [
            made.measure.tally(number, run, Inputs(SPECS[n], seed=batch.seed_of(n, model[n]), measured=found, start=7 * i))
            * (1 if share == 1.0 else 7)
            for n, i, run in runs
        ]
        counts = torch.stack(tallies).sum(0)
        found = made.measure.conclude(number, counts, sum(tau.numel() for tau in model.values()), found)
    return found


class Stream:
    """A rule driven as the engine does, tensors in any order."""

    def __init__(self, name: str, **options: object) -> None:
        self.name, self.rule, self.options = name, rule(name, options), read_options(name)
        self.totals: dict[str, float] = {}
        self.kept = {
            n: {slot: torch.from_numpy(np.zeros(s.shape, s.dtype)) for slot, s in self.rule.slots(spec).items()}
            for n, spec in SPECS.items()
        }

    def fold(self, model: Model, weight: float = 1.0, order: Sequence[str] = tuple(SHAPES)) -> None:
        sums, measured = {}, measure(self.rule, model)
        for name in order:
            tau = model[name]
            moments = batch.moments_of(tau) if self.rule.shipped else None
            inputs = Inputs(SPECS[name], weight, batch.seed_of(name, tau), measured, moments=moments)
            folded = self.rule.fold(self.kept[name], tau.clone(), inputs, self.totals)
            sums[name] = folded.sums
            # what is untouched keeps its files: a zero task vector must change nothing
            self.kept[name] = folded.accumulators
        self.totals = self.rule.settle(self.totals, {k: math.fsum(s[k] for s in sums.values()) for k in sums["bias"]}, weight)

    def read(self) -> Model:
        found = {n: self.rule.read(SPECS[n], self.kept[n], self.totals, self.options) for n in SHAPES}
        assert all(t.dtype == torch.float32 and t.shape == SHAPES[n] for n, t in found.items())
        return found


class Models(list[Model]):
    """Fine-tunes that are printed by how they were made, not by their values."""

    made = ""

    def __repr__(self) -> str:
        return self.made


@st.composite
def model_lists(draw: st.DrawFn) -> Models:
    """Up to five fine-tunes: dense ones, of low rank like adapters, ones that leave tensors alone, and twins."""
    seed = draw(st.integers(0, 10_000))
    kinds = draw(st.lists(st.sampled_from(["dense", "low-rank", "partial", "twin"]), min_size=1, max_size=5))
    random = torch.Generator().manual_seed(seed)
    found = Models()
    found.made = f"models({seed}, {kinds})"
    for kind in kinds:
        if kind == "twin" and found:
            found.append(found[-1])
            continue
        model = {}
        for name, shape in SHAPES.items():
            tau = 0.01 * torch.randn(shape, generator=random)
            if kind == "low-rank" and name in MATRICES:
                rows, columns = shape[0], tau.numel() // shape[0]
                tau = (0.02 * torch.randn(rows, 2, generator=random) @ torch.randn(2, columns, generator=random)).reshape(shape)
            if kind == "partial" and name in ("tall", "conv", "bias"):
                tau = torch.zeros(shape)
            model[name] = tau
        found.append(model)
    return found


def distance(found: Tensor, expected: Tensor, given: Sequence[Tensor] = ()) -> float:
    """Frobenius distance relative to the larger of what is expected and of the task vectors `given`: where these cancel, float32 leaves their rounding."""
    length = max(float(tensor.double().norm()) for tensor in (expected, *given))
    return float((found.double() - expected.double()).norm()) / length if length else float(found.double().norm())


def bound(name: str, folded: Sequence[Tensor] = ()) -> float:
    """1e-5, and where a rule's result is no smoother function of the float32 state than that, what the state allows.

    opcm 1e-4: which directions lie in the block is as sharp as the gap between two singular values, and those of twins can be close.
    iso-c and tsv-m: a polar factor moves by the rounding over the smallest singular value that it keeps.
    """
    if name == "opcm":
        return 1e-4
    return (
        max(1e-5, 4e-7 * max((batch.condition(part) for part in batch.POLAR[name](folded)), default=1.0)) if name in batch.POLAR else 1e-5
    )


def test_every_rule_has_a_batch_form() -> None:
    assert RULES.keys() == BATCH.keys(), "write the paper's form in tests/batch.py"


@pytest.mark.parametrize("name", RULES)
@given(models=model_lists())
@settings(max_examples=25, deadline=None)
def test_streaming_is_the_batch_form_at_every_step(name: str, models: Models) -> None:
    stream = Stream(name)
    for step in range(1, len(models) + 1):
        stream.fold(models[step - 1])
        merged, expected = stream.read(), BATCH[name](models[:step], MATRICES)
        for tensor in SHAPES:
            folded = [model[tensor] for model in models[:step]]
            within = bound(name, folded if tensor in MATRICES else ())
            assert distance(merged[tensor], expected[tensor], folded) < within, (tensor, step)


@given(models=model_lists())
@settings(max_examples=25, deadline=None)
def test_float64_statistics_are_exact(models: Models) -> None:
    stream = Stream("gram")
    for model in models:
        stream.fold(model)
    expected = BATCH["gram"](models, MATRICES)
    for name in MATRICES:
        found = gram.solve(stream.kept[name], 0.1, 0.0)
        assert distance(found, expected[name].reshape(found.shape)) < 1e-10, name


@pytest.mark.parametrize("name", RULES)
@given(models=model_lists())
@settings(max_examples=10, deadline=None)
def test_size_is_constant_from_the_first_fold_on(name: str, models: Models) -> None:
    stream = Stream(name)
    for model in models:
        stream.fold(model)
        for tensor, spec in SPECS.items():
            slots = stream.rule.slots(spec)
            kept = {s: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for s, v in stream.kept[tensor].items()}
            assert kept == {s: (slot.shape, slot.dtype) for s, slot in slots.items()}
            if stream.rule.elementwise(spec):
                assert all(slot.shape == spec.shape for slot in slots.values())


@pytest.mark.parametrize("name", [n for n, row in RULES.items() if row.order_free])
@given(models=model_lists(), seed=st.randoms())
@settings(max_examples=15, deadline=None)
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


@pytest.mark.parametrize("name", RULES)
@given(models=model_lists())
@settings(max_examples=5, deadline=None)
def test_order_of_the_tensors_does_not_matter(name: str, models: Models) -> None:
    one, other = Stream(name), Stream(name)
    for model in models:
        one.fold(model)
        other.fold(model, order=tuple(reversed(SHAPES)))
    assert one.totals == other.totals
    assert all(torch.equal(found, other.read()[tensor]) for tensor, found in one.read().items())


@pytest.mark.parametrize("name", [n for n in RULES if rule(n).combine])
@given(models=model_lists(), data=st.data())
@settings(max_examples=15, deadline=None)
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
    assert not any(bool(value.any()) for kept in stream.kept.values() for value in kept.values()), "none left is exact zero"
    assert not any(stream.totals.values())


@pytest.mark.parametrize("name", [n for n in RULES if not rule(n).combine])
def test_the_others_refuse_a_weight(name: str) -> None:
    with pytest.raises(Misconfigured, match="unfolded"):
        Stream(name).fold({n: torch.ones(s) for n, s in SHAPES.items()}, weight=-1.0)


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
@settings(max_examples=15, deadline=None)
def test_a_chain_is_its_rule_on_transformed_models(name: str, before: list[str], models: Models) -> None:
    stream = Stream(name, before=before)
    stream.options = read_options(name)
    for step in range(1, len(models) + 1):
        stream.fold(models[step - 1])
        changed = [batch.transformed(model, before) for model in models[:step]]
        merged, expected = (
            stream.read(),
            BATCH[name](changed, MATRICES) if name != "fisher" else batch.fisher(changed, MATRICES, models[:step]),
        )
        for tensor in SHAPES:
            folded = [model[tensor].float() for model in changed]
            assert distance(merged[tensor], expected[tensor], folded) < bound(name, folded if tensor in MATRICES else ()), (tensor, step)


@pytest.mark.parametrize("name", [n for n in RULES if rule(n).combine])
@given(models=model_lists(), data=st.data())
@settings(max_examples=15, deadline=None)
def test_two_states_combined_are_one_that_folded_all(name: str, models: Models, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(models)))
    whole, one, other = Stream(name), Stream(name), Stream(name)
    for number, model in enumerate(models):
        whole.fold(model)
        (one if number < cut else other).fold(model)
    totals = together(one.totals, other.totals)
    assert one.rule.combine is not None
    merged_sq = {n: one.rule.combine(one.kept[n], other.kept[n], totals) for n in SHAPES}
    one.totals = totals | {"merged_sq": math.fsum(merged_sq.values())}
    assert one.totals == pytest.approx(whole.totals, rel=1e-5, abs=1e-12)
    found = one.read()
    for tensor, expected in whole.read().items():
        folded = [model[tensor] for model in models]
        assert distance(found[tensor], expected, folded) < bound(name, folded if tensor in MATRICES else ()), tensor


@pytest.mark.parametrize("name", [n for n in RULES if rule(n).weighted])
@given(models=model_lists(), weight=st.sampled_from([2, 3]))
@settings(max_examples=10, deadline=None)
def test_a_weight_of_two_is_folding_twice(name: str, models: Models, weight: int) -> None:
    heavy, often = Stream(name), Stream(name)
    for model in models:
        heavy.fold(model, weight=float(weight))
        for _ in range(weight):
            often.fold(model)
    assert heavy.totals["weight"] == often.totals["weight"]
    for slot in heavy.kept["tall"]:
        for tensor in SHAPES:
            if slot in heavy.kept[tensor]:
                folded = [weight * model[tensor] for model in models]
                assert distance(heavy.kept[tensor][slot], often.kept[tensor][slot], folded) < 1e-5, (tensor, slot)


@given(models=model_lists())
@settings(max_examples=15, deadline=None)
def test_a_model_without_moments_for_a_tensor_weighs_nothing_there(models: Models) -> None:
    stream = Stream("fisher")
    for model in models:
        stream.fold(model)
    kept = {slot: value.clone() for slot, value in stream.kept["tall"].items()}
    after = stream.rule.fold(stream.kept["tall"], torch.zeros(SHAPES["tall"]), Inputs(SPECS["tall"]), stream.totals).accumulators
    assert all(torch.equal(after[slot], value) for slot, value in kept.items())


@pytest.mark.parametrize("variant", opcm.VARIANTS)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
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


@pytest.mark.parametrize("name", ["task-arithmetic+", *RULES])
@given(models=model_lists(), run=st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_runs_of_a_tensor_fold_as_the_whole(name: str, models: Models, run: int) -> None:
    made = rule(name) if name in RULES else rule("task-arithmetic", {"before": ["drop:rate=0.5", "trim:density=0.7"]})
    for tensor in ("bias", "stack", "tall"):
        spec = SPECS[tensor]
        if not made.elementwise(spec):
            continue
        whole = {s: torch.zeros(slot.shape, dtype=getattr(torch, slot.dtype)) for s, slot in made.slots(spec).items()}
        parts = {s: value.clone() for s, value in whole.items()}
        for model in models:
            flat = model[tensor].reshape(-1)
            shipped = batch.moments_of(flat) if made.shipped else None
            inputs = Inputs(spec, seed=batch.seed_of(tensor, flat), measured=measure(made, model))
            given = inputs._replace(moments=None if shipped is None else shipped.view(model[tensor].shape))
            whole = made.fold(whole, model[tensor].clone(), given, {}).accumulators
            for i in range(0, len(flat), run):
                piece = {s: value.view(-1)[i : i + run].clone() for s, value in parts.items()}
                given = inputs._replace(start=i, moments=None if shipped is None else shipped[i : i + run])
                for s, value in made.fold(piece, flat[i : i + run].clone(), given, {}).accumulators.items():
                    parts[s].view(-1)[i : i + run] = value
        assert all(torch.equal(parts[s], value) for s, value in whole.items())


@pytest.mark.parametrize("name", RULES)
def test_reading_before_the_first_fold_is_zero(name: str) -> None:
    assert not any(bool(tensor.any()) for tensor in Stream(name).read().values())


@given(models=model_lists(), density=st.sampled_from([0.05, 0.2, 0.5, 0.999, 1.0]), trim=st.sampled_from(["model", "tensor"]))
@settings(max_examples=40, deadline=None)
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
    found: dict[str, float] = {}
    for number in range(4):
        assert made.measure is not None
        share = made.measure.share(number, found)
        parts = [part if share == 1.0 else part[: int(share * len(part))] for part in values.split(999)]
        if share == 0.0:
            continue
        stands_for = 1 if share == 1.0 else round(1 / share)
        counts = torch.stack([made.measure.tally(number, part, Inputs(SPECS["bias"], measured=found)) * stands_for for part in parts]).sum(
            0
        )
        found = made.measure.conclude(number, counts, len(values), found)
    assert found["threshold"] == float(values.abs().sort(descending=True).values[int(density * len(values)) - 1])


def test_magmax_takes_the_positive_one_of_equal_magnitudes() -> None:
    model = {n: torch.full(s, 0.5) for n, s in SHAPES.items()}
    opposite = {n: -t for n, t in model.items()}
    for order in ((model, opposite), (opposite, model)):
        stream = Stream("magmax")
        for one in order:
            stream.fold(one)
        assert torch.equal(stream.kept["bias"]["sum"], model["bias"])


def test_beyond_p_models_tsv_m_keeps_one_triplet_of_the_largest() -> None:
    stream, random = Stream("tsv-m"), torch.Generator().manual_seed(1)
    p = min(SHAPES["wide"])
    models = [{n: (i % 7 + 1) * 0.01 * torch.randn(s, generator=random) for n, s in SHAPES.items()} for i in range(p + 6)]
    for model in models:
        stream.fold(model)
    largest = sorted((float(torch.linalg.matrix_norm(m["wide"], 2)) for m in models), reverse=True)[:p]
    found = sorted(stream.kept["wide"]["sigma"].tolist(), reverse=True)
    assert found == pytest.approx(largest, rel=1e-5)
    assert len(set(stream.kept["wide"]["owner"].tolist())) == p
