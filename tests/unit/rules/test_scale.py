"""How long the merged task vector is made: the laws as formulas, their texts, and the largest singular value that
`spread` stands on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual import linalg
from continual.errors import Misconfigured
from continual.records import MatrixTotals, TensorSpec, Totals
from continual.rules import RULES, ReadOptions, Size, TermFactors, read_options

TOTALS = Totals(count=4.0, norm_sum=8.0, matrices=MatrixTotals(6.0, 2.0, 12.0))


def factors(text: str, size: Size, totals: Totals = TOTALS) -> tuple[float, float]:
    """Of the matrices and of the rest."""
    return ReadOptions.parse(text).factors(totals, size)[:2]


def test_norm_is_the_papers_law_at_one_and_is_held_beyond() -> None:
    mean_norm, length = 2.0, 5.0
    assert factors("norm", Size(length)) == pytest.approx((mean_norm / length,) * 2)
    assert factors("norm:1.5", Size(length)) == pytest.approx((1.5 * mean_norm / length,) * 2)
    assert factors("norm:9", Size(length)) == pytest.approx((4 * mean_norm / length,) * 2), (
        "no longer than four task vectors end to end"
    )
    assert factors("norm:9", Size(length, most=1.0)) == (1.0, 1.0), "no longer than the plain sum, where X is one"
    assert factors("norm", Size(0.5, most=1.0)) == pytest.approx((4.0, 4.0)), "the paper's law also where it enlarges"
    assert factors("norm:3", Size(5.0), Totals(count=1.0, norm_sum=2.0)) == pytest.approx((0.4, 0.4)), (
        "one model is as long as it was"
    )


def test_spread_scales_matrices_by_how_many_directions_they_lie_in_and_the_rest_by_its_own_length() -> None:
    spread = 12.0 / 6.0  # the mean of rho, weighted by the norms
    matrices, rest = factors("spread:1.15", Size(None, 4.0, (3.0, 0.25)))
    assert matrices == pytest.approx(1.15 * spread**1.5 * (6.0 / 4) / 3.0)
    assert rest == pytest.approx((2.0 / 4) / 0.25)
    assert factors("spread:1.15", Size(None, 1.5, (3.0, 0.25)))[1] == 1.5, "no longer than the plain sum"
    assert factors("spread", Size(None, 4.0, (0.0, 0.0))) == (0.0, 0.0), "nothing there"


def test_what_sees_pixels_is_the_mean_however_long_the_rest_is_made() -> None:
    totals, spread = replace(TOTALS, weight=4.0), ReadOptions("spread")
    patches = TensorSpec("patch_embed.proj.weight", (8, 3, 4, 4), "F32", "plain")
    other = replace(patches, shape=(8, 4, 4, 4))
    of_mean, of_sum = (spread.factors(totals, Size(None, most, (3.0, 0.125))) for most in (4.0, 1.0))
    assert (of_mean.of(patches, matrix=False), of_mean.of(other, matrix=False)) == (1.0, 4.0)
    assert (of_sum.of(patches, matrix=False), of_sum.of(other, matrix=False)) == (0.25, 1.0), "X is the sum"
    assert of_mean.of(patches, matrix=True) == of_mean.matrices, "as a rule was told by its globs"
    assert of_mean.of(replace(patches, kind="matrix"), matrix=True) == of_mean.matrices, "as an earlier state has it"
    short = spread.factors(totals, Size(None, 4.0, (3.0, 2.0)))
    assert short.of(patches, matrix=False) == short.rest == 0.25, "nor longer than the rest"
    for text in ("norm", "number:0.5"[7:]):
        assert len(set(ReadOptions.parse(text).factors(totals, Size(2.0, 4.0)))) == 1


def test_one_model_alone_is_as_long_as_it_is() -> None:
    one = Totals(count=1.0, norm_sum=8.0, matrices=MatrixTotals(6.0, 2.0, 12.0))
    assert factors("spread:1.15", Size(None, 1.0, (6.0, 2.0)), one) == pytest.approx((1.0, 1.0))
    assert factors("spread:0.1", Size(None, 4.0, (3.0, 0.5)), one) == pytest.approx((2.0, 4.0))


def totals_of(models: Sequence[tuple[float, float]]) -> Totals:
    """Of models by ρ and ‖τ‖ over the matrices; over the rest they are half as long."""
    each = tuple(MatrixTotals(norm, norm / 2, rho * norm) for rho, norm in models)
    return Totals(float(len(each)), matrices=MatrixTotals(*map(math.fsum, zip(*each, strict=True))), each=each)


def long(models: Sequence[tuple[float, float]], *, by_each: bool = True) -> tuple[float, float]:
    """How long `spread:1` makes the matrices and the rest."""
    found = totals_of(models)
    return factors("spread", Size(None, math.inf, (1.0, 1.0)), found if by_each else replace(found, each=()))


ALIKE = st.lists(st.floats(1.0, 1.3), min_size=3, max_size=24)
"""Models of one kind, all of one norm: ρ, up to a common factor."""
ANY = st.tuples(st.floats(1.0, 1e4), st.sampled_from([0.0]) | st.floats(1e-12, 1e12))


@given(ALIKE, ANY, ANY, st.sampled_from([1.0, 3.0]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_one_model_of_any_kind_among_four_or_more_hardly_changes_the_length(
    alike: list[float], one: tuple[float, float], other: tuple[float, float], rho: float, norm: float
) -> None:
    others = [(rho * each, norm) for each in alike]
    for before, after in zip(long([*others, one]), long([other, *others]), strict=True):
        assert max(before, after) <= 1.3 * min(before, after)


@settings(max_examples=50)
@given(ALIKE, st.floats(1.0, 1e4), st.randoms(use_true_random=False))
def test_models_of_one_kind_are_as_long_as_their_mean_says_in_any_order(
    alike: list[float], rho: float, random: Random
) -> None:
    models = [(rho, 2.0), *((rho * each, 2.0) for each in alike)]
    assert long(models) == pytest.approx(long(models, by_each=False), rel=0.01)
    assert long(random.sample(models, len(models))) == long(models)


def test_the_length_is_a_mean_held_near_the_median_from_four_models_on_that_are_all_known() -> None:
    odd = [(1.0, 1.0), (1.0, 1.0), (4.0, 1.0), (1.0, 1.0)]
    assert long(odd) == pytest.approx(((3 + 1.5) / 4, 0.5))
    assert long([*odd[:2], (1.0, 9.0), odd[3]]) == pytest.approx(((3 + 1.5) / 4, (3 + 1.5) / 8)), "of both parts"
    assert long([(1.0, 0.0), *odd[:2], (1.0, 1.0)])[0] == pytest.approx((3 + 1 / 1.5) / 4), "one that has nothing"
    assert long([(1.0, 0.0)] * 3 + odd[:1]) == pytest.approx((1 / 4, 1 / 8)), "most have nothing: the mean"
    for models in (odd[1:], odd[2:]):
        assert long(models) == long(models, by_each=False), "too few to tell which is the odd one"
    some = totals_of(odd)
    known = replace(some, each=some.each[1:])
    assert factors("spread", Size(None, 4.0, (1.0, 1.0)), known)[0] == pytest.approx((7 / 4) ** 1.5), "one is not known"


def test_few_models_have_no_room_for_many_directions() -> None:
    two = [(1.4, 2.0), (1.4, 1.0)]
    assert long(two)[0] == pytest.approx(1.4**1.5 * 1.5), "short of it nothing holds them"
    wide = [(4.0, 2.0), (1.0, 1.0)]
    assert long(wide)[0] == pytest.approx(2**0.75 * 1.5)
    longer = factors("spread:3", Size(None, math.inf, (1.0, 1.0)), totals_of(wide))[0]
    assert longer == pytest.approx(3 * 2**0.75 * 1.5), "the number counts in full"
    assert long([(4.0, 1.0)] * 4) == pytest.approx((4**0.75, 0.5)), "what is no matrix has a law of its own"
    assert long([(4.0, 1.0)] * 3 + [(4.0, 1e6)])[0] == pytest.approx(4**0.75 * 4.5 / 4), "one odd model makes no room"
    assert long([(4.0, 1.0)] * 16)[0] == long([(4.0, 1.0)] * 99)[0] == pytest.approx(8.0), "from there on ρ alone"


def test_folds_that_measured_no_spread_are_not_read_as_nothing() -> None:
    with pytest.raises(Misconfigured, match="norm or a number"):
        factors("spread", Size(None, 1.0, (3.0, 0.25)), Totals(count=2.0, norm_sum=3.0))


@pytest.mark.parametrize("text", ["norm", "spread", "norm:2"])
def test_before_the_first_fold_nothing_is_read(text: str) -> None:
    assert factors(text, Size(0.0, 1.0, (0.0, 0.0)), Totals()) == (0.0, 0.0)


@pytest.mark.parametrize("text", ["norm:1.0", "spread:1.15", "0.3", "-1.0"])
def test_texts_are_read_back(text: str) -> None:
    options = ReadOptions.parse(text)
    assert options.scale == text
    assert ReadOptions.from_mapping(options.to_mapping()) == options


@pytest.mark.parametrize(
    "text",
    [
        "big",
        "1e300",
        "norm:1e40",
        "norm:",
        "norm:x",
        "spread:-1",
        "norm:0",
        "nan",
        "number",
        "number:1",
        "spread:inf",
        "",
    ],
)
def test_what_is_no_scale_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(Misconfigured, match=r"spread|above 0|at most 1e.30"):
        ReadOptions.parse(text)


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_has_a_default_and_its_papers_scale(name: str) -> None:
    row = RULES[name]
    assert read_options(name) == read_options(name, "auto") == row.read
    assert read_options(name, "paper") == (row.published or row.read)
    assert read_options(name, "norm:2") == ReadOptions("norm", 2.0)
    if row.spectral:
        assert read_options(name, "spread:2").policy == "spread"
    else:
        with pytest.raises(Misconfigured, match=rf"{name} treats every tensor alike"):
            read_options(name, "spread")


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_the_largest_singular_value_is_found_from_below(rows: int, columns: int, seed: int, size: float) -> None:
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=random) * size
    exact = float(torch.linalg.svdvals(matrix.double())[0])
    found = linalg.top(matrix)
    assert 0.93 * exact <= found <= exact * (1 + 1e-4)


def test_the_largest_singular_value_of_low_rank_empty_and_zero_matrices() -> None:
    random = torch.Generator().manual_seed(0)
    low = torch.randn(200, 3, generator=random) @ torch.randn(3, 300, generator=random)
    assert math.isclose(linalg.top(low), float(torch.linalg.svdvals(low.double())[0]), rel_tol=1e-5)
    assert linalg.top(torch.zeros(5, 7)) == 0.0
    assert linalg.top(torch.zeros(0, 7)) == 0.0


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_three_steps_come_near_the_largest_singular_value_of_noise(shape: tuple[int, int]) -> None:
    """Where the singular values crowd at the top; two steps would be 4.5 % below."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert 0.965 < linalg.top(noise) / float(torch.linalg.svdvals(noise.double())[0]) < 1.0


