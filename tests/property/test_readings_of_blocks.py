"""The laws of the readings of blocks: every rule reads what its paper computes from all the task vectors at once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from continual.blocks import Merged, elements
from continual.blocks.shelf import stacked
from continual.errors import Misconfigured
from continual.records import TensorSpec, Totals
from continual.rules import (
    RULES,
    Inputs,
    ReadOptions,
    Rule,
    Size,
    Sums,
    figures_of,
    flow,
    gram,
    opcm,
    read_options,
    rule,
    settle,
)
from tests.helpers import batch, triplets
from tests.helpers.batch import BATCH
from tests.helpers.shelves import MATRICES, REGIMES, SHAPES, SPECS, HeldLayers, Regime, adapters, dense, shelf
from tests.helpers.streams import FOLDING, distance

pytestmark = pytest.mark.slow

READABLE = [name for name in RULES if name != "fisher"]
FACTORED = [name for name in READABLE if rule(name).factored]


def within(name: str, models: list[dict[str, torch.Tensor]], tensor: str) -> float:
    """1e-5, and where a polar factor moves by the rounding over the smallest singular value that it keeps, that."""
    if name not in batch.POLAR or tensor not in MATRICES:
        return 1e-5
    folded = [model[tensor] for model in models]
    return max(1e-5, 3e-7 * max(batch.condition(part) for part in batch.POLAR[name](folded)))


def agree(held: HeldLayers, name: str, numbers: list[int], matrices: set[str] = MATRICES, **options: object) -> None:
    """The reading of these models is the batch form of their blocks."""
    models = dense(held, numbers)
    merged = Merged(held, dict.fromkeys(numbers, 1.0), rule(name, options), read_options(name, "paper"))
    merged.settle()
    expected = BATCH[name](models, matrices)
    for tensor in held.specs:
        given = [model[tensor] for model in models]
        found = merged.dense(tensor)
        assert found.shape == SHAPES[tensor]
        assert found.dtype == torch.float32
        assert distance(found, expected[tensor], given) < within(name, models, tensor), (tensor, len(numbers))


@pytest.mark.parametrize(
    ("name", "regime"),
    [
        (name, regime)
        for name in READABLE
        for regime in (REGIMES if name in FACTORED and name in FOLDING else ("mixed", "twins", "zero"))
    ]
    + [("tsv-even", "shared")],
)
def test_a_reading_is_the_batch_form_at_every_step_before_and_after_cuts(name: str, regime: Regime) -> None:
    given = adapters(regime, 9)
    for step in (1, 4, 9):  # at 24 columns and rank 3, up to 8 models are whole
        held = shelf(given[:step])
        agree(held, name, list(range(1, step + 1)))
    for layer in held.layers.values():
        assert layer.columns.used <= 24


def read_densely(
    held: HeldLayers, chosen: dict[int, float], made: Rule, options: ReadOptions
) -> dict[str, torch.Tensor]:
    """The same task vectors folded as full fine-tunes are, by the rule itself."""
    totals, each = Totals(), []
    kept = {
        n: {s: torch.zeros(one.shape, dtype=getattr(torch, one.dtype)) for s, one in made.slots(spec).items()}
        for n, spec in held.specs.items()
    }
    for model, weight in zip(dense(held, list(chosen)), chosen.values(), strict=True):
        sums = []
        for n, spec in held.specs.items():
            folded = made.fold.apply(kept[n], model[n].float(), Inputs(spec, weight), totals)
            kept[n] = folded.accumulators
            sums.append(folded.sums)
        totals = settle(totals, Sums.total(sums), weight)
        each.append(figures_of(Sums.total(sums)))
    units = {n: made.read.unit(spec, kept[n], totals) for n, spec in held.specs.items()}
    matrix = {n: made.read.matrix is not None and made.read.matrix(spec) for n, spec in held.specs.items()}
    parts = tuple(
        math.sqrt(sum(float(x.double().square().sum()) for n, x in units.items() if matrix[n] is wanted))
        for wanted in (True, False)
    )
    size = Size(math.hypot(*parts), made.read.size(totals).most, (parts[0], parts[1]))
    factors = options.factors(replace(totals, each=tuple(mine for mine in each if mine)), size)
    return {n: x * (factors[0 if matrix[n] else 1] * options.layer(held.specs[n])) for n, x in units.items()}


@pytest.mark.parametrize(
    ("name", "regime"),
    [(name, regime) for name in triplets.WEIGHTED for regime in (REGIMES if name == "tsv-m" else ("mixed", "twins"))],
)
def test_triplets_with_weights_read_as_the_batch_form_with_weights(name: str, regime: Regime) -> None:
    chosen = {2: 0.5, 1: 2.5, 5: 1.0, 4: 1e-3}
    held = shelf(adapters(regime, 5))
    merged = Merged(held, chosen, rule(name), read_options(name, "paper"))
    models = dense(held, list(chosen))
    expected = batch.weighted(name, models, MATRICES, list(chosen.values()))
    for tensor, found in expected.items():
        given = [model[tensor] for model in models]
        assert distance(merged.dense(tensor), found, given) < 2.5 * within(name, models, tensor), tensor


SCALES = ["0.4", "norm:2.5", "spread:1.15"]


@pytest.mark.parametrize(
    ("name", "scale"),
    [(name, scale) for name in (*FACTORED, "magmax") for scale in (SCALES if name in FOLDING else SCALES[-1:])],
)
def test_every_scale_gives_what_a_dense_state_of_the_same_models_gives(name: str, scale: str) -> None:
    if scale.startswith("spread") and rule(name).read.matrix is None:
        return
    options = read_options(name, scale, "0.5:1.5")
    weighted = rule(name).laws.weighted
    chosen = {1: 1.0, 4: 2.5 if weighted else 1.0, 2: 0.5 if weighted else 1.0, 3: 1.0}
    mixed = adapters("partial", 4)
    mixed[2] = {tensor: (4 * left, right) for tensor, (left, right) in mixed[2].items()}  # one that `spread` holds
    held = shelf(mixed)
    expected = read_densely(held, chosen, rule(name), options)
    merged = Merged(held, chosen, rule(name), options)
    merged.settle()
    models = dense(held, list(chosen))
    for tensor, found in expected.items():
        given = [model[tensor] for model in models]
        assert distance(merged.dense(tensor), found, given) < 2 * within(name, models, tensor), tensor
        if merged.factored:
            thin = merged.thin(tensor)
            assert thin.square == pytest.approx(float(found.double().square().sum()), rel=1e-4, abs=1e-12)
            assert thin.left.norm(dim=0).tolist() == pytest.approx(thin.right.norm(dim=0).tolist(), rel=1e-4)


@pytest.mark.parametrize("name", READABLE)
def test_a_subset_reads_as_a_shelf_that_only_ever_saw_it(name: str) -> None:
    given = adapters("mixed", 6, rank=2)
    held = shelf(given, q=24)
    assert not any(sum(layer.columns.lost().values()) for layer in held.layers.values())
    numbers = [2, 3, 5]
    only = shelf([given[number - 1] for number in numbers])
    options = read_options(name, "norm:1.5")
    some = Merged(held, dict.fromkeys(numbers, 1.0), rule(name), options)
    alone = Merged(only, dict.fromkeys([1, 2, 3], 1.0), rule(name), options)
    assert some.settle() == pytest.approx(alone.settle(), rel=1e-6)
    assert some.totals == alone.totals
    for tensor in SPECS:
        assert distance(some.dense(tensor), alone.dense(tensor)) < 1e-6


@pytest.mark.parametrize("name", [name for name in READABLE if rule(name).laws.order_free])
def test_the_order_of_the_chosen_does_not_matter_where_the_rule_says_so(name: str) -> None:
    held = shelf(adapters("mixed", 5, rank=2))
    options = read_options(name, "norm:1.5")
    one = Merged(held, dict.fromkeys([1, 2, 3, 4, 5], 1.0), rule(name), options)
    other = Merged(held, dict.fromkeys([4, 1, 5, 3, 2], 1.0), rule(name), options)
    assert one.settle() == pytest.approx(other.settle(), rel=1e-5)
    for tensor in SPECS:
        assert distance(one.dense(tensor), other.dense(tensor)) < 1e-5


def test_opcm_goes_by_the_order_of_the_chosen() -> None:
    held = shelf(adapters("independent", 3))
    for order in ([1, 2, 3], [3, 1, 2]):
        agree(held, "opcm", order)
    found = [
        Merged(held, dict.fromkeys(order, 1.0), rule("opcm"), ReadOptions("number")).dense("tall")
        for order in ([1, 2, 3], [3, 1, 2])
    ]
    assert distance(*found) > 1e-3


@pytest.mark.parametrize("variant", opcm.VARIANTS)
def test_every_variant_of_opcm_is_that_of_a_dense_state(variant: opcm.Variant) -> None:
    """One step of block+diagonal: two routes of it drift apart by themselves."""
    chosen = dict.fromkeys([1, 2] if variant == "block+diagonal" else [1, 2, 3, 4], 1.0)
    held, made = shelf(adapters("independent", 4)), rule("opcm", {"variant": variant})
    merged = Merged(held, chosen, made, ReadOptions("number"))
    for tensor, expected in read_densely(held, chosen, made, ReadOptions("number")).items():
        assert distance(merged.dense(tensor), expected) < 1e-5, tensor


@pytest.mark.parametrize("side", gram.SIDES)
@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_the_ridge_of_gram_is_that_of_the_whole_matrix(side: gram.Side, pull: float) -> None:
    held = shelf(adapters("shared", 3))
    chosen = dict.fromkeys([1, 2, 3], 1.0)
    of_the_whole(held, chosen, rule("gram", {"side": side, "pull": pull, "ridge": 0.03}))


@pytest.mark.parametrize("side", gram.SIDES)
@pytest.mark.parametrize("start", flow.STARTS)
def test_the_mean_and_the_share_of_eigenvalues_of_flow_are_those_of_the_whole_matrix(
    side: gram.Side, start: flow.Start
) -> None:
    held = shelf(adapters("independent", 3))
    chosen = {1: 2.0, 2: 1.0, 3: 0.3}
    of_the_whole(held, chosen, rule("flow", {"side": side, "start": start, "time": 2.0, "top": 0.1}))


def of_the_whole(held: HeldLayers, chosen: dict[int, float], made: Rule) -> None:
    merged = Merged(held, chosen, made, ReadOptions("number"))
    models = dense(held, list(chosen))
    for tensor, expected in read_densely(held, chosen, made, ReadOptions("number")).items():
        assert distance(merged.dense(tensor), expected, [model[tensor] for model in models]) < 1e-5, tensor


@pytest.mark.parametrize("name", [name for name in FACTORED if "include" in RULES[name].declared])
def test_a_table_that_is_included_reads_as_a_matrix(name: str) -> None:
    held = shelf(adapters("independent", 3))
    agree(held, name, [1, 2, 3], MATRICES | {"table"}, include=["tab*"])


@pytest.mark.parametrize("name", FACTORED)
def test_a_model_alone_is_itself_under_the_rules_that_are_sums(name: str) -> None:
    given = adapters("mixed", 4)
    held = shelf(given, q=12)
    merged = Merged(held, {3: 1.0}, rule(name), ReadOptions("number"))
    for tensor, block in ((tensor, layer.block(3)) for tensor, layer in held.layers.items()):
        assert torch.equal(stacked(held, tensor, [3]).block(0).u, block.u)
        if rule(name).factored.linear(SPECS[tensor]):  # type: ignore[union-attr]
            thin = merged.thin(tensor)
            assert thin.left.shape[1] == len(block.sigma)
            assert distance(thin.left @ thin.right.mT, block.dense()) < 3e-7


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("rank", [1, 4, 50])
def test_a_reading_of_lower_rank_is_the_best_one_and_says_what_it_lost(name: str, rank: int) -> None:
    held = shelf(adapters("mixed", 5))
    merged = Merged(held, dict.fromkeys([1, 2, 3, 4, 5], 1.0), rule(name), ReadOptions("number", -0.7))
    for tensor in SPECS:
        thin, whole = merged.thin(tensor, rank), merged.dense(tensor).flatten(1).double()
        sigma = torch.linalg.svdvals(whole)
        assert thin.left.shape[1] <= max(rank, len(sigma)) or rank == 50
        rest = float(sigma[rank:].square().sum())
        assert float((whole - thin.left @ thin.right.mT).square().sum()) == pytest.approx(rest, rel=1e-4, abs=1e-10)
        assert thin.error == pytest.approx(math.sqrt(rest / float(sigma.square().sum())), abs=1e-5)


@pytest.mark.parametrize("name", READABLE)
def test_high_ranks_beside_low_ones_and_a_rank_above_the_width(name: str) -> None:
    specs = {"layer": TensorSpec("layer", (150, 130), "F32", "matrix")}
    random = torch.Generator().manual_seed(3)
    given = [
        {"layer": (torch.randn(150, r, generator=random), torch.randn(130, r, generator=random))}
        for r in (1, 64, 512, 16)
    ]
    for q in (130, 40):
        held = shelf(given, q, specs)
        models = dense(held, [1, 2, 3, 4])
        merged = Merged(held, dict.fromkeys([1, 2, 3, 4], 1.0), rule(name), read_options(name, "paper"))
        merged.settle()
        expected = BATCH[name](models, {"layer"})["layer"]
        bound = 1e-4 if name == "opcm" else 1e-5
        assert distance(merged.dense("layer"), expected, [model["layer"] for model in models]) < bound


@pytest.mark.parametrize("before", [["trim:density=0.3"], ["trim:density=0.4:over=tensor"]])
@pytest.mark.parametrize("name", ["task-arithmetic", "iso-c", "ties"])
def test_transforms_before_a_rule_are_read_densely(name: str, before: list[str]) -> None:
    if name == "ties" and "tensor" in before[0]:
        return
    held = shelf(adapters("independent", 3))
    merged = Merged(held, dict.fromkeys([1, 2, 3], 1.0), rule(name, {"before": before}), read_options(name, "paper"))
    assert not merged.factored
    models = dense(held, [1, 2, 3])
    changed = [batch.transformed({n: x.float() for n, x in model.items()}, before) for model in models]
    expected = BATCH[name](changed, MATRICES)
    for tensor in SPECS:
        given = [model[tensor] for model in changed]
        assert distance(merged.dense(tensor), expected[tensor], given) < 1e-5, tensor


def test_what_is_dropped_depends_on_the_model_and_the_layer_and_not_on_the_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = shelf(adapters("independent", 2))
    made = rule("task-arithmetic", {"before": ["drop:rate=0.5"]})

    def read() -> dict[str, torch.Tensor]:
        merged = Merged(held, {1: 1.0, 2: 1.0}, made, ReadOptions("number"))
        return {tensor: merged.dense(tensor) for tensor in SPECS}

    whole = read()
    monkeypatch.setattr(elements, "PIECE", 100)
    assert all(torch.equal(whole[tensor], found) for tensor, found in read().items())
    kept = [float((found != 0).double().mean()) for found in whole.values()]
    assert all(0.65 < share < 0.85 for share in kept), "an element is zero where both models drop it: a quarter"


@pytest.mark.parametrize("name", ["ties", "magmax"])
def test_pieces_of_a_tensor_read_as_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = shelf(adapters("mixed", 4))

    def read() -> dict[str, torch.Tensor]:
        merged = Merged(held, dict.fromkeys([1, 2, 3, 4], 1.0), rule(name), ReadOptions("number"))
        return {tensor: merged.dense(tensor) for tensor in SPECS}

    whole = read()
    monkeypatch.setattr(elements, "PIECE", 100)
    for tensor, found in read().items():
        assert distance(found, whole[tensor]) < 1e-6


@pytest.mark.parametrize(
    ("name", "chosen", "said"),
    [
        ("fisher", {1: 1.0}, "fisher.safetensors"),
        ("opcm", {1: 2.0}, "opcm reads every model with weight 1, not 2"),
        ("ties", {1: 0.5}, "with weight 1"),
        ("mean", {1: -1.0}, "above 0"),
        ("mean", {1: 0.0}, "leave it out"),
        ("iso-c", {1: 1e40}, "from 1e-30 to 1e.30"),
        ("mean", {1: math.nan}, "above 0"),
    ],
)
def test_what_cannot_be_read_is_said(name: str, chosen: dict[int, float], said: str) -> None:
    with pytest.raises(Misconfigured, match=said):
        Merged(shelf(adapters("independent", 1)), chosen, rule(name), ReadOptions("number"))


@pytest.mark.parametrize("name", READABLE)
def test_nobody_chosen_reads_zero(name: str) -> None:
    merged = Merged(shelf(adapters("independent", 2)), {}, rule(name), read_options(name))
    merged.settle()
    for tensor in SPECS:
        assert not merged.dense(tensor).any()
        assert merged.square(tensor) == 0.0


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("name", FACTORED)
def test_models_that_are_nearly_twins_read_as_their_batch(name: str, apart: float) -> None:
    (given,) = adapters("independent", 1)
    random = torch.Generator().manual_seed(5)
    other = {n: (left + apart * torch.randn(left.shape, generator=random), right) for n, (left, right) in given.items()}
    agree(shelf([given, other]), name, [1, 2])
