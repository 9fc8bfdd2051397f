"""What a reading says of its models is what leaving each of them out gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from continual.blocks import Explaining, Merged, ModelShare
from continual.records import TensorSpec
from continual.rules import RULES, Rule, read_options, rule
from tests.helpers.shelves import SPECS, HeldLayers, Regime, adapters, dense, shelf
from tests.helpers.streams import FOLDING

pytestmark = pytest.mark.slow

READABLE = [name for name in RULES if name != "fisher"]


def read(held: HeldLayers, chosen: dict[int, float], name: str, scale: str) -> dict[str, Tensor]:
    merged = Merged(held, chosen, rule(name), read_options(name, scale, "0.5:1"))
    merged.settle()
    return {tensor: merged.dense(tensor).double() for tensor in SPECS}


def share(taus: list[Tensor], index: int, weights: list[float], whole: Tensor, rest: Tensor) -> ModelShare:
    lengths = [weight * float(tau.norm()) for weight, tau in zip(weights, taus, strict=True)]
    both = float(taus[index].norm() * whole.norm())
    return ModelShare(
        lengths[index] / sum(lengths),
        float((taus[index] * whole).sum()) / both if both else 0.0,
        float((whole - rest).norm() / whole.norm()) if bool(whole.any()) else 0.0,
    )


@pytest.mark.parametrize(
    ("name", "regime"),
    [(n, r) for n in READABLE for r in ("mixed", "shared", "twins", "partial") if n in FOLDING or r == "mixed"],
)
def test_shares_are_what_leaving_out_gives(name: str, regime: Regime) -> None:
    held = shelf(adapters(regime, 4, rank=2))
    scale = "spread:1.15" if rule(name).read.matrix is not None else "norm:1.5"
    chosen = {number: float(number) if rule(name).laws.weighted else 1.0 for number in (1, 2, 4)}
    weights = list(chosen.values())
    found = Explaining(Merged(held, chosen, rule(name), read_options(name, scale, "0.5:1"))).shares()
    models, whole = dense(held, list(chosen)), read(held, chosen, name, scale)
    # X is as smooth a function of the models as the contract suite says; a difference is the less so
    near = 3e-4
    for index, number in enumerate(chosen):
        rest = read(held, {other: w for other, w in chosen.items() if other != number}, name, scale)
        for tensor in SPECS:
            taus = [model[tensor] for model in models]
            if not bool(taus[index].any()):
                assert number not in found.layers[tensor]
                continue
            expected = share(taus, index, weights, whole[tensor], rest[tensor])
            assert found.layers[tensor][number] == pytest.approx(expected, abs=near), (tensor, number)
        flat = [torch.cat([model[tensor].flatten() for tensor in SPECS]) for model in models]
        both = [torch.cat([read[tensor].flatten() for tensor in SPECS]) for read in (whole, rest)]
        # the scales of the parts differ, so the cosine is taken with the merged vector as it is read
        assert found.whole[number] == pytest.approx(share(flat, index, weights, *both), abs=near), number
    assert math.fsum(one.norm for one in found.whole.values()) == pytest.approx(1.0)


def test_a_model_alone_is_all_there_is() -> None:
    held = shelf(adapters("independent", 2))
    found = Explaining(Merged(held, {2: 1.0}, rule("task-arithmetic"), read_options("mean"))).shares()
    assert found.whole == {2: pytest.approx(ModelShare(1.0, 1.0, 1.0))}
    assert all(one == {2: pytest.approx(ModelShare(1.0, 1.0, 1.0))} for one in found.layers.values())


@pytest.mark.parametrize("name", READABLE)
def test_nobody_has_nothing(name: str) -> None:
    found = Explaining(Merged(shelf([]), {}, rule(name), read_options(name))).shares()
    assert (found.whole, found.layers) == ({}, {})


@pytest.mark.parametrize("name", ["mean", "iso-c", "tsv-m"])
def test_a_model_that_is_zero_has_no_share(name: str) -> None:
    held = shelf(adapters("zero", 3))
    found = Explaining(Merged(held, dict.fromkeys([1, 2, 3], 1.0), rule(name), read_options(name))).shares()
    assert sorted(found.whole) == [1, 2, 3]
    assert found.whole[2][:2] == (0.0, 0.0)


def plainly(name: str, **options: object) -> Rule:
    """The rule without its quicker way: models are left out by reading again."""
    made = rule(name, options)
    assert made.factored is not None
    assert made.factored.without is not None
    return made._replace(factored=made.factored._replace(without=None))


CASES: list[tuple[str, dict[str, object], str]] = [
    *(("iso-c", {}, kind) for kind in ("independent", "shared", "twins", "cut")),
    *(("tsv-m", {}, kind) for kind in ("independent", "shared", "twins", "cut")),
    *(("tsv-even", {}, kind) for kind in ("independent", "shared", "twins", "cut")),
    *(("tsv-u", {}, kind) for kind in ("independent", "shared", "twins", "cut")),
    *(("gram", {}, kind) for kind in ("independent", "twins")),
    *(("flow", {}, kind) for kind in ("independent", "twins")),
    ("flow", {"side": "left", "time": 0.5}, "cut"),
    ("flow", {"side": "right", "time": 50.0}, "shared"),
    ("gram", {"side": "left"}, "shared"),
    ("gram", {"side": "right", "ridge": 0.01}, "cut"),
    *(("opcm", {}, kind) for kind in ("independent", "twins", "cut")),
    ("opcm", {"variant": "rows+columns"}, "shared"),
    ("opcm", {"variant": "rows", "alpha": 0.9}, "independent"),
    ("opcm", {"variant": "columns", "alpha": 0.2}, "cut"),
    ("opcm", {"variant": "block+diagonal"}, "independent"),
    ("opcm", {"alpha": 0.9999}, "twins"),
]


@pytest.mark.parametrize(("name", "options", "kind"), CASES)
def test_the_quick_way_without_a_model_gives_what_reading_again_gives(
    name: str, options: dict[str, object], kind: str
) -> None:
    specs = {n: TensorSpec(n, shape, "F32", "matrix") for n, shape in (("a", (128, 96)), ("b", (52, 120)))}
    random = torch.Generator().manual_seed(4)
    shared = {n: torch.randn(s.shape[1], 8, generator=random) for n, s in specs.items()}
    given = [
        {
            n: (
                torch.randn(s.shape[0], 8, generator=random),
                shared[n] if kind == "shared" else torch.randn(s.shape[1], 8, generator=random),
            )
            for n, s in specs.items()
            if (number + len(n)) % 5
        }
        for number in range(7)
    ]
    if kind == "twins":
        given[4] = given[3]
    held = shelf(given, 40 if kind == "cut" else 96, specs)
    made, slow = rule(name, options), plainly(name, **options)
    chosen = {number: 1.0 + 0.3 * number if made.laws.weighted else 1.0 for number in range(1, 8)}
    found, expected = (Explaining(Merged(held, chosen, which, read_options(name))) for which in (made, slow))
    for n in specs:
        one, other = found.products(n), expected.products(n)
        length = other.square
        assert one.square == pytest.approx(length, rel=1e-4)
        for figures, wanted in zip(one[1:5], other[1:5], strict=True):
            assert figures == pytest.approx(wanted, rel=1e-4, abs=1e-5 * length)
        for index in range(len(chosen)):
            change, again = (
                math.sqrt(max(0.0, way.square + way.squares[index] - 2 * way.inners[index])) for way in (one, other)
            )
            assert change == pytest.approx(again, abs=2e-4 * math.sqrt(length)), (n, index)