def test_layers_are_scaled_by_their_depth() -> None:
    options = ReadOptions("number", 1.0, (0.25, 2.0))
    depths = [options.layer(TensorSpec("w", (2, 2), "F32", "matrix", depth)) for depth in (0.0, 0.5, 1.0)]
    assert depths == [0.25, 1.25, 2.25]
    assert ReadOptions("number", 1.0).layer(TensorSpec("w", (2, 2), "F32", "matrix", 0.5)) == 1.0


def test_layers_are_scaled_by_their_coefficients_and_all_experts_of_a_layer_alike() -> None:
    found = ReadOptions("number", lines=(0.5, 1.0), layers=(("a.experts.*.up", 3.0), ("a.weight", 0.5), ("stack", 2.0)))
    names = ("a.weight", "b.weight", "stack", "stack[7]", "a.experts.12.up", "a.experts.3.down", "a.weigh", "zzz")
    factors = [found.layer(TensorSpec(name, (2, 2), "F32", "matrix", depth=0.5)) for name in names]
    assert factors == [0.5, 1.0, 2.0, 2.0, 3.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"policy": "norm"}, "expected the keys policy, value"),
        ({"policy": "norm", "value": 1.0, "more": 1}, "expected the keys policy, value"),
        ({"policy": "most", "value": 1.0}, "unknown policy 'most'"),
        ({"policy": "norm", "value": "1"}, "'1' is no finite number"),
        ({"policy": "norm", "value": True}, "True is no finite number"),
        ({"policy": "number", "value": math.inf}, "inf is no finite number"),
        ({"policy": "norm", "value": 0.0}, "has to be above 0"),
        ({"policy": "norm", "value": 1.0, "lines": [1.0]}, "write two numbers"),
        ({"policy": "norm", "value": 1.0, "lines": "11"}, "write two numbers"),
        ({"policy": "norm", "value": 1.0, "lines": [1.0, math.nan]}, "write two numbers"),
        ({"policy": "norm", "value": 1.0, "weights": [1.0]}, "no table of numbers"),
        ({"policy": "norm", "value": 1.0, "weights": {"a": "1"}}, "no table of numbers"),
        ({"policy": "norm", "value": 1.0, "weights": {"a": 0.0}}, "no number above 0"),
        ({"policy": "norm", "value": 1.0, "layers": {"a": None}}, "layers = .* is no table of numbers"),
        ({"policy": "norm", "value": 1.0, "layers": {"a": -1.0}}, "coefficient of a: -1.0 is no number above 0"),
        ({"policy": "norm", "value": 1.0, "terms": [1.0]}, "terms = .* is no table of layers and models"),
        ({"policy": "norm", "value": 1.0, "terms": {"layers": [1], "models": {}}}, "names of layers"),
        ({"policy": "norm", "value": 1.0, "terms": {"layers": ["a"], "models": {"m": ["1"]}}}, "no list of numbers"),
        ({"policy": "norm", "value": 1.0, "terms": {"layers": ["a"], "models": {"m": []}}}, "0 coefficients for 1"),
        ({"policy": "norm", "value": 1.0, "terms": {"layers": ["a"], "models": {"m": [0.0]}}}, "of m is 0.0"),
    ],
)
def test_a_record_that_is_no_scale_is_refused(body: dict[str, object], words: str) -> None:
    with pytest.raises(Misconfigured, match=words):
        ReadOptions.from_mapping(body)


