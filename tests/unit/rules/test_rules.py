"""Single rules where a small example says more than a property: options, limits, and what is reported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from continual.errors import Misconfigured
from continual.records import SlotSpec, TensorSpec, Totals
from continual.rules import (
    RULES,
    Inputs,
    Rule,
    Sums,
    Triplets,
    esm,
    gram,
    gram_less,
    gram_sums,
    iso_cts,
    matrices,
    opcm,
    rule,
)
from tests.helpers import batch

MATRIX = TensorSpec("w", (12, 8), "F32", "matrix")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def zeros(made: Rule, spec: TensorSpec) -> dict[str, Tensor]:
    return {name: torch.zeros(slot.shape, dtype=getattr(torch, slot.dtype)) for name, slot in made.slots(spec).items()}


@pytest.mark.parametrize("name", ["ties", "tsv-m"])
def test_a_rule_that_counts_in_16_bits_says_so_when_they_are_full(name: str) -> None:
    made, tau = rule(name, {"density": 1.0} if name == "ties" else {}), randn(12, 8)
    made.fold.apply(zeros(made, MATRIX), tau.clone(), Inputs(MATRIX), Totals(count=65534.0))
    with pytest.raises(Misconfigured, match="65535 fine-tunes are the most"):
        made.fold.apply(zeros(made, MATRIX), tau.clone(), Inputs(MATRIX), Totals(count=65535.0))
    combine = made.laws.combine
    if combine is not None:
        combine(zeros(made, MATRIX), zeros(made, MATRIX), Totals(count=65535.0))
        with pytest.raises(Misconfigured, match="65535 fine-tunes are the most"):
            combine(zeros(made, MATRIX), zeros(made, MATRIX), Totals(count=65536.0))


def test_ties_takes_no_other_weight() -> None:
    made = rule("ties", {"density": 1.0})
    with pytest.raises(Misconfigured, match="weight 1, or -1 to take it out, not 2"):
        made.fold.apply(zeros(made, MATRIX), randn(12, 8), Inputs(MATRIX, weight=2.0), Totals())


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_fisher_raises_what_is_shipped_to_the_power(power: float) -> None:
    made, spec = rule("fisher", {"power": power}), TensorSpec("b", (5,), "F32", "plain")
    kept, taus, moments = (
        zeros(made, spec),
        [randn(5, seed=1), randn(5, seed=2)],
        [randn(5, seed=3).abs(), torch.ones(5)],
    )
    for tau, shipped in zip(taus, moments, strict=True):
        kept = made.fold.apply(kept, tau.clone(), Inputs(spec, moments=shipped), Totals()).accumulators
    weights = [shipped.double() ** power for shipped in moments]
    expected = sum(w * t.double() for w, t in zip(weights, taus, strict=True)) / sum(weights)
    assert torch.allclose(made.read.unit(spec, kept, Totals()).double(), expected, rtol=1e-6)


def test_where_no_fine_tune_weighs_any_more_fisher_keeps_exact_zeros() -> None:
    """Not what rounding left; where another fine-tune weighs nothing changes."""
    made, spec = rule("fisher"), TensorSpec("b", (2,), "F32", "plain")
    stays, leaves = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0])
    kept = made.fold.apply(zeros(made, spec), torch.ones(2), Inputs(spec, moments=stays), Totals()).accumulators
    for size, weight in ((1.0, 1.0), (1e-12, 1.0), (1.0, -1.0), (1e-12, -1.0)):  # in float64 1 + 1e-12 - 1 ≠ 1e-12
        given = Inputs(spec, weight, moments=leaves)
        kept = made.fold.apply(kept, torch.full((2,), size), given, Totals(count=3.0, weight=3.0)).accumulators
    assert {slot: value.tolist() for slot, value in kept.items()} == {"sum": [0.0, 1.0], "weight": [0.0, 1.0]}


@pytest.mark.parametrize("name", [name for name in RULES if rule(name).laws.combine])
@pytest.mark.parametrize("spec", [MATRIX, TensorSpec("w", (12, 8), "F32", "plain")], ids=lambda spec: spec.kind)
def test_taking_the_last_one_out_says_that_nothing_is_left(name: str, spec: TensorSpec) -> None:
    made = rule(name, {"density": 1.0} if name == "ties" else {})
    kept = zeros(made, spec)
    for seed, weight, count in ((1, 1.0, 0), (2, 1.0, 1), (1, -1.0, 2), (2, -1.0, 1)):
        moments = randn(12, 8, seed=seed).square() if made.needs.shipped else None
        totals = Totals(count=float(count), weight=float(count))
        folded = made.fold.apply(kept, randn(12, 8, seed=seed), Inputs(spec, weight, moments=moments), totals)
        kept = folded.accumulators
        assert (folded.sums.merged_sq == 0.0) is (weight < 0 and count == 1), "what rounding left is nothing"
    assert not any(bool(value.any()) for value in kept.values())


def test_a_sum_that_is_only_rounding_elects_nobody() -> None:
    made, spec = rule("ties", {"density": 1.0}), TensorSpec("b", (3,), "F32", "plain")
    kept = zeros(made, spec)
    for values in ([0.1, 0.1, 0.1], [0.6, 0.6, 0.6], [-0.7, -0.6, -0.75]):
        kept = made.fold.apply(kept, torch.tensor(values), Inputs(spec), Totals()).accumulators
    total = kept["plus"] + kept["minus"]
    assert 0 < abs(float(total[0])) < 1e-6, "0.1 + 0.6 and 0.7 are not the same float32 number"
    assert torch.allclose(made.read.unit(spec, kept, Totals()), torch.tensor([0.0, 0.35, -0.75]))


@pytest.mark.parametrize("side", gram.SIDES)
@pytest.mark.parametrize("pull", [0.0, 1.0, 0.3])
def test_gram_pulls_to_a_multiple_of_the_sum(side: gram.Side, pull: float) -> None:
    """τ_R = (B + εcS)(A + εI)⁻¹ and the same on transposes, by dense inverses."""
    made = rule("gram", {"side": side, "pull": pull, "ridge": 0.2})
    kept, taus = zeros(made, MATRIX), [randn(12, 8, seed=1), randn(12, 8, seed=2)]
    for tau in taus:
        kept = made.fold.apply(kept, tau.clone(), Inputs(MATRIX), Totals()).accumulators
    exact = [tau.double() for tau in taus]
    target = sum(t @ t.mT @ t / t.square().sum() for t in exact)
    total = exact[0] + exact[1]
    right, left = (
        sum(p / t.square().sum() for p, t in zip(ps, exact, strict=True))
        for ps in ([t.mT @ t for t in exact], [t @ t.mT for t in exact])
    )
    found = []
    if side != "left":
        epsilon = 0.2 * float(right.diagonal().mean())
        found.append((target + epsilon * pull * total) @ torch.linalg.inv(right + epsilon * torch.eye(8)))
    if side != "right":
        epsilon = 0.2 * float(left.diagonal().mean())
        found.append(torch.linalg.inv(left + epsilon * torch.eye(12)) @ (target + epsilon * pull * total))
    expected = sum(found) / len(found)
    assert torch.allclose(made.read.unit(MATRIX, kept, Totals(count=2.0)).double(), expected, atol=1e-6)
    assert set(kept) == {"cross", *(["right"] if side != "left" else []), *(["left"] if side != "right" else [])} | (
        {"sum"} if pull else set()
    )


@pytest.mark.parametrize("grams", gram_sums.GRAMS)
def test_where_no_model_is_left_that_changed_a_tensor_gram_keeps_exact_zeros(grams: gram_sums.Grams) -> None:
    """Though others are left that did not change it."""
    made, totals = rule("gram", {"grams": grams}), Totals(count=3.0, weight=3.0)
    kept, taus = zeros(made, MATRIX), [randn(12, 8, seed=seed) for seed in range(2)]
    for tau, weight in ((taus[0], 1.0), (taus[1], 3e-3), (taus[0], -1.0)):
        kept = made.fold.apply(kept, tau.clone(), Inputs(MATRIX, weight), totals).accumulators
    assert float(kept["cross"].norm()) > 1e-3, "the other one is left"
    kept = made.fold.apply(kept, taus[1].clone(), Inputs(MATRIX, -3e-3), totals).accumulators
    assert not any(bool(value.any()) for value in kept.values())


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_half_of_a_gram_is_kept_and_comes_back(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_sums, "_ROWS", 3)
    gram = randn(n, n, seed=3)
    gram = (gram + gram.mT).double()
    packed = torch.zeros((n + 1) // 2, n + 1)
    for scale in (1.0, 0.5):
        gram_sums.add_packed(packed, lambda one, other: gram[one, other], scale)
    assert int((packed != 0).sum()) == n * (n + 1) // 2
    assert torch.allclose(gram_sums.unpack(packed), 1.5 * gram.tril(), atol=1e-7)


@pytest.mark.parametrize("time", [0.1, 5.0, 1000.0])
def test_what_flow_makes_of_an_eigenvalue_is_nearly_four_resolvents(time: float) -> None:
    values = torch.cat([torch.zeros(1), torch.logspace(-6, 6, 2001)]).double()
    found = sum(((weight / (values + pole)).real for pole, weight in gram_less.flow(time)), torch.zeros(2002))
    expected = torch.where(values > 0, -torch.expm1(-time * values) / values.clamp(min=1e-300), time)
    assert float((found / expected - 1).abs().max()) < 4e-7


def test_opcm_reports_what_it_cut_and_what_it_kept() -> None:
    made = rule("opcm", {"alpha": 0.6})
    kept, low = zeros(made, MATRIX), randn(12, 3, seed=1) @ randn(3, 8, seed=2)
    first = made.fold.apply(kept, low.clone(), Inputs(MATRIX), Totals())
    assert first.notes == {"r": 0.0, "kept": pytest.approx(1.0), "rank": 0.0}
    tau = randn(12, 8, seed=3)
    second = made.fold.apply(first.accumulators, tau.clone(), Inputs(MATRIX), Totals())
    share = torch.linalg.svdvals(low.double()).cumsum(0)
    r = int((share <= 0.6 * share[-1]).sum())
    c = batch.opcm_step(low, tau, 0.6, "block")
    kept_share = float(c.square().sum() / tau.double().square().sum())
    assert second.notes == {"r": float(r), "kept": pytest.approx(kept_share, rel=1e-5), "rank": 3.0}
    untouched = made.fold.apply(second.accumulators, torch.zeros(12, 8), Inputs(MATRIX), Totals())
    assert untouched.notes == {}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 0.999999])
def test_opcm_leaves_the_crossing_direction_and_null_ones_out_of_the_block(alpha: float) -> None:
    """cumsum(σ) of four equal ones is exactly α·Σσ at 0.5 and 0.75: those do not cross."""
    sigma = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert opcm.cut(sigma, alpha) == {0.0: 0, 0.5: 2, 0.75: 3, 0.999999: 3}[alpha]
    assert opcm.cut(torch.tensor([1.0, 0.0], dtype=torch.float64), 0.0) == 0


def test_what_is_a_matrix() -> None:
    found = matrices.is_matrix(["emb*", "empty"])
    specs = {
        "w": ((3, 4), "matrix", True),
        "conv": ((3, 4, 2, 2), "matrix", True),
        "embed": ((3, 4), "plain", True),
        "bias": ((4,), "plain", False),
        "emb_bias": ((4,), "plain", False),
        "empty": ((0, 4), "plain", False),
        "Emb": ((3, 4), "plain", False),
    }
    for name, (shape, kind, expected) in specs.items():
        assert found(TensorSpec(name, shape, "F32", kind)) is expected, name  # type: ignore[arg-type]


def test_the_sums_of_a_matrix_have_its_largest_singular_value() -> None:
    tau = randn(12, 8)
    for name in ("iso-c", "opcm", "tsv-m", "gram"):
        made = rule(name)
        sums = made.fold.apply(zeros(made, MATRIX), tau.clone(), Inputs(MATRIX), Totals()).sums
        top = float(torch.linalg.svdvals(tau.double())[0])
        assert sums.matrix_sq == pytest.approx(float(tau.double().square().sum()), rel=1e-6)
        assert 0.9 * top**2 <= sums.top_sq <= top**2 * (1 + 1e-6)
        plain = TensorSpec("w", (12, 8), "F32", "plain")
        bare = made.fold.apply(zeros(made, plain), tau.clone(), Inputs(plain), Totals()).sums
        assert (bare.matrix_sq, bare.top_sq) == (None, None)


def test_a_number_that_is_not_finite_is_in_the_sums_of_every_rule() -> None:
    tau = randn(12, 8)
    tau[3, 3] = float("inf")
    for name in ("iso-c", "mean", "magmax"):
        made = rule(name)
        sums: Sums = made.fold.apply(zeros(made, MATRIX), tau.clone(), Inputs(MATRIX), Totals()).sums
        assert not torch.isfinite(torch.tensor(sums.tau_sq))


def test_a_rule_keeps_one_sum_unless_it_says_otherwise() -> None:
    assert rule("mean").slots(MATRIX) == rule("iso-c").slots(MATRIX) == {"sum": SlotSpec((12, 8))}


def test_fisher_without_its_last_fine_tune_has_exact_zeros_whatever_rounding_left() -> None:
    made, spec = rule("fisher"), TensorSpec("b", (2,), "F32", "plain")
    kept = {slot: torch.full((2,), 1e-17, dtype=torch.float64) for slot in made.slots(spec)}
    given = Inputs(spec, -1.0, moments=torch.zeros(2))
    left = made.fold.apply(kept, torch.zeros(2), given, Totals(count=1.0, weight=1.0)).accumulators
    assert all(not value.any() for value in left.values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"trim": "model"}, True), ({"trim": "tensor"}, False), ({"trim": "tensor", "density": 1.0}, True)],
)
def test_ties_holds_a_tensor_whole_only_where_its_own_threshold_is_wanted(
    options: dict[str, object], expected: bool
) -> None:
    assert rule("ties", options).fold.elementwise(MATRIX) is expected


def test_every_fine_tune_has_as_many_directions_of_its_own() -> None:
    """As the paper's code counts them: 0.8 of 768 for 8 tasks leave 19 for each; of few, no more than there are."""
    assert iso_cts.shares(768, 8, 0.8) == (768 - 8 * 19, 19)
    assert iso_cts.shares(3, 3, 0.1) == (0, 1)
    assert iso_cts.shares(3, 5, 0.1) == (3, 0)
    assert iso_cts.shares(10, 1, 1.0) == (10, 0)


def test_weights_of_columns_say_what_stays() -> None:
    """Of two columns that lean to each other the strong one keeps its direction; with no weights both give way."""
    u, v = torch.eye(4, dtype=torch.float64)[:, :2], torch.eye(5, dtype=torch.float64)[:, :2].clone()
    v[:, 1] = torch.tensor([0.6, 0.8, 0.0, 0.0, 0.0])
    given = Triplets([1, 2], u, torch.tensor([1.0, 0.1], dtype=torch.float64), v)
    moved = {power: (esm.weighed(given, power)[1] - v).norm(dim=0).tolist() for power in (0.0, 3.0)}
    assert moved[0.0][0] == pytest.approx(moved[0.0][1])
    assert moved[3.0][0] < 1e-3
    assert moved[3.0][1] > moved[0.0][1]
    assert float((esm.weighed(given, 16.0)[1] - esm.weighed(given, 3.0)[1]).abs().max()) < 1e-12, "1e-3 at least"
