"""The triplets of a product of factors are those of the product."""

from __future__ import annotations

import math

import pytest
import torch

from continual.blocks import decomposed, triplets
from continual.rules import tsv_m


def factors(m: int, n: int, r: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(m, r, generator=random), 0.1 * torch.randn(n, r, generator=random)


@pytest.mark.parametrize(("m", "n", "r"), [(40, 30, 8), (30, 40, 8), (12, 9, 40), (9, 40, 20), (1, 30, 4), (30, 1, 1)])
def test_the_product_comes_back(m: int, n: int, r: int) -> None:
    left, right = factors(m, n, r)
    block = triplets(left, right)
    product = left.double() @ right.double().mT
    assert len(block.sigma) == block.rank == min(m, n, r)
    assert float((block.dense() - product).norm()) <= 2e-7 * float(product.norm()) * math.sqrt(r)
    assert block.energy == pytest.approx(float(product.square().sum()), rel=1e-12)
    assert block.kept == pytest.approx(block.energy, rel=1e-6)


def test_they_are_the_triplets_that_tsv_m_finds_in_the_dense_matrix() -> None:
    left, right = factors(33, 21, 5)
    u, sigma, v = tsv_m.triplets(left @ right.mT, 5)
    block = triplets(left, right)
    assert torch.allclose(block.sigma.double(), sigma, rtol=1e-6)
    cosines = ((block.u.double() @ u).diagonal() * (block.v.double() @ v).diagonal()).tolist()
    assert cosines == pytest.approx([1.0] * 5, abs=1e-6)
    assert torch.equal(block.sigma, block.sigma.sort(descending=True).values)


def test_null_directions_are_left_out() -> None:
    left, right = factors(30, 20, 6)
    left[:, 3:] = left[:, :3]
    block = triplets(left, right)
    assert len(block.sigma) == block.rank == 3
    assert float((block.dense() - left @ right.mT).norm()) < 1e-6


@pytest.mark.parametrize("rank", [0, 4])
def test_a_product_of_zeros_has_no_triplets(rank: int) -> None:
    block = triplets(torch.zeros(30, rank), torch.ones(20, rank))
    assert (block.u.shape, block.v.shape, block.energy, block.rank) == ((0, 30), (0, 20), 0.0, 0)
    assert torch.equal(block.dense(), torch.zeros(30, 20))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_seen(value: float, side: int) -> None:
    pair = factors(30, 20, 4)
    pair[side][3, 2] = value
    assert math.isnan(triplets(*pair).energy), "before anything is decomposed"


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("sides", [(40, 30), (1100, 1050)], ids=["all of them", "a range finder"])
def test_a_matrix_that_is_not_finite_is_seen(value: float, sides: tuple[int, int]) -> None:
    """Also one whose largest singular value float32 does not hold, though it holds all of its values."""
    matrix = torch.full(sides, value)
    found = decomposed(matrix, 4)
    assert (len(found.sigma), math.isfinite(found.energy)) == (0, False)


@pytest.mark.parametrize(("rank", "dependent"), [(4, False), (4, True), (1, False)])
@pytest.mark.parametrize(("one", "other"), [(1e200, 1e200), (1e307, 1.0), (1e154, 1e154)])
def test_factors_whose_product_no_float_holds_are_seen(one: float, other: float, rank: int, dependent: bool) -> None:
    """Of rank 1, too, where LAPACK decomposes infinity into NaN and says nothing."""
    left, right = (factor.double() for factor in factors(30, 20, rank))
    if dependent:
        left[:, 1] = left[:, 0]
    assert not math.isfinite(triplets(left * one, right * other).energy)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_columns_that_cancel_out_have_no_triplets(scale: float) -> None:
    """An adapter minus itself, beside a column of its own or not."""
    left, right = factors(300, 200, 3)
    twice = torch.cat([left, left], 1) * scale, torch.cat([right, -right], 1) / scale
    assert (len(triplets(*twice).sigma), triplets(*twice).energy) == (0, 0.0)
    one = factors(300, 200, 1)
    block = triplets(*(torch.cat(pair, 1) for pair in zip(twice, one, strict=True)))
    torch.testing.assert_close(block.dense(), one[0] @ one[1].mT, rtol=1e-4, atol=1e-4)
    assert len(block.sigma) == 1


def test_a_product_beyond_float32_is_seen() -> None:
    left, right = factors(30, 20, 4)
    assert triplets(left * 1e30, right * 1e30).energy == math.inf
    assert math.isfinite(triplets(left * 1e30, right * 1e-30).energy)


def test_bfloat16_factors_are_taken_as_they_are() -> None:
    left, right = (factor.bfloat16() for factor in factors(30, 20, 4))
    product = left.double() @ right.double().mT
    assert float((triplets(left, right).dense() - product).norm()) <= 4e-7 * float(product.norm())


def test_the_first_of_a_block_is_its_best_cut() -> None:
    left, right = factors(30, 20, 6)
    block = triplets(left, right)
    u, sigma, vh = torch.linalg.svd(left.double() @ right.double().mT)
    best = u[:, :2] * sigma[:2] @ vh[:2]
    assert float((block.first(2).dense() - best).norm()) <= 1e-6 * float(best.norm())
    assert (block.first(2).rank, block.first(9).rank, block.first(2).energy) == (6, 6, block.energy)
