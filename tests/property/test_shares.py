"""What a reading says of its models is what leaving each of them out gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from continual.blocks import Explaining, HeldLayers, Merged, ModelShare
from continual.records import TensorSpec
from continual.rules import RULES, iso_less, read_options, rule
from tests.helpers.shelves import SPECS, Regime, adapters, dense, shelf

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


@pytest.mark.parametrize("regime", ["mixed", "shared", "twins", "partial"])
@pytest.mark.parametrize("name", READABLE)
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
    assert sorted(found.whole) == [1, 3]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_quick_way_without_a_model_gives_what_reading_again_gives(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = {n: TensorSpec(n, shape, "F32", "matrix") for n, shape in (("a", (128, 96)), ("b", (96, 160)))}
    random = torch.Generator().manual_seed(4)
    given = [
        {
            n: (torch.randn(s.shape[0], 8, generator=random), torch.randn(s.shape[1], 8, generator=random))
            for n, s in specs.items()
            if (number + len(n)) % 5
        }
        for number in range(10)
    ]
    held = shelf(given, 96, specs)
    chosen = {number: 1.0 + 0.3 * number if weighted else 1.0 for number in range(1, 11)}
    merged = Merged(held, chosen, rule("iso-c"), read_options("iso-c"))
    quick = Explaining(merged).shares()
    monkeypatch.setattr(iso_less, "LEAST", 10_000)
    slow = Explaining(Merged(held, chosen, rule("iso-c"), read_options("iso-c"))).shares()
    for number, found in quick.whole.items():
        assert found == pytest.approx(slow.whole[number], abs=2e-4)
        assert all(
            quick.layers[n][number] == pytest.approx(slow.layers[n][number], abs=2e-4)
            for n in specs
            if number in slow.layers[n]
        )
    assert quick.whole != slow.whole