def test_a_record_gives_back_what_it_was_made_of() -> None:
    options = ReadOptions("spread", 1.5, (0.25, 2.0))
    assert options.to_mapping() == {"policy": "spread", "value": 1.5, "lines": [0.25, 2.0]}
    assert ReadOptions.from_mapping(options.to_mapping()) == options
    assert str(options) == "spread:1.5, lines 0.25:2"
    weighed = ReadOptions("number", 1.0, weights=(("a", 0.5), ("b", 2.0)))
    assert weighed.to_mapping()["weights"] == {"a": 0.5, "b": 2.0}
    assert ReadOptions.from_mapping(weighed.to_mapping()) == weighed
    assert str(weighed) == "1.0, weights of 2 models"
    layered = replace(weighed, layers=(("a", 0.5), ("b", 2.0), ("c", 3.0)))
    assert ReadOptions.from_mapping(layered.to_mapping()) == layered
    assert str(layered) == "1.0, weights of 2 models, coefficients of 3 layers"
    apart = replace(weighed, terms=TermFactors(("x", "y"), (("a", (0.5, 2.0)), ("b", (1.0, 3.0)))))
    assert ReadOptions.from_mapping(apart.to_mapping()) == apart
    assert str(apart) == "1.0, weights of 2 models, coefficients of 2 models in 2 layers"
    assert apart.terms.of("b") == {"x": 1.0, "y": 3.0}
    assert apart.terms.of("c") == {}
    more = apart.terms.times({("a", "y"): 3.0, ("c", "w"): 0.25})
    assert more.layers == ("w", "x", "y")
    assert more.models == (("a", (1.0, 0.5, 6.0)), ("b", (1.0, 1.0, 3.0)), ("c", (0.25, 1.0, 1.0)))


def test_options_of_a_state_that_are_no_scale_are_named() -> None:
    with pytest.raises(Misconfigured) as wrong:
        ReadOptions.from_mapping({"value": 1.0, "other": 2, "more": 3})
    assert (
        str(wrong.value)
        == "scale: expected the keys policy, value and perhaps lines, rule, weights, layers and terms, got more, "
        "other, value"
    )
    with pytest.raises(Misconfigured, match="got none"):
        ReadOptions.from_mapping({})
